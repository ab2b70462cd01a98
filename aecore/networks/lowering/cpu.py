"""The compiler's convolutions of `(B, H, W, C)` images for CPUs, with gradients that are as fast.

They are fast if they use all cores (`aecore.steps.cpu`) and have enough features, but the
compiler's gradients of them are not. The image's gradient is written as another convolution, and so
is the kernel's, with a window as large as the image, or as matrix products, if there is a stride.
`experiments/cpu_convolutions.py` compares them. With many channels and pixels, Winograd's method
(`winograd`) is faster.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from aecore.networks.lowering import kernels, winograd, xla
from aecore.networks.lowering.phases import moved_together, split_phases
from aecore.networks.lowering.products import shift


def conv(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, K)`."""
    return _convolve(images, kernel, (1, 1))


def conv_strided(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, 2 H, 2 W, C)` to `(B, H, W, K)`."""
    if min(kernel.shape[2:]) > _FEW:
        return _conv_strided(images, kernel)
    return _convolve(split_phases(images), kernels.as_square(kernels.strided(kernel)), (0, 0))


def conv_transpose(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`."""
    if min(kernel.shape[2:]) > _FEW:
        return _conv_transpose(images, kernel)
    phases: Any = _convolve(images, kernels.as_square(kernels.transposed(kernel)), (1, 1))
    return moved_together(phases)


@jax.custom_vjp
def _conv_strided(images: jax.Array, kernel: jax.Array) -> jax.Array:
    # From phases it would be 16/9 of the products: up to twice the time.
    return xla.conv_strided(images, kernel)


def _conv_strided_forward(images, kernel):
    return _conv_strided(images, kernel), (images, kernel)


def _conv_strided_backward(saved, cotangent):
    images, kernel = saved
    images_cotangent = _conv_transpose(cotangent, _opposite(kernel))
    return images_cotangent, _gradient_of_strided_kernel(images, cotangent)


_conv_strided.defvjp(_conv_strided_forward, _conv_strided_backward)


@jax.custom_vjp
def _conv_transpose(images: jax.Array, kernel: jax.Array) -> jax.Array:
    # Each phase has a convolution of its own taps, as in `kernels.transposed`. All phases by one
    # convolution would be 16/9 of the products: 1.1 to 1.3 times the time.
    def phase(rows, columns):
        taps = kernel[rows][:, columns]
        margins = tuple((side - 1, 0) for side in taps.shape[:2])
        return xla.convolve(images, taps, margins)

    even, odd = slice(0, 3, 2), slice(1, 2)
    phases = [phase(rows, columns) for rows in (even, odd) for columns in (even, odd)]
    return moved_together(jnp.concatenate(phases, 3))


def _conv_transpose_forward(images, kernel):
    return _conv_transpose(images, kernel), (images, kernel)


def _conv_transpose_backward(saved, cotangent):
    images, kernel = saved
    gradient_of_kernel = kernels.opposite(_gradient_of_strided_kernel(cotangent, images))
    return _conv_strided(cotangent, _opposite(kernel)), gradient_of_kernel


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def _gradient_of_strided_kernel(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """`(3, 3, C, K)`: for each tap, the pixels that it meets times the outputs' gradients."""
    channels, features = images.shape[3], cotangent.shape[3]
    outputs = cotangent.reshape(-1, features)
    met = (shift(images, tap)[:, ::2, ::2].reshape(-1, channels) for tap in np.ndindex(3, 3))
    return jnp.stack([pixels.T @ outputs for pixels in met]).reshape(3, 3, channels, features)


def _opposite(kernel: jax.Array) -> jax.Array:
    # Without the barrier the compiler would make it a reversed window, for which it has slow code.
    return lax.optimization_barrier(kernels.opposite(kernel))


