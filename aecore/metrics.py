"""Metrics: two `(B, H, W, C)` float32 arrays in [0, 1] to `(B,)` float32, one value an image."""

import dm_pix
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
