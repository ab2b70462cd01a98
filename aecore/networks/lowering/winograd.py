"""Convolutions by Winograd's method, for CPUs and many channels.

The height of `(B, H, W, C)` images is cut into tiles of four rows, and rows are transformed so that
half as many products do the work: F(4, 3), in one dimension (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from aecore.networks.lowering import kernels, xla

ENOUGH_CHANNELS = 32
"""Channels and features from which on fewer products outweigh their transformations: on 2 cores
with AVX2 they are as fast with 24, 1.1 times with 32, and 1.2 to 1.5 times with 48 or more. With
AVX-512 whole networks are as fast with 32 and 1.1 times with 48, layers of 64 1.1 to 1.6 times."""

ENOUGH_PIXELS = 256
"""Pixels of all images together from which on that outweighs the transformation of the kernel too:
a single image of 10×10 pixels and 96 channels takes 1.4 times as long so, and four of them the
same."""

ENOUGH_FOR_GRADIENT = 24
"""Channels and features from which on the kernel's gradient is faster so: on 2 cores 1.2 to 1.5
times with 32, 1.2 to 2.1 times with more, 0.8 times with 12."""

# Bᵀ, G and Aᵀ of F(4, 3), as in that paper.
_FOR_IMAGES = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FOR_KERNELS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_BACK = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def conv(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, K)`, by tiles of four rows, each from six.

    Six convolutions with 1×3 kernels take the place of the twelve that four rows otherwise need.
    """
    batch, height, width, _ = images.shape
    count = -(-height // 4)
    rows = _combined(_FOR_IMAGES, _six_rows(images, count))
    taps = _combined(_FOR_KERNELS, list(kernel))
    products = [xla.convolve(part, row[None]) for part, row in zip(rows, taps, strict=True)]
    outputs = jnp.stack(_combined(_BACK, products), 2)
    return outputs.reshape(batch, 4 * count, width, kernel.shape[3])[:, :height]


def gradient_of_kernel(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """`(3, 3, C, K)`: the gradient of `conv`'s kernel, from that of its result.

    Each 1×3 kernel's gradient is a matrix product over all pixels; of what has the fewer channels,
    copies shifted by columns are side by side.
    """
    (_, height, width, channels), features = images.shape, cotangent.shape[3]
    if channels < features:
        return kernels.opposite(gradient_of_kernel(cotangent, images))
    count = -(-height // 4)
    rows = _combined(_FOR_IMAGES, _six_rows(images, count))
    padded = jnp.pad(cotangent, ((0, 0), (0, 4 * count - height), (1, 1), (0, 0)))
    four_rows = [padded[:, n::4] for n in range(4)]
    products = []
    for part, row in zip(rows, _combined(_transposed(_BACK), four_rows), strict=True):
        shifted = jnp.concatenate([row[:, :, n : n + width] for n in (2, 1, 0)], 3)
        product = part.reshape(-1, channels).T @ shifted.reshape(-1, 3 * features)
        products.append(product.reshape(channels, 3, features).transpose(1, 0, 2))
    return jnp.stack(_combined(_transposed(_FOR_KERNELS), products))


def _six_rows(images: jax.Array, count: int) -> list[jax.Array]:
    """The rows that each of `count` tiles of four output rows depends on: six arrays."""
    height = 4 * count
    # Sizes may be symbolic, as where a function is exported for images of any size.
    whole = jnp.pad(images, ((0, 0), (0, height - images.shape[1]), (0, 0), (0, 0)))
    zero = jnp.zeros((), images.dtype)

    def row(n):
        # Each is moved by itself, so that zeros aren't added to a copy of the whole images, and cut
        # after its last row, so that rows 1 to 4 need none. With zeros on both sides, of which
        # those outside are cut off again, all of `conv` takes 1.3 to 1.7 times as long.
        moved = lax.pad(whole, zero, ((0, 0, 0), (1 - n, n - 4, 0), (0, 0, 0), (0, 0, 0)))
        return lax.slice_in_dim(moved, 0, height - 3, 4, 1)

    return [row(n) for n in range(6)]


def _transposed(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*matrix, strict=True))


def _combined(matrix: tuple[tuple[float, ...], ...], arrays: list[jax.Array]) -> list[jax.Array]:
    """A matrix times a vector of arrays."""

    # Not jnp's operators, which are traced as functions; there are hundreds of these here.
    def term(factor, array):
        return array if factor == 1 else lax.mul(lax.full_like(array, factor), array)

    return [
        functools.reduce(
            lax.add,
            (term(factor, array) for factor, array in zip(row, arrays, strict=True) if factor),
        )
        for row in matrix
    ]
