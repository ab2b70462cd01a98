"""The recipes' networks against Keras, and what the others promise."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import random_params

from aecore.errors import ConfigError
from aecore.models import (
    LinearAutoencoder,
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
)
from aecore.networks import models

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


@pytest.mark.parametrize("fields", [{"features": ()}, {"features": (4, 0)}, {"channels": -1}])
@pytest.mark.parametrize("model", [NoiseReducer, ResolutionEnhancer])
def test_impossible_networks_are_refused(model, fields):
    with pytest.raises(ConfigError, match="all numbers at least 1"):
        model(**fields)


OTHERS = [
    SubpixelAutoencoder(),
    SubpixelAutoencoder((8, 6, 4), channels=3, residual=True),
    UNet((8,)),
    UNet((6, 8, 10), blocks=2),
    UNet((6, 8), channels=3, residual=False, norm="group"),
    UNet((4, 6, 8), channels=3, patch=2),
    LinearAutoencoder(components=5, patch=4, channels=3),
]


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_encoding_and_decoding_is_the_network(model):
    shape = (2, 3 * model.stride, 2 * model.stride, model.channels)
    images = RANDOM.random(shape, np.float32)
    params = random_params(model)
    outputs = apply(model, params, images)
    assert outputs.shape == images.shape
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


@pytest.mark.parametrize("residual", [True, False])
def test_without_parameters_a_residual_network_is_the_identity(residual):
    for model in (UNet((4, 6), residual=residual), SubpixelAutoencoder((4,), residual=residual)):
        images = RANDOM.random((1, 8, 8, 1), np.float32)
        params = jax.tree.map(np.zeros_like, random_params(model))
        outputs = apply(model, params, images)
        np.testing.assert_allclose(outputs, images if residual else 0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(norm="batch"), "norm 'batch'; use none or group"),
        (lambda: UNet(patch=3), "patch 3; use 1 or 2"),
        (lambda: UNet(blocks=0), "0 blocks; use 1 or more"),
        (lambda: UNet(features=(8, 0)), "all numbers at least 1"),
        (lambda: SubpixelAutoencoder(features=()), "all numbers at least 1"),
        (lambda: LinearAutoencoder(components=0), "numbers of at least 1"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_relu_of_the_networks_is_flaxs():
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 1e-30, 2.0, np.inf], np.float32)
    (result, gradient), (wanted, wanted_gradient) = (
        jax.vjp(function, values) for function in (models._relu, nn.relu)
    )
    np.testing.assert_array_equal(result, wanted)
    np.testing.assert_array_equal(*gradient(values), *wanted_gradient(values))
    program = str(jax.make_jaxpr(jax.grad(lambda values: models._relu(values).sum()))(values))
    assert " eq " in program
    assert " gt " not in program
