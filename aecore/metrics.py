"""How alike images are: two `(B, H, W, C)` float32 arrays in [0, 1] to `(B,)`, a value an image.

All raise ImageError unless both are NumPy's or JAX's arrays of floats, and have that same shape.
`luma` prepares arrays for them. dm_pix is imported where it is needed, as it takes a tenth of a
second, and restoring needs no scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aecore.errors import ImageError

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels; images must not be smaller."""

_WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_WINDOW /= _WINDOW.sum()

_MOST_FOR_MATRIX = 256
"""Sides up to which one matrix product, whose cost grows with their square, filters fastest."""

_BLOCK = 128
"""Rows or columns of the result that a product gives where sides are longer.

On 2 CPU cores, SSIM of two pictures of 1024x1024 takes 0.27 s so, and 1.5 s as a sum of eleven
pictures, each moved by a pixel."""


def _check_floats(name: str, array: Any) -> None:
    """Raises ImageError unless it is an array of floats: squares of uint8 would wrap around."""
    is_array = isinstance(array, jax.Array | np.ndarray)
    if not is_array or not jnp.issubdtype(array.dtype, jnp.floating):
        what = f"of dtype {array.dtype}" if is_array else f"of type {type(array).__name__}"
        raise ImageError(
            f"{name} {what} are no array of floats; pass one of NumPy or JAX, with values in [0, 1]"
        )


def check_shapes(outputs: jax.Array, targets: jax.Array) -> None:
    """Raises ImageError unless two arrays have floats and the same shape `(B, H, W, C)`.

    Others might be broadcast against each other, and give a number that says nothing.
    """
    _check_floats("outputs", outputs)
    _check_floats("targets", targets)
    shapes = jnp.shape(outputs), jnp.shape(targets)
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        raise ImageError(
            f"outputs of shape {shapes[0]} can't be compared with targets of shape {shapes[1]}; "
            "both must have the same shape (images, height, width, channels)"
        )


