"""Losses: two `(B, H, W, C)` float arrays to `(B,)` float32, one value an image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aecore import metrics

_CHARBONNIER_EPSILON = 1e-3
"""Differences that are small beside this count as their squares do."""

_PSNR_EPSILON = 1e-5
"""Below this, an MSE is good enough: images without noise would else count for everything."""

_MS_SSIM_SHARE = 0.84
"""Share of MS-SSIM in its mix with the absolute error, from Zhao et al."""


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
    """`0.84 (1 - MS-SSIM) + 0.16 MAE`; sides of at least 11 pixels.

    Zhao et al., "Loss functions for image restoration with neural networks", IEEE Transactions on
    Computational Imaging 3 (2017), without their Gaussian weights on the absolute error, and with
    as many scales as the images have room for (`metrics.ms_ssim`).
    """
    outputs, targets = outputs.astype(jnp.float32), targets.astype(jnp.float32)
    similarity = metrics.ms_ssim(outputs, targets)
    return _MS_SSIM_SHARE * (1 - similarity) + (1 - _MS_SSIM_SHARE) * mae(outputs, targets)


def negative_psnr(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """`10 log10(MSE + 1e-5)`: minus the PSNR in dB, which levels off towards 50 dB.

    An image counts by how much its error changes in proportion. Where images are degraded weakly
    and strongly, the weak ones so count as much as the strong ones, whose MSE is far larger.
    """
    return 10 * jnp.log10(mse(outputs, targets) + _PSNR_EPSILON)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    loss.__name__: loss for loss in (mse, mae, charbonnier, ms_ssim_l1, negative_psnr)
}


def _difference(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return outputs.astype(jnp.float32) - targets.astype(jnp.float32)


def _mean(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=(1, 2, 3))
