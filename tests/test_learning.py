"""Untrained networks start well, and training them makes progress from the first steps on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aecore import losses
from aecore.models import (
    REGISTRY,
    LinearAutoencoder,
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
    Upscaler,
)

STEPS, BATCH, SIDE = 80, 6, 16
SEEDS = 3
RATES = (3e-4, 1e-3)


def photographs(count, side, channels):
    """Smooth random fields, cut by an edge into two parts of different brightness."""
    random = np.random.default_rng(0)
    place = np.arange(side) / side
    images = np.empty((count, side, side, channels), np.float32)
    for image in images:
        angle, shift = random.uniform(0, np.pi), random.uniform(0.3, 0.7)
        beyond = np.add.outer(np.sin(angle) * place, np.cos(angle) * place) > shift
        for channel in range(channels):
            waves = random.normal(size=(3, 3)) / 5
            rows = np.cos(np.pi * np.outer(np.arange(3), place))
            field = rows.T @ waves @ rows + random.uniform(0.3, 0.7)
            image[..., channel] = np.clip(field + beyond * random.uniform(-0.4, 0.4), 0, 1)
    return images


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4, 5))
def curves(model, loss, originals, seeds=SEEDS, rates=RATES, steps=STEPS):
    """The loss of each step, and that of its batch as it was given, enlarged by interpolation.

    Both are `(seeds, rates, steps)`. Each step sees the same images with other noise.
    """
    optimizer = optax.inject_hyperparams(optax.adam)(1e-3)
    scale = model.scale
    batch, side = originals.shape[:2]

    def train(seed_and_rate):
        seed, rate = seed_and_rate
        key = jax.random.key(seed)
        params = model.init(key, originals[:1, ::scale, ::scale])["params"]
        state = optimizer.init(params)
        state.hyperparams["learning_rate"] = rate

        def step(carry, number):
            params, state = carry
            level, noise = jax.random.split(jax.random.fold_in(key, number))
            small = originals.reshape(batch, side // scale, scale, side // scale, scale, -1).mean(
                (2, 4)
            )
            level = jax.random.uniform(level, (batch, 1, 1, 1), minval=0.05, maxval=0.2)
            given = jnp.clip(small + level * jax.random.normal(noise, small.shape), 0, 1)

            def mean_loss(params):
                return losses.LOSSES[loss](model.apply({"params": params}, given), originals).mean()

            value, gradient = jax.value_and_grad(mean_loss)(params)
            change, state = optimizer.update(gradient, state)
            plain = jax.image.resize(given, originals.shape, "bicubic")
            start = losses.LOSSES[loss](plain, originals).mean()
            return (optax.apply_updates(params, change), state), (value, start)

        return jax.lax.scan(step, (params, state), jnp.arange(steps))[1]

    pairs = jnp.meshgrid(jnp.arange(seeds), jnp.asarray(rates, jnp.float32), indexing="ij")
    found = jax.lax.map(train, tuple(values.ravel() for values in pairs))
    return tuple(values.reshape(seeds, len(rates), steps) for values in found)


RESIDUAL = [
    (SubpixelAutoencoder((24, 24), residual=True), "mae"),
    (UNet((8, 8)), "mse"),
    (UNet((16, 16), blocks=2, patch=2), "mae"),
    (UNet((8, 8), norm="group"), "mae"),
    (Upscaler(16, 2, scale=1, channels=1), "mse"),
    (Upscaler(16, 1, scale=2, channels=1), "mae"),
]
OTHERS = [
    (NoiseReducer((8, 8)), "mse"),
    (ResolutionEnhancer((8, 8), channels=1), "mae"),
    (SubpixelAutoencoder((8, 8)), "mae"),
    (UNet((8, 8), residual=False), "mse"),
    (LinearAutoencoder(components=8, patch=4), "mse"),
]


def test_all_registered_networks_are_trained_here():
    assert {type(model) for model, _ in RESIDUAL + OTHERS} == {
        cls for cls in REGISTRY.values() if cls.__module__.startswith("aecore.")
    }


@pytest.mark.parametrize(("model", "loss"), RESIDUAL, ids=repr)
def test_residual_networks_improve_on_what_they_are_given(model, loss):
    trained, start = curves(model, loss, photographs(BATCH, SIDE * model.scale, model.channels))
    np.testing.assert_allclose(trained[..., 0], start[..., 0], rtol=1e-4)
    ratios = trained[..., -10:].mean(-1) / start[..., -10:].mean(-1)
    assert (ratios[:, 0] < 0.95).all()
    assert (ratios[:, 1] < 0.85).all()


def test_a_unet_for_photographs_learns():
    """With a ReLU before its last layer it does not: that layer's inputs are soon all negative."""
    model = UNet((32, 48, 64), blocks=2, channels=3, patch=2)
    trained, start = curves(model, "mae", photographs(4, 32, 3), 1, (1e-3,), 100)
    assert trained[..., -10:].mean() < 0.85 * start[..., -10:].mean()


@pytest.mark.parametrize(("model", "loss"), OTHERS, ids=repr)
def test_the_loss_of_other_networks_falls(model, loss):
    trained, _ = curves(model, loss, photographs(BATCH, SIDE, model.channels))
    ratios = trained[..., -10:].mean(-1) / trained[..., :10].mean(-1)
    assert (ratios < jnp.array([1, 0.8])).all()
