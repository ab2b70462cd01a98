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
)

STEPS, BATCH, SIDE = 60, 4, 24
SEEDS = 3
RATES = np.array([3e-4, 1e-3], np.float32)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def curves(model, loss, originals):
    """Losses of each step, and of doing nothing, for all seeds and rates: `(2, seeds, rates, n)`."""
    optimizer = optax.inject_hyperparams(optax.adam)(1e-3)

    def train(seed, rate):
        key = jax.random.key(seed)
        params = model.init(key, originals[:1])["params"]
        state = optimizer.init(params)
        state.hyperparams["learning_rate"] = rate

        def step(carry, number):
            params, state = carry
            choice, level, noise = jax.random.split(jax.random.fold_in(key, number), 3)
            wanted = jax.random.choice(choice, originals, (BATCH,))
            level = jax.random.uniform(level, (BATCH, 1, 1, 1), maxval=0.2)
            given = jnp.clip(wanted + level * jax.random.normal(noise, wanted.shape), 0, 1)

            def mean_loss(params):
                return losses.LOSSES[loss](model.apply({"params": params}, given), wanted).mean()

            value, gradient = jax.value_and_grad(mean_loss)(params)
            change, state = optimizer.update(gradient, state)
            identity = losses.LOSSES[loss](given, wanted).mean()
            return (optax.apply_updates(params, change), state), (value, identity)

        return jax.lax.scan(step, (params, state), jnp.arange(STEPS))[1]

    over_rates = jax.vmap(train, (None, 0))
    return jax.vmap(over_rates, (0, None))(jnp.arange(SEEDS), jnp.asarray(RATES))


RESIDUAL = [
    (SubpixelAutoencoder((8, 8), residual=True), "mse"),
    (SubpixelAutoencoder((8, 8, 8), channels=3, residual=True), "mae"),
    (UNet((8, 8)), "mse"),
    (UNet((8, 8), blocks=2, channels=3, patch=2), "mae"),
    (UNet((8, 8), blocks=2, norm="group"), "mae"),
]
OTHERS = [
    (NoiseReducer((8, 8)), "mse"),
    (ResolutionEnhancer((8, 8)), "mae"),
    (SubpixelAutoencoder((8, 8)), "mae"),
    (UNet((8, 8), residual=False), "mse"),
    (LinearAutoencoder(components=8, patch=4), "mse"),
]


def test_all_registered_networks_are_trained_here():
    assert {type(model) for model, _ in RESIDUAL + OTHERS} == set(REGISTRY.values())


@pytest.mark.parametrize(("model", "loss"), RESIDUAL + OTHERS, ids=repr)
def test_progress(model, loss):
    trained, identity = curves(model, loss, photographs(16, SIDE, model.channels))
    print(type(model).__name__, loss)
    print(np.round(np.asarray(trained[..., -10:].mean(-1) / identity[..., -10:].mean(-1)), 3))
    print(np.round(np.asarray(trained[..., -10:].mean(-1) / trained[..., :3].mean(-1)), 3), trained[..., 0].mean(), identity.mean())
