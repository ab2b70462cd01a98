"""Metrics: two `(B, H, W, C)` float32 arrays in [0, 1] to `(B,)` float32, one value an image."""

import dm_pix
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels, and so the smallest side that an image may have."""


def psnr(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, `-10 log10(MSE)` for a data range of 1, at most 100.

    The bound keeps one image without any error from making the mean over images infinite.
    """
    return jnp.minimum(dm_pix.psnr(outputs, targets), 100.0)


def ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity, Gaussian window of σ = 1.5 and 11 pixels, data range 1.

    Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13 (2004), with K1 = 0.01, K2 = 0.03, averaged over the
    pixels whose window lies inside the image, and over channels.
    """
    return dm_pix.ssim(outputs, targets, filter_fn=_gaussian_filter)


# Weights of the scales, finest first, from Wang, Simoncelli and Bovik.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity over several scales, in [0, 1]; differentiable.

    Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment",
    Asilomar 2003: contrast and structure at each scale, luminance at the coarsest alone, each scale
    half the size of the one before. Of the five scales, those are used at which a side has at
    least 11 pixels, with weights that add up to 1.
    """
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
        # Anticorrelated images would have a root of a negative number. The bound lies above 0,
        # where the root's slope is finite.
        product *= jnp.maximum(jnp.mean(values, axis=(1, 2)), 1e-4) ** weight
    return jnp.mean(product, axis=1)  # Over channels.


def _ssim_terms(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM's two factors at each pixel: luminance, and contrast with structure."""
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _gaussian_filter(a), _gaussian_filter(b)
    variances = _gaussian_filter(a**2 + b**2) - mean_a**2 - mean_b**2
    covariance = _gaussian_filter(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _gaussian_filter(images: jax.Array) -> jax.Array:
    """SSIM's window means as two matrix products, many times faster than dm_pix's convolutions."""
    for axis in (1, 2):
        matrix = _window_matrix(images.shape[axis])
        images = jnp.moveaxis(
            jnp.tensordot(matrix, images, axes=(1, axis), precision=jax.lax.Precision.HIGHEST),
            0,
            axis,
        )
    return images


def _window_matrix(size: int) -> np.ndarray:
    """`(size - 10, size)`: each row holds the window's weights, one place further on."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    matrix = np.zeros((size - SSIM_WINDOW + 1, size), np.float32)
    for row, weights in enumerate(matrix):
        weights[row : row + SSIM_WINDOW] = window / window.sum()
    return matrix
