"""Metrics: two `(B, H, W, C)` float32 arrays in [0, 1] to `(B,)` float32, one value per image."""

from typing import Any

import dm_pix
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels, and so the smallest side of an image."""


def check_shapes(outputs: jax.Array, targets: jax.Array) -> None:
    """Raises ValueError for arrays that would be compared by broadcasting."""
    if outputs.shape != targets.shape or len(outputs.shape) != 4:
        raise ValueError(
            f"shapes {outputs.shape} and {targets.shape} can't be compared; "
            "use two arrays (B, H, W, C) of the same shape"
        )


def psnr(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, `-10 log10(MSE)` for a data range of 1, at most 100.

    The bound keeps a single perfect image from making the mean over images infinite.
    """
    check_shapes(outputs, targets)
    return jnp.minimum(dm_pix.psnr(outputs, targets), 100.0)


def ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity, Gaussian window of σ = 1.5 and 11 pixels, data range 1.

    Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13 (2004), with K1 = 0.01, K2 = 0.03, averaged over the
    pixels whose window lies inside the image, and over channels.
    """
    check_shapes(outputs, targets)
    return jnp.asarray(dm_pix.ssim(outputs, targets, filter_fn=_gaussian_filter))


# Weights of the scales, finest first, from Wang, Simoncelli and Bovik.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity over several scales, in [0, 1]; differentiable.

    Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment",
    Asilomar 2003: contrast and structure at each scale, luminance at the coarsest alone, each scale
    half the size of the one before. Only scales with sides of at least 11 pixels are used; their
    weights are divided by their sum.
    """
    check_shapes(outputs, targets)
    count = 1
    while count < len(_SCALES) and min(outputs.shape[1:3]) >> count >= SSIM_WINDOW:
        count += 1
    weights = np.array(_SCALES[:count]) / sum(_SCALES[:count])
    product = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            outputs, targets = (nn.avg_pool(x, (2, 2), (2, 2)) for x in (outputs, targets))
        luminance, contrast = _ssim_terms(outputs, targets)
        values = contrast * luminance if scale == count - 1 else contrast
        # Anticorrelated images give negative values, which have no real root; above 0, the
        # root also has a finite slope.
        product *= jnp.maximum(jnp.mean(values, axis=(1, 2)), 1e-4) ** weight
    return jnp.mean(product, axis=1)  # Over channels.


def _ssim_terms(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two factors of SSIM at each pixel: luminance, and contrast times structure."""
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _gaussian_filter(a), _gaussian_filter(b)
    variances = _gaussian_filter(a**2 + b**2) - mean_a**2 - mean_b**2
    covariance = _gaussian_filter(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _gaussian_filter(a: Any) -> jax.Array:
    """Means over SSIM's window as two matrix products, much faster than dm_pix's convolutions."""
    for axis in (1, 2):
        matrix = _window_matrix(a.shape[axis])
        means = jnp.tensordot(matrix, a, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
        a = jnp.moveaxis(means, 0, axis)
    return a


def _window_matrix(size: int) -> np.ndarray:
    """`(size - 10, size)`: each row holds the window's weights, shifted by one place."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    matrix = np.zeros((size - SSIM_WINDOW + 1, size), np.float32)
    for row, weights in enumerate(matrix):
        weights[row : row + SSIM_WINDOW] = window / window.sum()
    return matrix
