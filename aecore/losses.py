"""Losses: two `(B, H, W, C)` float arrays to `(B,)` float32, one value an image."""

import jax
import jax.numpy as jnp


def mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of each image, over its height, width and channels."""
    difference = outputs.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.mean(difference**2, axis=(1, 2, 3))