@jax.custom_vjp
def conv_on_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: the convolution of the pixels, each repeated 2×2.

    To repeat them is faster than to put phases together; the gradient is that of the phases.
    """
    return conv(images.repeat(2, axis=1).repeat(2, axis=2), kernel)


def _conv_on_repeated_forward(images, kernel):
    return conv_on_repeated(images, kernel), (images, kernel)


def _conv_on_repeated_backward(saved, cotangent):
    return jax.vjp(_phases_of_repeated, *saved)[1](split_phases(cotangent))


conv_on_repeated.defvjp(_conv_on_repeated_forward, _conv_on_repeated_backward)


def _phases_of_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The phases of the convolution of an image whose pixels are repeated, by four of 2×2."""

    def halves(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        # Of an even output row, the first tap meets the pixel before.
        before = jnp.concatenate([first, middle + last], axis)
        return before, jnp.concatenate([first + middle, last], axis)

    phases = [
        jnp.asarray(_convolve(images, part, (1 - row, 1 - column)))
        for row, part_of_rows in enumerate(halves(kernel, 0))
        for column, part in enumerate(halves(part_of_rows, 1))
    ]
    return jnp.concatenate(phases, 3)


_FEW = 16
"""Features that are too few for the compiler's own convolution to be fast; with a stride, channels
too."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, before: tuple[int, int]) -> jax.Array:
    """The convolution with an `(n, n, C, K)` kernel that begins `before` pixels up and left."""
    side, _, channels, features = kernel.shape
    margins = tuple((first, side - 1 - first) for first in before)
    if side == 3 and before == (1, 1) and min(channels, features) >= winograd.ENOUGH_CHANNELS:
        pixels = math.prod(images.shape[:3])
        # Where sizes are symbolic, images may be large.
        if export.is_symbolic_dim(pixels) or pixels >= winograd.ENOUGH_PIXELS:
            return winograd.conv(images, kernel)
    if features > _FEW:
        return xla.convolve(images, kernel, margins)
    # So few columns of a matrix product leave registers empty. Three times as many don't: a row
    # convolution for each row of the kernel; their results are shifted and added.
    rows = kernel.transpose(1, 2, 0, 3).reshape(1, side, channels, side * features)
    parts = jnp.split(xla.convolve(images, rows, ((0, 0), margins[1])), side, axis=3)
    moved = (shift(part, (n - before[0], 0)) for n, part in enumerate(parts))
    return functools.reduce(jnp.add, moved)


def _convolve_forward(images, kernel, before):
    return _convolve(images, kernel, before), (images, kernel)


def _convolve_backward(before, saved, cotangent):
    images, kernel = saved
    after = tuple(len(kernel) - 1 - first for first in before)
    images_cotangent = _convolve(cotangent, _opposite(kernel), after)
    return images_cotangent, _gradient_of_kernel(images, cotangent, len(kernel), before)


_convolve.defvjp(_convolve_forward, _convolve_backward)


_ADJACENT = 16
"""Images whose same pixels should lie side by side, where a window is as large as an image: one
register of AVX-512."""


def _gradient_of_kernel(
    images: jax.Array, cotangent: jax.Array, side: int, before: tuple[int, int]
) -> jax.Array:
    """`(n, n, C, K)`: each output's gradient times the pixels around it, summed over outputs.

    If there are few channels, that is a convolution again: of the images, whose channels are its
    batch, with the gradients, whose window is as large as the images. Both have the batch as
    channels, along which the compiler's convolution is vectorized. So small batches are made
    larger: images are cut into strips of rows.
    """
    fewest = min(images.shape[3], cotangent.shape[3])
    if side == 3 and before == (1, 1) and fewest >= winograd.ENOUGH_FOR_GRADIENT:
        return winograd.gradient_of_kernel(images, cotangent)
    if images.shape[3] > cotangent.shape[3]:
        # Of what has the fewer channels, windows are cut out, each as often as there are taps.
        row, column = before
        after = side - 1 - row, side - 1 - column
        return kernels.opposite(_gradient_of_kernel(cotangent, images, side, after))
    batch, height, width, channels = images.shape
    count = 1
    while batch * count < _ADJACENT and height % (2 * count) == 0:
        count *= 2
    rows = height // count
    (top, left), (bottom, right) = before, (side - 1 - first for first in before)
    padded = jnp.pad(images, ((0, 0), (top, bottom), (0, 0), (0, 0)))
    strips = [padded[:, first : first + rows + side - 1] for first in range(0, height, rows)]
    windows = jnp.stack(strips, 4).transpose(3, 1, 2, 0, 4)
    windows = windows.reshape(channels, rows + side - 1, width, batch * count)
    kernel = cotangent.reshape(batch, count, rows, width, -1).transpose(2, 3, 0, 1, 4)
    kernel = kernel.reshape(rows, width, batch * count, -1)
    return xla.convolve(windows, kernel, ((0, 0), (left, right))).transpose(1, 2, 0, 3)
