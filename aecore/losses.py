"""Training losses: two `(B, H, W, C)` float arrays in, `(B,)` float32 out, one value per image.

All raise ImageError unless both are NumPy's or JAX's arrays of floats, and have that same shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aecore import metrics

_CHARBONNIER_EPSILON = 1e-3
"""Differences much smaller than this count by their squares."""

_LOG_EPSILON = 2e-3
"""With it, one denoiser of Fashion-MNIST for all σ from 0.1 to 0.5 falls behind denoisers for a
single σ by about as much at each σ (`experiments/fashion_mnist_blind.py`)."""

_MS_SSIM_SHARE = 0.84
"""Weight of MS-SSIM in its mix with the absolute error, from Zhao et al."""


def mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of each image, over its height, width and channels."""
    return _mean(_difference(outputs, targets) ** 2)


def mae(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean absolute error of each image."""
    return _mean(jnp.abs(_difference(outputs, targets)))


def charbonnier(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of `sqrt(difference² + ε²)`, ε = 1e-3: an absolute error that is smooth at 0.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed
    imaging", ICIP 1994.
    """
    squares = _difference(outputs, targets) ** 2
    return _mean(jnp.sqrt(squares + _CHARBONNIER_EPSILON**2))


def ms_ssim_l1(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """`0.84 (1 - MS-SSIM) + 0.16 MAE`, for sides of at least 11 pixels.

    Zhao et al., "Loss functions for image restoration with neural networks", IEEE Transactions on
    Computational Imaging 3 (2017), without their Gaussian weights on the absolute error, and with
    as many scales as fit into the images (`metrics.ms_ssim`).
    """
    metrics.check_shapes(outputs, targets)
    outputs, targets = outputs.astype(jnp.float32), targets.astype(jnp.float32)
    similarity = metrics.ms_ssim(outputs, targets)
    return _MS_SSIM_SHARE * (1 - similarity) + (1 - _MS_SSIM_SHARE) * mae(outputs, targets)


def log_mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """`log(MSE + ε)`, ε = 0.002.

    For batches that mix weakly and strongly degraded images. With MSE, the strongly degraded ones
    would count for nearly everything, as their errors are far larger. Here an image counts by how
    much its error changes in proportion, as for PSNR, down to errors of about ε.
    """
    return jnp.log(mse(outputs, targets) + _LOG_EPSILON)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    loss.__name__: loss for loss in (mse, mae, charbonnier, ms_ssim_l1, log_mse)
}


def _difference(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    metrics.check_shapes(outputs, targets)
    return outputs.astype(jnp.float32) - targets.astype(jnp.float32)


def _mean(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=(1, 2, 3))
