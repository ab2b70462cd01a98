"""The recipes' networks against Keras, and what the others promise."""

import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import random_params
from PIL import Image

from aecore.errors import ConfigError
from aecore.models import (
    Autoencoder,
    LinearAutoencoder,
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
    Upscaler,
)
from aecore.networks import layers, summary
from aecore.networks.base import abstract_params, check_memory, parameter_bytes
from aecore.networks.lowering import operations
from aecore.networks.network import LinenNetwork, fits_within
from aecore.networks.receptive_field import ReceptiveField

RANDOM = np.random.default_rng(0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, params, images, method=None):
    return model.apply({"params": params}, images, method=method)


def keras_noise_reducer(layers):
    conv = dict(kernel_size=3, padding="same")
    return [
        layers.Conv2D(16, strides=2, activation="relu", **conv),
        layers.Conv2D(8, strides=2, activation="relu", **conv),
        layers.Conv2DTranspose(8, strides=2, activation="relu", **conv),
        layers.Conv2DTranspose(16, strides=2, activation="relu", **conv),
        layers.Conv2D(1, activation="sigmoid", **conv),
    ]


def keras_resolution_enhancer(layers):
    conv = dict(kernel_size=3, padding="same", activation="relu")
    return [
        layers.Conv2D(256, **conv),
        layers.Conv2D(128, **conv),
        layers.MaxPooling2D(2),
        layers.Conv2D(64, **conv),
        layers.Conv2D(64, **conv),
        layers.UpSampling2D(2, interpolation="nearest"),
        layers.Conv2D(128, **conv),
        layers.Conv2D(256, **conv),
        layers.Conv2D(3, kernel_size=3, padding="same"),
    ]


@pytest.mark.parametrize(
    ("model", "layers_of", "shape", "parameters"),
    [
        (NoiseReducer(), keras_noise_reducer, (2, 28, 28, 1), 3_217),
        (NoiseReducer(), keras_noise_reducer, (1, 36, 20, 1), 3_217),
        (ResolutionEnhancer(), keras_resolution_enhancer, (1, 16, 24, 3), 788_867),
    ],
)
def test_the_same_function_as_the_keras_network(model, layers_of, shape, parameters):
    import keras

    network = keras.Sequential([keras.Input(shape[1:]), *layers_of(keras.layers)])
    params = random_params(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert network.count_params() == parameters

    # Linen names layers encoder_0, …, decoder_0, …, output, in the order of the table.
    names = sorted(params, key=lambda name: ("encoder decoder output".index(name[:6]), name))
    layers = [layer for layer in network.layers if layer.weights]
    for name, layer in zip(names, layers, strict=True):
        kernel, _ = layer.get_weights()
        scale = (2 / np.prod(kernel.shape[:3])) ** 0.5  # Keeps the layers' values near 1.
        kernel = RANDOM.normal(0, scale, kernel.shape).astype(np.float32)
        bias = RANDOM.normal(0, 0.1, layer.get_weights()[1].shape).astype(np.float32)
        layer.set_weights([kernel, bias])
        if isinstance(layer, keras.layers.Conv2DTranspose):
            # Keras defines it as the gradient of a convolution, whose kernel is flipped and has
            # its output features before its input features; Linen correlates with it as it is.
            kernel = kernel[::-1, ::-1].swapaxes(2, 3)
        params[name] = {"kernel": kernel, "bias": bias}

    images = RANDOM.random(shape, np.float32)
    outputs = apply(model, params, images)
    np.testing.assert_allclose(outputs, network(images), atol=1e-5)
    codes = apply(model, params, images, "encode")
    np.testing.assert_allclose(apply(model, params, codes, "decode"), outputs, atol=1e-6)
    assert codes.shape[1] * model.stride == shape[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"features": ()},
        {"features": (4, 0)},
        {"features": (16.0, 8)},
        {"features": [16, 8]},
        {"features": 16},
        {"channels": -1},
        {"channels": True},
        {"channels": "1"},
        {"channels": (1,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [NoiseReducer, ResolutionEnhancer])
def test_impossible_networks_are_refused(model, fields):
    ((name, value),) = fields.items()
    message = re.escape(f"{model.__name__} can't have {name} {value!r}; use ")
    with pytest.raises(ConfigError, match=message + ".* of at least 1"):
        model(**fields)


OTHERS = [
    SubpixelAutoencoder(),
    SubpixelAutoencoder((8, 6, 4), channels=3, residual=True),
    UNet((8,)),
    UNet((6, 8, 10), blocks=2),
    UNet((6, 8), channels=3, residual=False, norm="group"),
    UNet((4, 6, 8), channels=3, patch=2),
    LinearAutoencoder(components=5, patch=4, channels=3),
    Upscaler(5, 1, scale=1, channels=1, patch=2),
    Upscaler(6, 2, scale=2, channels=1),
    Upscaler(4, 1, scale=3, patch=2),
]


@pytest.mark.parametrize("model", OTHERS, ids=str)
@pytest.mark.every_room
def test_encoding_and_decoding_is_the_network(model):
    shape = (2, 3 * model.stride, 2 * model.stride, model.channels)
    images = RANDOM.random(shape, np.float32)
    params = random_params(model)
    outputs = apply(model, params, images)
    height, width = (model.scale * side for side in images.shape[1:3])
    assert outputs.shape == (2, height, width, model.channels)
    codes = apply(model, params, images, "encode")
    assert codes.shape[:3] == (2, 3, 2)
    np.testing.assert_allclose(apply(model, params, codes, "decode"), outputs, atol=1e-6)


def test_the_subpixel_network_is_no_larger_than_the_recipes():
    def size(model):
        params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 28, 28, 1)))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert size(SubpixelAutoencoder()) == 3_130 < size(NoiseReducer()) == 3_217


