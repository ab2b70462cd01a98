"""The graph that ONNX Runtime runs against the function that JAX runs."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from etils import epath
from jax import lax

import aecore
import aecore.saved
from aecore.errors import ConfigError
from aecore.models import (
    LinearAutoencoder,
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
)
from aecore.saved import exported
from aecore.serving import site

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

convert = pytest.importorskip("aecore.saved.onnx.conversion").convert


def function_of(model, seed=0):
    """The model with random parameters, biases and scales included."""
    return functools.partial(model.apply, {"params": random_params(model, seed)})


def session_of(model):
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def largest_difference(function, *, channels=2, stride=2, sizes=((1, 1, 1), (2, 3, 2), (3, 7, 9))):
    """Writes the function, and compares at some `(batch, height / stride, width / stride)`."""
    model = convert(function, channels=channels, stride=stride)
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model)
    differences = []
    for batch, height, width in sizes:
        shape = (batch, height * stride, width * stride, channels)
        images = np.random.default_rng(shape).random(shape, np.float32)
        (restored,) = session.run(["restored"], {"images": images})
        expected = np.asarray(jax.jit(function)(images))
        assert restored.shape == expected.shape == shape
        assert restored.dtype == np.float32
        assert np.abs(expected).max() < 30  # Larger numbers have larger rounding errors.
        differences.append(np.abs(restored - expected).max())
    assert expected.std() > 1e-3  # Else a wrong graph could agree, too.
    return max(differences)


@pytest.mark.parametrize(
    "model",
    [
        NoiseReducer(),
        NoiseReducer(features=(4,)),
        NoiseReducer(features=(12, 8, 4), channels=3),
        ResolutionEnhancer(features=(8, 6, 4)),
        # Enough channels for CPUs to run Winograd's algorithm; the graph has plain convolutions.
        ResolutionEnhancer(features=(60, 56, 56)),
        SubpixelAutoencoder(),
        UNet(features=(4, 6), channels=3, patch=2),
        UNet(features=(4, 6), norm="group", residual=False),
        LinearAutoencoder(components=5, patch=4),
    ],
    ids=lambda model: f"{type(model).__name__}-{getattr(model, 'features', '')}",
)
def test_models(model):
    sizes = ((1, 1, 1), (2, 1, 5), (3, 28 // model.stride, 36 // model.stride))
    difference = largest_difference(
        function_of(model), channels=model.channels, stride=model.stride, sizes=sizes
    )
    assert difference < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        NoiseReducer(features=(4, 4)),
        # Its output is linear, and must be clipped.
        ResolutionEnhancer(features=(4, 4, 4)),
        UNet(features=(4, 6), channels=3, patch=2, norm="group"),
        # Its stride is larger than many images.
        LinearAutoencoder(components=5, patch=12),
    ],
    ids=lambda model: type(model).__name__,
)
def test_images_of_any_size_come_out_as_from_a_restorer(model, tmp_path):
    restorer = aecore.Restorer.of(model, random_params(model))
    path = epath.Path(tmp_path / "net.onnx")
    exported.export_onnx(path, restorer.trained)
    session = session_of(onnx.load(path))
    for batch, height, width in ((1, 1, 1), (2, 1, 5), (1, 3, 2), (2, 29, 31), (1, 28, 36)):
        shape = (batch, height, width, model.channels)
        images = np.random.default_rng(shape).random(shape, np.float32)
        (restored,) = session.run(["restored"], {"images": images})
        # Random parameters and GroupNorm magnify what differs by rounding.
        np.testing.assert_allclose(restored, restorer(images), atol=5e-5)


def test_a_network_may_enlarge():
    def enlarge(images):
        return conv(images.repeat(3, axis=1).repeat(3, axis=2), kernel(3, 3, 2, 2))

    model = convert(enlarge, channels=2, stride=4, scale=3)
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model)
    assert session.get_outputs()[0].shape == ["batch", "3 * height", "3 * width", 2]
    images = np.random.default_rng(0).random((2, 5, 7, 2), np.float32)
    (restored,) = session.run(["restored"], {"images": images})
    expected = enlarge(jnp.pad(images, ((0, 0), (0, 3), (0, 1), (0, 0)), "reflect"))
    np.testing.assert_allclose(restored, expected[:, :15, :21], atol=1e-5)
    with pytest.raises(ConfigError, match=r"for ONNX, it must make \(b, 8\*h, 8\*w, 2\)"):
        convert(enlarge, channels=2, stride=4, scale=2)


class Various(nn.Module):
    """What networks for images are made of, beyond aecore's own."""

    channels: int = 2
    stride: int = 4

    @nn.compact
    def __call__(self, images):
        b, h, w, c = images.shape
        x = nn.Conv(8, (5, 3))(images)
        x = nn.swish(nn.GroupNorm(2)(x))
        skip = x
        x = nn.Conv(8, (3, 3), feature_group_count=8, strides=2)(x)
        x = nn.gelu(nn.LayerNorm()(x), approximate=False)
        x = nn.Dense(12)(x)
        x = nn.gelu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        pooled = nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
        pooled += nn.max_pool(x, (3, 3), (2, 2), "SAME")
        attention = nn.sigmoid(nn.Dense(8)(x.mean((1, 2), keepdims=True)))
        x = x * attention + nn.ConvTranspose(8, (4, 4), (2, 2))(pooled)
        x = jnp.concatenate([x, nn.softplus(x), nn.elu(-x), nn.leaky_relu(x)], axis=-1)
        x = nn.Conv(8 * 4, (1, 1))(x)
        # Pixel shuffle.
        x = x.reshape(b, h // 2, w // 2, 2, 2, 8).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, 8)
        return images + nn.Conv(c, (3, 3), padding="REFLECT")(x + skip)


class Attention(nn.Module):
    """Self-attention between pixels."""

    channels: int = 2
    stride: int = 2

    @nn.compact
    def __call__(self, images):
        b, h, w, c = images.shape
        pixels = nn.Dense(8)(images.reshape(b, h * w, c))
        pixels += nn.MultiHeadDotProductAttention(2)(nn.RMSNorm()(pixels))
        return nn.Dense(c)(pixels).reshape(b, h, w, c)


@pytest.mark.parametrize("model", [Various(), Attention()], ids=lambda model: type(model).__name__)
def test_layers(model):
    assert largest_difference(function_of(model), stride=model.stride) < 1e-5


NAMED = {
    layer.__name__: layer
    for layer in (
        *(nn.relu, nn.relu6, nn.leaky_relu, nn.elu, nn.celu, nn.selu, nn.gelu, nn.silu),
        *(nn.sigmoid, nn.hard_sigmoid, nn.tanh, nn.hard_tanh, nn.softplus, nn.soft_sign),
        *(nn.softmax, nn.log_softmax, lambda x: nn.glu(jnp.tile(x, (1, 1, 1, 2)))),
    )
} | {
    type(layer).__name__: layer
    for layer in (
        *(nn.PReLU(), nn.LayerNorm(), nn.GroupNorm(2), nn.RMSNorm(), nn.InstanceNorm()),
        *(nn.BatchNorm(use_running_average=True), nn.Dense(8), nn.DenseGeneral(8)),
    )
}


@pytest.mark.parametrize("name", NAMED)
def test_named_layers(name):
    layer = NAMED[name]
    if isinstance(layer, nn.Module):
        variables = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
        random = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf: random.uniform(0.5, 1.5, leaf.shape), variables)
        layer = functools.partial(layer.apply, variables)
    assert largest_difference(lambda x: layer(6 * x - 3), channels=8) < 1e-5