def _check_window(outputs: jax.Array, targets: jax.Array) -> None:
    """Raises ImageError too if SSIM's window doesn't fit into the images."""
    check_shapes(outputs, targets)
    height, width = jnp.shape(outputs)[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ImageError(
            f"structural similarity of images of {height}x{width} is not defined; "
            f"both sides must have at least {SSIM_WINDOW} pixels"
        )


def psnr(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, `-10 log10(MSE)` for a data range of 1, at most 100.

    With this bound, the mean over images stays finite if one of them has no error at all.
    """
    import dm_pix

    check_shapes(outputs, targets)
    return jnp.minimum(dm_pix.psnr(outputs, targets), 100.0)


def ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity (SSIM), at most 1, with a Gaussian window of σ = 1.5 and 11 pixels.

    Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13 (2004), with K1 = 0.01, K2 = 0.03 and data range 1,
    averaged over the pixels whose window lies inside the image, and over channels.
    """
    return _ssim(outputs, targets)


def mse_within(outputs: jax.Array, targets: jax.Array, sizes: jax.Array) -> jax.Array:
    """Mean squared error over each image's first `sizes[i]` rows and columns, `(B, 2)` integers.

    An image of size 0 has an error of 0.
    """
    check_shapes(outputs, targets)
    return _mean_within((outputs - targets) ** 2, sizes)


def psnr_within(outputs: jax.Array, targets: jax.Array, sizes: jax.Array) -> jax.Array:
    """`psnr` of each image's first `sizes[i]` rows and columns."""
    return jnp.minimum(-10 * jnp.log10(mse_within(outputs, targets, sizes)), 100.0)


def ssim_within(outputs: jax.Array, targets: jax.Array, sizes: jax.Array) -> jax.Array:
    """`ssim` of each image's first `sizes[i]` rows and columns."""
    values = _ssim(outputs, targets, return_map=True)
    return _mean_within(values, jnp.asarray(sizes) - (SSIM_WINDOW - 1))


def _ssim(outputs: jax.Array, targets: jax.Array, return_map: bool = False) -> jax.Array:
    """`(B,)`; with `return_map`, `(B, H - 10, W - 10, C)`: a value for each place of the window."""
    import dm_pix

    _check_window(outputs, targets)
    # dm_pix declares the filter on chex's arrays, a union that includes JAX's.
    filter_fn: Any = _gaussian_filter
    found = dm_pix.ssim(outputs, targets, filter_fn=filter_fn, return_map=return_map)
    return jnp.asarray(found)


def _mean_within(values: jax.Array, sizes: jax.Array) -> jax.Array:
    """The mean over channels and each image's first `sizes[i]` rows and columns."""
    sizes = jnp.asarray(sizes)
    if sizes.shape != (len(values), 2):
        raise ImageError(
            f"sizes of shape {sizes.shape} don't fit {len(values)} images; pass rows and columns "
            "of each, (images, 2)"
        )
    rows, columns = (jnp.arange(side) for side in values.shape[1:3])
    counts = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
    # Row by row: a sum over millions of values at once would lose digits.
    total = jnp.where(counts[..., None], values, 0).mean(axis=3).sum(axis=2).sum(axis=1)
    return total / jnp.maximum(counts.sum(axis=(1, 2)), 1)


def luma(images: jax.Array) -> jax.Array:
    """`(..., 3)` RGB to `(..., 1)` luma, of [16/255, 235/255], as ITU-R BT.601 defines it.

    Papers on super-resolution give their scores on it, as MATLAB's `rgb2ycbcr` computes it. Raises
    ImageError unless the array has floats and three channels.
    """
    _check_floats("images", images)
    if images.shape[-1:] != (3,):
        raise ImageError(f"images of shape {images.shape} have no luma; pass RGB, (..., 3)")
    weights = np.array([65.481, 128.553, 24.966], np.float32) / 255
    product = jnp.tensordot(images, weights, axes=1, precision=jax.lax.Precision.HIGHEST)
    return product[..., None] + 16 / 255


_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's scales, finest first, from Wang, Simoncelli and Bovik."""


def ms_ssim(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Structural similarity over several scales (MS-SSIM), in [0, 1]; differentiable.

    Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment",
    Asilomar 2003: contrast and structure at each scale, luminance only at the coarsest, each scale
    half the size of the one before. Of the five scales, those at which both sides have at least 11
    pixels are used, with weights that add up to 1.
    """
    _check_window(outputs, targets)
    count = 1
    while count < len(_SCALES) and min(outputs.shape[1:3]) >> count >= SSIM_WINDOW:
        count += 1
    weights = np.array(_SCALES[:count]) / sum(_SCALES[:count])
    product = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            outputs, targets = (_halved(x) for x in (outputs, targets))
        luminance, contrast = _ssim_terms(outputs, targets)
        values = contrast * luminance if scale == count - 1 else contrast
        # Anticorrelated images have negative values, of which there is no root. The bound isn't 0,
        # where the root's slope is infinite.
        product *= jnp.maximum(jnp.mean(values, axis=(1, 2)), 1e-4) ** weight
    return jnp.mean(product, axis=1)  # Over channels.


def _ssim_terms(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM's two factors at each pixel: luminance, and contrast times structure."""
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _gaussian_filter(a), _gaussian_filter(b)
    variances = _gaussian_filter(a**2 + b**2) - mean_a**2 - mean_b**2
    covariance = _gaussian_filter(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _gaussian_filter(images: jax.Array) -> jax.Array:
    """SSIM's window means, as matrix products: much faster than dm_pix's convolutions."""
    for axis in (1, 2):
        is_short = images.shape[axis] <= _MOST_FOR_MATRIX
        means = _window_means if is_short else _window_means_in_blocks
        images = means(images, axis)
    return images


def _window_means(images: jax.Array, axis: int) -> jax.Array:
    """The window's means along an axis, which becomes 10 shorter."""
    matrix, highest = _window_matrix(images.shape[axis]), jax.lax.Precision.HIGHEST
    product = jnp.tensordot(matrix, images, axes=(1, axis), precision=highest)
    return jnp.moveaxis(product, 0, axis)


def _window_means_in_blocks(images: jax.Array, axis: int) -> jax.Array:
    """The same, `_BLOCK` places of the result at a time."""
    count = images.shape[axis] - SSIM_WINDOW + 1
    firsts = range(0, count, _BLOCK)
    margins = [(0, 0)] * images.ndim
    margins[axis] = (0, -count % _BLOCK)
    padded = jnp.pad(images, margins)
    length = _BLOCK + SSIM_WINDOW - 1
    blocks = [jax.lax.slice_in_dim(padded, n, n + length, axis=axis) for n in firsts]
    means = _window_means(jnp.stack(blocks, axis), axis + 1)
    whole = (*images.shape[:axis], len(firsts) * _BLOCK, *images.shape[axis + 1 :])
    return jax.lax.slice_in_dim(means.reshape(whole), 0, count, axis=axis)


def _window_matrix(size: int) -> np.ndarray:
    """`(size - 10, size)`: each row holds the window's weights, one place further to the right."""
    matrix = np.zeros((size - SSIM_WINDOW + 1, size), np.float32)
    for row, weights in enumerate(matrix):
        weights[row : row + SSIM_WINDOW] = _WINDOW
    return matrix


def _halved(images: jax.Array) -> jax.Array:
    """Means of blocks of 2×2 pixels; an odd last row or column is left out."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, window, window, "VALID") / 4
