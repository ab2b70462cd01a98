"""Every lowering against `jax.lax`'s own convolutions, values and gradients."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from jax import export, lax
from jax.sharding import PartitionSpec

from aecore.models import NoiseReducer, ResolutionEnhancer, SubpixelAutoencoder, UNet, Upscaler
from aecore.networks import layers
from aecore.networks.lowering import convolution, cpu, operations, xla
from aecore.networks.lowering.phases import merge_phases, split_phases
from aecore.networks.lowering.platforms import by_platform

LAYOUT = ("NHWC", "HWIO", "NHWC")


def reference_conv(images, kernel, stride=1):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=LAYOUT
    )


def reference_conv_transpose(images, kernel):
    return lax.conv_transpose(images, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT)


def on_phases(images, kernel):
    phases = convolution.conv_on_phases(split_phases(images), kernel)
    return merge_phases(phases)


def to_phases(images, kernel):
    return merge_phases(convolution.conv_transpose_to_phases(images, kernel))


def check(ours, reference, images, kernel, dtype=jnp.float32, tolerance=1e-5):
    images, kernel = images.astype(dtype), kernel.astype(dtype)

    # Not of constants, which XLA would compute, slowly, while it compiles.
    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, images, kernel):
        value, gradient = jax.vjp(function, images, kernel)
        weights = np.random.default_rng(1).normal(size=value.shape).astype(dtype)
        return value, *gradient(weights)

    results = value_and_gradients(ours, images, kernel)
    expected = value_and_gradients(reference, images, kernel)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        assert result.dtype == dtype
        result, wanted = np.asarray(result, np.float64), np.asarray(wanted, np.float64)
        # Values and gradients are sums of many terms; the largest of them gives their scale.
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(result / scale, wanted / scale, rtol=0, atol=tolerance)


def arrays(height, width, channels, features):
    random = np.random.default_rng([height, width, channels, features])
    images = random.random((3, height, width, channels), np.float32)
    kernel = random.normal(0, (9 * channels) ** -0.5, (3, 3, channels, features))
    return images, kernel.astype(np.float32)


CHANNELS = [(1, 16), (16, 8), (16, 1), (32, 40), (56, 60)]
SIZES = [(12, 8), (9, 10), (1, 1)]


@pytest.mark.parametrize(("channels", "features"), CHANNELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch_last", [False, True])
def test_convolutions(height, width, channels, features, stride, batch_last):
    check(
        lambda images, kernel: convolution.conv(images, kernel, stride, batch_last),
        lambda images, kernel: reference_conv(images, kernel, stride),
        *arrays(height, width, channels, features),
    )


@pytest.mark.parametrize(("channels", "features"), CHANNELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    "ours",
    [
        convolution.conv_transpose,
        functools.partial(convolution.conv_transpose, batch_last=True),
        to_phases,
    ],
)
def test_transposed_convolutions(height, width, channels, features, ours):
    check(ours, reference_conv_transpose, *arrays(height, width, channels, features))


def on_repeated(images, kernel):
    return reference_conv(images.repeat(2, axis=1).repeat(2, axis=2), kernel, 1)


@pytest.mark.parametrize(("channels", "features"), CHANNELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_convolutions_of_repeated_pixels(height, width, channels, features):
    check(convolution.conv_on_repeated, on_repeated, *arrays(height, width, channels, features))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_convolutions_of_repeated_pixels_on_other_platforms(height, width):
    check(xla.conv_on_repeated, on_repeated, *arrays(height, width, 16, 8))


@pytest.mark.parametrize(("channels", "features"), CHANNELS)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 6), (28, 28)])
def test_convolutions_from_phases_to_phases(height, width, channels, features):
    check(on_phases, reference_conv, *arrays(height, width, channels, features))


@pytest.mark.parametrize(("channels", "features"), [(1, 16), (16, 1), (64, 32), (56, 60)])
def test_bfloat16(channels, features):
    images, kernel = arrays(8, 8, channels, features)
    for ours, reference in [
        (convolution.conv, reference_conv),
        (convolution.conv_transpose, reference_conv_transpose),
        (on_phases, reference_conv),
    ]:
        check(ours, reference, images, kernel, dtype=jnp.bfloat16, tolerance=0.02)


def test_layers_of_equal_shapes_share_what_was_traced():
    traced = []

    def counted(images, kernel):
        traced.append(images.shape)
        return reference_conv(images, kernel)

    conv = by_platform(counted, counted)
    images, kernel = arrays(8, 8, 4, 4)

    def thrice(conv, images, kernel):
        return conv(conv(conv(images, kernel), kernel), kernel).sum()

    found = jax.grad(functools.partial(thrice, conv), (0, 1))(images, kernel)
    # Once for each of two platforms, and once more for its gradient.
    assert len(traced) == 4
    wanted = jax.grad(functools.partial(thrice, reference_conv), (0, 1))(images, kernel)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_other_platforms_get_the_compilers_own_convolution():
    conv = jax.jit(functools.partial(convolution.conv, batch_last=True))
    traced = conv.trace(*arrays(8, 8, 16, 16))
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(("channels", "features"), CHANNELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_transposed_convolutions_of_other_platforms(height, width, channels, features):
    check(
        xla.conv_transpose,
        reference_conv_transpose,
        *arrays(height, width, channels, features),
    )


def test_a_transposed_convolutions_kernel_has_the_gradient_of_a_strided_ones():
    images, kernel = arrays(16, 16, 8, 4)
    gradient = jax.jit(jax.grad(lambda kernel: convolution.conv_transpose(images, kernel).sum()))
    program = gradient.trace(kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert "rhs_dilate = [2, 2]" in program
    assert "lhs_dilate = [2, 2]" not in program


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool(dtype):
    images = np.random.default_rng(0).random((2, 6, 10, 3)).astype(dtype)
    wanted, gradient = jax.vjp(lambda images: nn.max_pool(images, (2, 2), (2, 2)), images)
    result, our_gradient = jax.vjp(operations.max_pool, images)
    np.testing.assert_array_equal(result, wanted)
    weights = np.random.default_rng(1).normal(size=result.shape).astype(dtype)
    if dtype == jnp.float32:  # With fewer bits, the largest value of a block may be there twice.
        np.testing.assert_array_equal(*our_gradient(weights), *gradient(weights))


def test_equal_largest_values_share_the_gradient():
    _, gradient = jax.vjp(operations.max_pool, jnp.ones((1, 4, 4, 2)))
    weights = np.random.default_rng(0).random((1, 2, 2, 2), np.float32)
    wanted = weights.repeat(2, axis=1).repeat(2, axis=2) / 4
    np.testing.assert_allclose(*gradient(weights), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_tpus_merge_phases_by_products_that_are_exact(factor, dtype, monkeypatch):
    random = np.random.default_rng(factor)
    phases = jnp.asarray(random.normal(size=(2, 3, 5, 2 * factor**2)), dtype)
    cotangent = jnp.asarray(random.normal(size=(2, 3 * factor, 5 * factor, 2)), dtype)

    def merged_and_gradient():
        merged, gradient = jax.vjp(lambda p: merge_phases(p, factor), phases)
        return merged, *gradient(cotangent)

    def for_tpus(*args, tpu, default):
        return tpu(*args)

    expected = merged_and_gradient()
    np.testing.assert_array_equal(split_phases(expected[0], factor), phases)
    monkeypatch.setattr(lax, "platform_dependent", for_tpus)
    for found, wanted in zip(merged_and_gradient(), expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_the_gradient_of_max_pool_scatters_where_that_is_fast(platform, scatters):
    gradient = jax.jit(jax.grad(lambda images: operations.max_pool(images).sum()))
    lowered = gradient.trace(jnp.zeros((1, 4, 4, 1))).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count('"stablehlo.select_and_scatter"') == scatters


@pytest.mark.parametrize("batch_last", [True, False])
def test_between_layers_with_the_batch_last_nothing_is_turned_around(batch_last):
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, images):
            for _ in range(3):
                layer = layers.Conv(16, activation=nn.relu, batch_last=batch_last)
                images = layer(images)
            return images

    images = jnp.zeros((64, 12, 12, 16))
    params = Layers().init(jax.random.key(0), images)

    def loss(params, images):
        return jnp.sum(Layers().apply(params, images) ** 2)

    program = jax.jit(jax.grad(loss)).lower(params, images).compile().as_text()
    made_channels_last = re.findall(r"= f32\[64,12,12,16\]\S* (?!parameter)", program)
    assert bool(made_channels_last) != batch_last


@pytest.mark.parametrize(("channels", "features"), [(4, 5), (32, 40)])
def test_activations_and_biases_of_both_layouts(channels, features):
    images, kernel = arrays(6, 8, channels, features)
    bias = np.linspace(-0.5, 0.5, features, dtype=np.float32)
    wanted = nn.relu(reference_conv(images, kernel) + bias)
    for batch_last in (False, True):
        layer = layers.Conv(features, activation=nn.relu, batch_last=batch_last)
        result = layer.apply({"params": {"kernel": kernel, "bias": bias}}, images)
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "height", "convolutions"),
    [(32, 16, 6), (24, 16, 1), (96, 16, 6), (96, 8, 1)],
)
def test_many_channels_and_pixels_are_convolved_by_winograds_method(channels, height, convolutions):
    images, kernel = arrays(height, 8, channels, channels)
    # Not `cpu.conv` itself, as JAX keeps what it has traced.
    conv = jax.jit(lambda images, kernel: cpu.conv(images, kernel))
    text = conv.lower(images, kernel).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_images_of_any_size_are_convolved_as_large_ones():
    _, kernel = arrays(1, 1, 32, 32)
    sizes = export.symbolic_shape("b, h, w, 32")
    exported = export.export(jax.jit(cpu.conv))(
        jax.ShapeDtypeStruct(sizes, np.float32), jax.ShapeDtypeStruct(kernel.shape, np.float32)
    )
    assert exported.mlir_module().count("stablehlo.convolution") == 6


@pytest.mark.parametrize(
    "model",
    [
        NoiseReducer((4, 3)),
        ResolutionEnhancer((4, 3, 3), channels=1),
        SubpixelAutoencoder(),
        UNet((4, 6), channels=1),
        UNet((4, 6), channels=1, patch=2),
        Upscaler(width=4, blocks=1, channels=1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_gradients_in_shard_map_add_up_over_the_devices(model):
    params = random_params(model)
    images = np.random.default_rng(0).random((8, 16, 16, 1), np.float32)

    def loss(params, images):
        return (model.apply({"params": params}, images) ** 2).mean()

    divided = jax.shard_map(
        jax.grad(lambda *args: lax.pmean(loss(*args), "devices")),
        mesh=jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(PartitionSpec(), PartitionSpec("devices")),
        out_specs=PartitionSpec(),
    )
    jax.tree.map(
        lambda ours, whole: np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-6),
        jax.jit(divided)(params, images),
        jax.jit(jax.grad(loss))(params, images),
    )