def kernel(*shape):
    return np.random.default_rng(shape).normal(0, 0.3, shape).astype(np.float32)


def conv(images, weights, strides=(1, 1), padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        images, weights, strides, padding, dimension_numbers=layout, **options
    )


def transposed(images, weights, padding, **options):
    """A convolution of the images with zeros put between their pixels."""
    return conv(images, weights, padding=padding, lhs_dilation=(2, 2), **options)


def resized(images, method):
    b, h, w, c = images.shape
    large = jax.image.resize(images, (b, 2 * h, 2 * w, c), method)
    return nn.avg_pool(large, (2, 2), (2, 2)) + large[:, :h, :w]


def halves(function):
    """The function of every second pixel's size, brought back to full size."""
    return lambda images: function(images).repeat(2, axis=1).repeat(2, axis=2)


def rows(images):
    """Every row's mean, repeated along it."""
    return jnp.broadcast_to(images.mean(2, keepdims=True), images.shape)


FUNCTIONS = {
    "repeated, reduced": lambda x: x + rows(x).sum(2, keepdims=True) / 9,
    "repeated, turned": lambda x: conv(rows(x).transpose(0, 2, 1, 3), kernel(3, 2, 2, 2)).transpose(
        0, 2, 1, 3
    ),
    "repeated, sliced": lambda x: jnp.concatenate(
        [lax.slice_in_dim(rows(x), 1, None, axis=2), x[:, :, :1]], axis=2
    ),
    "mean": lambda x: nn.avg_pool(x, (3, 2), (1, 1), "SAME"),
    "identity": lambda x: x,
    "constant": lambda x: jnp.zeros_like(x) + jnp.arange(2.0),
    "flip": lambda x: x[:, ::-1] + jnp.flip(x, (2, 3)),
    "shift": lambda x: jnp.pad(x[:, 1:, :-1], ((0, 0), (0, 1), (1, 0), (0, 0)), "edge"),
    "cropping pad": lambda x: lax.pad(x, 0.5, ((0, 0, 0), (-1, 1, 0), (2, -2, 0), (0, 0, 0))),
    "last row": lambda x: x - x[:, -1:] * x[:, :, -1][:, :, None],
    "channels": lambda x: x[..., jnp.array([1, 0])] + x[..., :1] * x[..., [1, 1]],
    "every second": lambda x: (x[:, ::2, 1::2] - x[:, 1::2, ::2]).repeat(2, 1).repeat(2, 2),
    "transpose": lambda x: x + (x.transpose(0, 2, 1, 3) ** 2).mean((1, 2), keepdims=True),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, axis=3)[::-1], axis=3),
    "tile": lambda x: jnp.tile(x, (1, 2, 1, 1))[:, x.shape[1] // 2 : -(x.shape[1] // 2)],
    "coordinates": lambda x: x + jnp.linspace(0.0, 1.0, x.shape[2])[:, None],
    "size": lambda x: x * (x.shape[1] // 3 + jax.core.max_dim(x.shape[2] - 5, 2) % 4),
    "nearest": lambda x: resized(x, "nearest"),
    "bilinear": lambda x: resized(x, "bilinear"),
    "clip": lambda x: jnp.clip(x, 0.2, x.mean((1, 2, 3), keepdims=True)),
    "where": lambda x: jnp.where((x > 0.3) & ~(x >= 0.6) | (x == x.max()), x, -x),
    "powers": lambda x: x**3 + (x + 1) ** -2 + x**0.7 + lax.rsqrt(x + 0.1) + jnp.sqrt(x),
    "logarithms": lambda x: jnp.log1p(x) + jnp.expm1(-x) + jnp.log(x + 1) - jnp.abs(x - 0.5),
    "softmax": lambda x: nn.softmax(x, axis=2) + nn.log_softmax(3 * x),
    "norm": lambda x: nn.standardize(x, axis=(1, 2)) / 4 + x.max((1, 3), keepdims=True),
    "mask": lambda x: (x > 0.5).astype(jnp.float32) + (x * 9).astype(jnp.int32) - jnp.floor(x * 5),
    "stack": lambda x: jnp.stack([x, -x], 3).reshape(*x.shape[:3], 4)[..., 1:3],
    "bicubic": lambda x: resized(x, "bicubic"),
    "groups": lambda x: conv(x, kernel(3, 2, 1, 4), feature_group_count=2)[..., ::2],
    "dilated": lambda x: conv(x, kernel(3, 3, 2, 2), rhs_dilation=(2, 3)),
    "phases": halves(
        lambda x: transposed(x[:, ::2, ::2], kernel(3, 3, 2, 2), ((2, 1), (2, 1)))[:, ::2, ::2]
    ),
    "transposed 3": lambda x: transposed(x, kernel(3, 3, 2, 2), ((2, 1), (2, 1)))[:, ::2, 1::2],
    "transposed 1": lambda x: nn.avg_pool(
        transposed(x, kernel(1, 1, 2, 2), ((0, 1), (0, 1))), (2, 2), (2, 2)
    ),
    "transposed groups": lambda x: nn.avg_pool(
        transposed(x, kernel(3, 4, 1, 2), ((1, 2), (2, 2)), feature_group_count=2), (2, 2), (2, 2)
    ),
    "bfloat16": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "checkpoint": jax.checkpoint(lambda x: jnp.tanh(x) * 2),
    "branches": lambda x: lax.cond(True, jnp.tanh, jnp.exp, x),
    "einsum": lambda x: jnp.einsum("bhwc,bhvc,bhvd->bhwd", x, x, x) / 20,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    # The graph has float32 where JAX rounds to bfloat16.
    tolerance = 4e-3 if name == "bfloat16" else 1e-5
    assert largest_difference(FUNCTIONS[name]) < tolerance


@pytest.mark.every_room
def test_interface():
    function = function_of(NoiseReducer(channels=3))
    metadata = {"aecore": "{}", "stride": "4"}
    model = convert(function, channels=3, stride=4, metadata=metadata)
    session = session_of(model)
    (images,), (restored,) = session.get_inputs(), session.get_outputs()
    assert (images.name, restored.name) == ("images", "restored")
    assert images.type == restored.type == "tensor(float)"
    assert images.shape == restored.shape == ["batch", "height", "width", 3]
    assert session.get_modelmeta().custom_metadata_map == metadata
    assert model.opset_import[0].version == 17


def test_graph_is_small():
    model = convert(function_of(ResolutionEnhancer(features=(8, 6, 4))), channels=3, stride=2)
    nodes = [node.op_type for node in model.graph.node]
    assert nodes.count("Conv") == 6
    assert nodes.count("ConvTranspose") == 1
    # To and from NCHW.
    assert nodes.count("Transpose") == 2
    # Kernels and biases; what else there is are sizes.
    large = [weights for weights in model.graph.initializer if np.prod(weights.dims) > 8]
    assert sum(weights.dims[1] > 1 for weights in large) == 7


def test_what_is_not_needed_is_left_out():
    model = convert(lambda x: (jnp.exp(x), x + 1)[1], channels=1, stride=1)
    assert [node.op_type for node in model.graph.node] == ["Add", "Identity"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x, axis=1), "uses sort, which aecore can't write as ONNX; export with"),
        (lambda x: lax.cumsum(x, 1), "uses cumsum, which"),
        (lambda x: lax.cond(x.mean() > 0, jnp.sin, jnp.cos, x), "uses cond, which"),
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "which aecore can't write"),
        (
            lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2, 2, 1), (1, 1, 1, 1), "SAME"),
            "uses windows over too many axes, which",
        ),
        (lambda x: x.real + (1j * x).imag, "complex64"),
        (lambda x: x if x.shape[1] > 8 else -x, "'2*h' > '8' is inconclusive"),
        (lambda x: x[:, ::2], "makes (b, h, 2*w, 1) of images (b, 2*h, 2*w, 1)"),
        (lambda x: (x, x), "for ONNX, it must make (b, 2*h, 2*w, 1)"),
        (lambda x: jnp.take(x, jnp.array([5]), axis=3), "checks of the bounds, as jnp.take does"),
        (lambda x: conv(x, kernel(3, 3, 1, 1), padding=((2, 0), (-1, 3))), "padding that is negat"),
        (
            lambda x: x + conv(x, kernel(3, 3, 1, 1), (3, 3)).mean(),
            "or depends on the images' size",
        ),
        (
            lambda x: transposed(x, kernel(3, 3, 1, 1), ((1, 2), (1, 2)), strides=(2, 2)),
            "uses a transposed convolution with strides",
        ),
        (
            lambda x: x + transposed(x, kernel(2, 2, 1, 1), ((1, 4), (1, 4))).mean(),
            "uses a transposed convolution with padding ((1, 4), (1, 4)), which",
        ),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConfigError) as error:
        convert(function, channels=1, stride=2)
    assert message in str(error.value)


def test_compiled_functions_are_refused(tmp_path):
    restorer = aecore.Restorer.of(LinearAutoencoder(2, 4), random_params(LinearAutoencoder(2, 4)))
    path = epath.Path(tmp_path / "net.aecore")
    exported.save(path, restorer.trained)
    compiled = aecore.Restorer.load(path)
    with pytest.raises(
        ConfigError, match="compiled functions can't be written as ONNX; export the"
    ):
        exported.export_onnx(path, compiled.trained)


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "aecore.saved.onnx.conversion")
    monkeypatch.delattr(aecore.saved.onnx, "conversion")
    restorer = aecore.Restorer.of(NoiseReducer(), {})
    with pytest.raises(ConfigError, match=r'pip install "aecore\[onnx\]"'):
        exported.export_onnx(epath.Path(tmp_path / "net.onnx"), restorer.trained)
    monkeypatch.setattr(site, "download", lambda: b"")
    monkeypatch.setattr(site, "read_runtime", lambda package: {})
    with pytest.raises(ConfigError, match="needs the package onnx"):
        site.write(epath.Path(tmp_path / "page"), restorer.trained, name="denoiser")
    assert not (tmp_path / "page").exists()