def test_a_unet_comes_in_many_sizes():
    def size(model):
        params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 1)))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert size(UNet((8, 12))) < 10_000
    assert size(UNet((32, 64, 128, 256), blocks=2)) > 4_000_000


def test_an_upscaler_comes_in_many_sizes():
    assert 40_000 < parameter_bytes(Upscaler(16, 2, channels=1)) < 48_000
    assert 2_300_000 < parameter_bytes(Upscaler()) < 2_500_000
    assert 40_000_000 < parameter_bytes(Upscaler(192, 15, scale=4)) < 44_000_000


@pytest.mark.parametrize(
    "model",
    [
        SubpixelAutoencoder((4,), residual=True),
        UNet((4, 6), blocks=2),
        UNet((4, 6), channels=3, norm="group", patch=2),
        Upscaler(4, 1, scale=1),
    ],
    ids=repr,
)
def test_untrained_residual_networks_are_the_identity(model):
    images = RANDOM.random((1, 8, 8, model.channels), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    np.testing.assert_array_equal(apply(model, params, images), images)


@pytest.mark.parametrize("model", [SubpixelAutoencoder((4,)), UNet((4, 6), residual=False)])
def test_without_parameters_other_networks_are_gray(model):
    params = jax.tree.map(np.zeros_like, random_params(model))
    images = RANDOM.random((1, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(apply(model, params, images), 0.5)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("patch", [1, 2])
def test_an_untrained_upscaler_is_bicubic_interpolation(scale, patch):
    model = Upscaler(4, 1, scale=scale, patch=patch)
    images = RANDOM.random((2, 6, 10, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    size = (10 * scale, 6 * scale)
    pillows = [
        [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in planes]
        for planes in images.transpose(0, 3, 1, 2)
    ]
    wanted = np.array(pillows).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(apply(model, params, images), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "reach"),
    [
        (Upscaler(3, 1, scale=3), 4),
        (Upscaler(3, 2, scale=2, channels=1), 6),
        (Upscaler(3, 1, scale=2, channels=1, patch=2), 8),
    ],
    ids=repr,
)
def test_an_upscalers_receptive_field_is_in_pixels_of_the_small_image(model, reach):
    field = LinenNetwork(model).receptive_field(random_params(model))
    assert field == ReceptiveField(before=reach, after=reach)


def test_an_upscalers_layers():
    model = Upscaler(5, 1, scale=2, channels=3)
    rows = summary.layers(model, random_params(model), (6, 8, 3))
    assert [(row.name, row.shape, row.field) for row in rows] == [
        ("input", (6, 8, 5), 3),
        ("body_0/Conv_0", (6, 8, 5), 5),
        ("body_0/Conv_1", (6, 8, 5), 7),
        ("output", (6, 8, 12), 9),
    ]
    assert rows[-1].flops == 2 * 9 * 5 * 12 * 6 * 8


class EnlargingFirst(Autoencoder):
    """Looks at neighbours in the large image, too."""

    channels: int = 1
    stride: int = 1
    scale: int = 3

    def setup(self):
        self.enlarge = layers.Enlarge(3)
        self.output = nn.Conv(1, (3, 3))

    def encode(self, images):
        return images

    def decode(self, codes):
        return self.output(self.enlarge(codes))


def test_layers_may_be_larger_than_the_image():
    model = EnlargingFirst()
    params = random_params(model)
    assert fits_within(LinenNetwork(model), params)
    assert LinenNetwork(model).scale == 3
    # Of three large pixels, the outer ones depend on two small ones before and behind theirs.
    (row,) = summary.layers(model, params, (4, 5, 1))
    assert (row.shape, row.field, row.flops) == ((12, 15, 1), 5, 2 * 9 * 12 * 15)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(norm="batch"), "norm 'batch'; use none or group"),
        (lambda: UNet(patch=3), "patch 3; use 1 or 2"),
        (lambda: UNet(patch=2.0), "patch 2.0; use 1 or 2"),
        (lambda: UNet(blocks=0), "blocks 0; use a whole number of at least 1"),
        (lambda: UNet(blocks=1.5), "blocks 1.5; use a whole number of at least 1"),
        (lambda: UNet(features=(8, 0)), "one or more whole numbers of at least 1"),
        (lambda: UNet(residual=1), "residual 1; use True or False"),
        (lambda: SubpixelAutoencoder(features=()), "one or more whole numbers of at least 1"),
        (lambda: SubpixelAutoencoder(residual="no"), "residual 'no'; use True or False"),
        (lambda: Upscaler(scale=5), "scale 5; use 1 or 2 or 3 or 4"),
        (lambda: Upscaler(width=0), "width 0; use a whole number of at least 1"),
        (lambda: LinearAutoencoder(components=0), "components 0; use a whole number of at least 1"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_relu_of_the_networks_is_flaxs():
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 1e-30, 2.0, np.inf], np.float32)
    (result, gradient), (wanted, wanted_gradient) = (
        jax.vjp(function, values) for function in (operations.relu, nn.relu)
    )
    np.testing.assert_array_equal(result, wanted)
    cotangents = np.array([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0], np.float32)
    np.testing.assert_array_equal(*gradient(cotangents), *wanted_gradient(cotangents))
    program = str(jax.make_jaxpr(jax.grad(lambda values: operations.relu(values).sum()))(values))
    assert " sign " in program
    assert " gt " not in program


class OwnNetwork(Autoencoder):
    """Flax's layers, and modules of one's own that are only named like one of them."""

    channels: int = 4
    stride: int = 2

    def setup(self):
        self.grouped = nn.Conv(8, (3, 3), feature_group_count=4)
        self.strided = nn.Conv(6, (3, 3), strides=2)
        self.dense = nn.Dense(5)
        self.mixed = TransposedMix(7)
        self.transposed = nn.ConvTranspose(3, (3, 3), strides=(2, 2))
        self.output = layers.Conv(4)

    def encode(self, images):
        return self.dense(nn.relu(self.strided(nn.relu(self.grouped(images)))))

    def decode(self, codes):
        return self.output(nn.relu(self.transposed(self.mixed(codes))))


class TransposedMix(nn.Module):
    """Multiplies each pixel by two matrices."""

    features: int

    @nn.compact
    def __call__(self, images):
        shape = (images.shape[-1], self.features)
        first, second = (self.param(n, nn.initializers.ones, shape) for n in ("a", "b"))
        return (images @ first) * (images @ second)


def test_multiplications_of_each_kind_of_layer():
    own, h, w = OwnNetwork(), 6, 10
    rows = summary.layers(own, random_params(own), (h, w, 4))
    multiplications = {row.name: row.flops / 2 for row in rows}
    assert multiplications == {
        "grouped": 9 * (4 // 4) * 8 * h * w,
        "strided": 9 * 8 * 6 * h * w / 4,
        "dense": 6 * 5 * h * w / 4,
        "mixed": 2 * 5 * 7 * h * w / 4,
        "transposed": 9 * 7 * 3 * h * w / 4,
        "output": 9 * 3 * 4 * h * w,
    }
    # A row of the coarse result is spread over two of the finer ones or over one.
    assert [row.field for row in rows] == [3, 5, 5, 5, 7, 9]

    model = NoiseReducer((6, 5), channels=3)
    rows = summary.layers(model, random_params(model), (8, 12, 3))
    assert {row.name: (*row.shape, row.flops / 2) for row in rows} == {
        "encoder_0": (4, 6, 6, 9 * 3 * 6 * 4 * 6),
        "encoder_1": (2, 3, 5, 9 * 6 * 5 * 2 * 3),
        "decoder_0": (4, 6, 5, 9 * 5 * 5 * 2 * 3),
        "decoder_1": (8, 12, 6, 9 * 5 * 6 * 4 * 6),
        "output": (8, 12, 3, 9 * 6 * 3 * 8 * 12),
    }


class Blur(layers.Layer):
    """A layer of one's own that looks at neighbours, and is no convolution to Flax."""

    @nn.compact
    def __call__(self, images):
        padded = jax.numpy.pad(images, ((0, 0), (1, 1), (0, 0), (0, 0)))
        bias = self.param("bias", nn.initializers.ones, (1,))
        return padded[:, :-2] + padded[:, 2:] + bias


class Blurring(Autoencoder):
    layer: type[nn.Module]
    channels: int = 1
    stride: int = 1

    def setup(self):
        self.blurs = [self.layer(), self.layer()]

    def encode(self, images):
        return self.blurs[0](images)

    def decode(self, codes):
        return self.blurs[1](codes)


class UnknownBlur(nn.Module):
    """As `Blur`, but nothing says of it that it looks at neighbours."""

    __call__ = Blur.__call__


@pytest.mark.parametrize("model", [*OTHERS, NoiseReducer(), OwnNetwork(), Blurring(Blur)], ids=str)
def test_masked_images_are_restored_as_if_alone(model):
    is_normed = getattr(model, "norm", "none") == "group"
    params = random_params(model)
    assert fits_within(LinenNetwork(model), params) != is_normed


def test_layers_that_dont_say_that_they_look_around_are_found_out():
    model = Blurring(UnknownBlur)
    assert not fits_within(LinenNetwork(model), random_params(model))


def test_the_memory_of_parameters():
    assert parameter_bytes(NoiseReducer()) == 4 * 3_217
    assert parameter_bytes(UNet((10**6,))) == 4 * (4 * 9 * 10**12 + 5 * 10**6 + 2 * 9 * 10**6 + 1)
    check_memory(NoiseReducer(), available=4 * 3_217)
    with pytest.raises(ConfigError, match="NoiseReducer with features .16, 8. needs"):
        check_memory(NoiseReducer(), available=4 * 3_217 - 1)
    with pytest.raises(ConfigError, match="NoiseReducer with features .16, 8. needs"):
        check_memory(NoiseReducer(), available=16 * 3_217 - 1, copies=4)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (NoiseReducer(features=(10**9,)), "features .1000000000,."),
        (SubpixelAutoencoder((8, 10**12)), "features .8, 1000000000000."),
        (UNet((4, 8), channels=10**9), "channels 1000000000"),
        (LinearAutoencoder(components=10**30), "components 1000000000000000000000000000000"),
    ],
)
def test_networks_too_large_for_memory_are_named(model, field):
    with pytest.raises(ConfigError, match=f"{type(model).__name__} with {field} needs .* GB"):
        check_memory(model, available=1e11)


def test_a_network_is_written_in_messages_as_in_python():
    model = UNet((4, 6), channels=1, patch=2)
    written = repr(model)
    assert written.startswith("UNet(features=(4, 6), ")
    assert eval(written, {"UNet": UNet}) == model


class Sowing(NoiseReducer):
    """A network that notes something besides what it gives."""

    def decode(self, codes):
        self.sow("losses", "codes", abs(codes).mean())
        return super().decode(codes)


def test_what_a_network_only_notes_is_no_parameter():
    own, plain = (
        jax.tree.map(lambda leaf: leaf.shape, abstract_params(kind((4, 6)), (16, 16, 1)))
        for kind in (Sowing, NoiseReducer)
    )
    assert own == plain
