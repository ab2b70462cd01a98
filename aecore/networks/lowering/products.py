"""Convolutions of images with the *batch last*, `(C, H, W, B)`, by matrix products: for CPUs and
few channels.

A convolution is a sum over its nine taps: the image, shifted, times the tap's `(C, K)` matrix. If
fewer channels go in than come out, the shifted images are put side by side and multiplied at once;
otherwise the products with all taps are computed at once, then shifted and added. Shifting moves
runs of B numbers, and the pixels are the long side of every product.

`with_batch_last` transposes what goes in and what comes out. Between two such functions
the transpositions cancel, and the compiler drops them; therefore biases and activations are
computed with the batch last too.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aecore.networks.lowering import kernels


def with_batch_last(function: Callable) -> Callable:
    """A function of `(C, H, W, B)` images and further arguments, for `(B, H, W, C)` images."""

    def turned(images, *args):
        return function(images.transpose(3, 1, 2, 0), *args).transpose(3, 1, 2, 0)

    return turned


def conv(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(C, H, W, B)` to `(K, H, W, B)`."""
    return _product(images, kernel.reshape(9, *kernel.shape[2:]), kernels.ALL)


def conv_strided(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(C, 2 H, 2 W, B)` to `(K, H, W, B)`."""
    channels, height, width, batch = images.shape
    height, width = height // 2, width // 2
    parts = images.reshape(channels, height, 2, width, 2, batch)
    phases = parts.transpose(2, 4, 0, 1, 3, 5).reshape(4 * channels, height, width, batch)
    return _product(phases, kernels.strided(kernel), kernels.AFTER)


def conv_transpose(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(C, H, W, B)` to `(K, 2 H, 2 W, B)`."""
    phases = conv_transpose_to_phases(images, kernel)
    (_, height, width, batch), features = phases.shape, kernel.shape[3]
    parts = phases.reshape(2, 2, features, height, width, batch).transpose(2, 3, 0, 4, 1, 5)
    return parts.reshape(features, 2 * height, 2 * width, batch)


def conv_transpose_to_phases(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(C, H, W, B)` to `(4 K, H, W, B)`: the phases of a transposed convolution."""
    return _product(images, kernels.transposed(kernel), kernels.BEFORE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(images: jax.Array, kernel: jax.Array, taps: kernels.Taps) -> jax.Array:
    """The convolution with a `(T, C, K)` kernel, as one matrix product."""
    count, channels, features = kernel.shape
    if channels <= features:
        return _multiply(_shifted(images, taps), kernel)
    kernel = kernel.transpose(1, 0, 2).reshape(1, channels, count * features)
    products = jnp.split(_multiply(images, kernel), count)
    terms = (shift(product, tap) for product, tap in zip(products, taps, strict=True))
    return functools.reduce(jnp.add, terms)


def _product_forward(images, kernel, taps):
    return _product(images, kernel, taps), (images, kernel)


def _product_backward(taps, saved, cotangent):
    images, kernel = saved
    count, channels, features = kernel.shape
    opposite = tuple((-di, -dj) for di, dj in taps)
    images_cotangent = _product(cotangent, kernel.transpose(0, 2, 1), opposite)
    # A single product over all pixels of the batch.
    if channels <= features:
        kernel_cotangent = _dot_over_pixels(_shifted(images, taps), cotangent)
        return images_cotangent, kernel_cotangent.reshape(kernel.shape)
    kernel_cotangent = _dot_over_pixels(images, _shifted(cotangent, opposite))
    kernel_cotangent = kernel_cotangent.reshape(channels, count, features).transpose(1, 0, 2)
    return images_cotangent, kernel_cotangent


_product.defvjp(_product_forward, _product_backward)


def shift(images: jax.Array, tap: tuple[int, int]) -> jax.Array:
    """Moves pixel `(i + di, j + dj)` of `(., H, W, .)` images to `(i, j)`; zeros come in."""
    di, dj = tap
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, ((0, 0, 0), (-di, di, 0), (-dj, dj, 0), (0, 0, 0)))


def _shifted(images: jax.Array, taps: kernels.Taps) -> jax.Array:
    """The images shifted by each tap, side by side as channels."""
    height, width = images.shape[1:3]
    top, left = (max(0, *(-tap[i] for tap in taps)) for i in (0, 1))
    bottom, right = (max(0, *(tap[i] for tap in taps)) for i in (0, 1))
    padded = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
    return jnp.concatenate(
        [padded[:, top + di :, left + dj :][:, :height, :width] for di, dj in taps]
    )


def _multiply(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Images of `T C` channels times a `(T, C, K)` kernel."""
    matrix = kernel.transpose(2, 0, 1).reshape(kernel.shape[2], -1)
    return lax.dot_general(matrix, images, (((1,), (0,)), ((), ())))


def _dot_over_pixels(left: jax.Array, right: jax.Array) -> jax.Array:
    """Images of C and of K channels to the `(C, K)` sums over pixels of their products."""
    # To contract several axes, the compiler would first transpose both.
    left, right = (images.reshape(len(images), -1) for images in (left, right))
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())))


@jax.custom_vjp
def conv_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(4 C, H, W, B)` to `(4 K, H, W, B)`: each phase's products with all taps, shifted and added.

    Along each axis, output 2 i + q depends on pixels 2 i + q + n - 1, n = 0, 1, 2.
    """
    channels, features = kernel.shape[2:]
    matrix = kernel.transpose(0, 1, 3, 2).reshape(9 * features, channels)
    products = _multiply_phases(matrix, phases)
    products = products.reshape(2, 2, 3, 3, features, *phases.shape[1:])

    def term(p, q, n, m):
        (di, row), (dj, column) = divmod(p + n - 1, 2), divmod(q + m - 1, 2)
        return shift(products[row, column, n, m], (di, dj))

    return jnp.concatenate(
        [
            functools.reduce(jnp.add, (term(p, q, n, m) for n in range(3) for m in range(3)))
            for p in range(2)
            for q in range(2)
        ]
    )


def _conv_on_phases_forward(phases, kernel):
    return conv_on_phases(phases, kernel), (phases, kernel)


def _conv_on_phases_backward(saved, cotangent):
    phases, kernel = saved
    channels, features = kernel.shape[2:]
    size = phases.shape[1:]
    cotangent = cotangent.reshape(2, 2, features, *size)

    def cotangent_of_product(p, q, n, m):
        (di, row), (dj, column) = divmod(p - n + 1, 2), divmod(q - m + 1, 2)
        return shift(cotangent[row, column], (di, dj))

    products_cotangent = jnp.concatenate(
        [cotangent_of_product(*index) for index in np.ndindex(2, 2, 3, 3)]
    )
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, 9 * features)
    kernel_cotangent = lax.dot_general(
        products_cotangent.reshape(4, 9 * features, -1),
        phases.reshape(4, channels, -1),
        (((2,), (2,)), ((0,), (0,))),
    ).sum(0)
    return (
        _multiply_phases(matrix, products_cotangent),
        kernel_cotangent.reshape(3, 3, features, channels).transpose(0, 1, 3, 2),
    )


conv_on_phases.defvjp(_conv_on_phases_forward, _conv_on_phases_backward)


def _multiply_phases(matrix: jax.Array, phases: jax.Array) -> jax.Array:
    """`(K, C)` times each phase of `(4 C, H, W, B)`: `(4 K, H, W, B)`."""
    features, channels = matrix.shape
    size = phases.shape[1:]
    products = lax.dot_general(
        jnp.broadcast_to(matrix, (4, features, channels)),
        phases.reshape(4, channels, *size),
        (((2,), (1,)), ((0,), (0,))),
    )
    return products.reshape(4 * features, *size)
