"""How a convolution is lowered on each platform, where the compiler's own way is slow.

All functions take `(B, H, W, C)` images and `(3, 3, C, K)` kernels of one float dtype, pad to keep
the size ("same", as XLA and Keras do), and agree with `jax.lax`'s convolutions but for rounding.
XLA's CPU backend has slow code for the gradients of small convolutions; there, all are written as
matrix products:

- a convolution is the sum over its taps of the image, shifted, times the tap's `(C, K)` matrix.
  With fewer channels going in than coming out, the shifted images are put side by side and
  multiplied at once; else the products with all taps are computed at once, shifted and added;
- with many channels, 4×4 tiles are transformed so that 16 products per 4 outputs do the work of
  36 (Winograd's F(2×2, 3×3); Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
  2016);
- an image of twice the size is handled as its four *phases*: `(B, H, W, 4 C)`, where channels
  `(2 p + q) C` and following hold the pixels `(2 i + p, 2 j + q)`. Strided and transposed
  convolutions are convolutions without stride from and to phases.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Taps = tuple[tuple[int, int], ...]
"""Displacements `(di, dj)`: pixel `(i + di, j + dj)` goes into output `(i, j)`."""

_ALL = tuple((di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1))
_BEFORE = tuple((di, dj) for di in (-1, 0) for dj in (-1, 0))
_AFTER = tuple((di, dj) for di in (0, 1) for dj in (0, 1))

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# The fewest channels, in and out, for which fewer products outweigh the transforms.
_WINOGRAD_CHANNELS = 32


class Conv(nn.Module):
    """A 3×3 convolution with bias; initialised as Keras does (Glorot uniform, zero bias)."""

    features: int
    stride: int = 1

    @nn.compact
    def _weights(self, images: jax.Array, channels: int) -> Sequence[jax.Array]:
        """The images, the kernel and the bias, in one dtype."""
        kernel = self.param(
            "kernel", nn.initializers.glorot_uniform(), (3, 3, channels, self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return nn.dtypes.promote_dtype(images, kernel, bias)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to `(B, H / stride, W / stride, features)`, rounded up."""
        images, kernel, bias = self._weights(images, images.shape[-1])
        return conv(images, kernel, self.stride) + bias

    def on_phases(self, phases: jax.Array) -> jax.Array:
        """`(B, H, W, 4 C)` to `(B, H, W, 4 features)`: both are the phases of a larger image."""
        phases, kernel, bias = self._weights(phases, phases.shape[-1] // 4)
        return conv_on_phases(phases, kernel) + jnp.tile(bias, 4)


class ConvTranspose(Conv):
    """A transposed 3×3 convolution of stride 2 with bias; initialised likewise."""

    stride: int = 2

    def __call__(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to `(B, 2 H, 2 W, features)`."""
        images, kernel, bias = self._weights(images, images.shape[-1])
        return conv_transpose(images, kernel) + bias

    def to_phases(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` to `(B, H, W, 4 features)`: the phases of the result."""
        images, kernel, bias = self._weights(images, images.shape[-1])
        return conv_transpose_to_phases(images, kernel) + jnp.tile(bias, 4)


def conv(images: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`(B, H, W, C)` to `(B, H / stride, W / stride, K)`, rounded up; stride 1 or 2."""

    def plain(images, kernel):
        return lax.conv_general_dilated(
            images, kernel, (stride, stride), "SAME", dimension_numbers=_LAYOUT
        )

    if stride == 1:
        return _by_platform(plain, _conv_on_cpu)(images, kernel)
    if stride == 2 and images.shape[1] % 2 == 0 and images.shape[2] % 2 == 0:

        def on_cpu(images, kernel):
            return _product(split_phases(images), _strided_kernel(kernel), _AFTER)

        return _by_platform(plain, on_cpu)(images, kernel)
    return plain(images, kernel)


def conv_transpose(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: `lax.conv_transpose` with stride 2."""

    def plain(images, kernel):
        return lax.conv_transpose(images, kernel, (2, 2), "SAME", dimension_numbers=_LAYOUT)

    def on_cpu(images, kernel):
        return merge_phases(_product(images, _transposed_kernel(kernel), _BEFORE))

    return _by_platform(plain, on_cpu)(images, kernel)


def conv_transpose_to_phases(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, 4 K)`: the phases of what `conv_transpose` gives."""
    return _conv_of_taps(images, _transposed_kernel(kernel), _BEFORE)


def conv_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, 4 C)` to `(B, H, W, 4 K)`: `conv` with stride 1, from phases to phases.

    It makes four times the products, but none of the large image. Meant for a small K.
    """
    return _conv_of_taps(phases, _phases_kernel(kernel), _ALL)


def split_phases(images: jax.Array) -> jax.Array:
    """`(B, 2 H, 2 W, C)` to its phases, `(B, H, W, 4 C)`."""
    b, h, w, c = images.shape
    split = images.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(b, h // 2, w // 2, 4 * c)


def merge_phases(phases: jax.Array) -> jax.Array:
    """Phases `(B, H, W, 4 C)` to the image that they make up, `(B, 2 H, 2 W, C)`."""
    b, h, w, c = phases.shape
    merged = phases.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return merged.reshape(b, 2 * h, 2 * w, c // 4)


def _by_platform(plain: Callable, on_cpu: Callable) -> Callable:
    """`plain`, compiled as `on_cpu` for CPUs; the same for its gradient.

    The gradient keeps the arguments alone and computes from them what else it needs.
    """

    def in_float32(*args):
        # What has fewer bits than float32 is slow on CPUs, and would be rounded between the steps.
        dtype = args[0].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        return on_cpu(*(arg.astype(wide) for arg in args)).astype(dtype)

    @jax.custom_vjp
    def function(*args):
        return lax.platform_dependent(*args, cpu=in_float32, default=plain)

    def forward(*args):
        return function(*args), args

    def backward(args, cotangent):
        def gradient_of(lowering):
            return lambda cotangent, *args: jax.vjp(lowering, *args)[1](cotangent)

        return lax.platform_dependent(
            cotangent, *args, cpu=gradient_of(in_float32), default=gradient_of(plain)
        )

    function.defvjp(forward, backward)
    return function


def _conv_of_taps(images: jax.Array, kernel: jax.Array, taps: Taps) -> jax.Array:
    """The convolution with a `(T, C, K)` kernel, whose T taps fill a rectangle."""
    before, after = _margins(taps)

    def plain(images, kernel):
        size = (before[0] + after[0] + 1, before[1] + after[1] + 1)
        return lax.conv_general_dilated(
            images,
            kernel.reshape(*size, *kernel.shape[1:]),
            (1, 1),
            tuple(zip(before, after, strict=True)),
            dimension_numbers=_LAYOUT,
        )

    return _by_platform(plain, functools.partial(_product, taps=taps))(images, kernel)


def _conv_on_cpu(images: jax.Array, kernel: jax.Array) -> jax.Array:
    if min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS:
        return _winograd(images, kernel)
    return _product(images, kernel.reshape(9, *kernel.shape[2:]), _ALL)


# ---- Matrix products


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(images: jax.Array, kernel: jax.Array, taps: Taps) -> jax.Array:
    """The convolution with a `(T, C, K)` kernel, as one matrix product."""
    count, channels, features = kernel.shape
    if channels <= features:
        return _dot(_shifted(images, taps), kernel.reshape(count * channels, features))
    products = _dot(images, kernel.transpose(1, 0, 2).reshape(channels, count * features))
    padded, windows = _windows(products, taps)
    terms = (
        padded[window][..., tap * features : (tap + 1) * features]
        for tap, window in enumerate(windows)
    )
    return functools.reduce(jnp.add, terms)


def _product_forward(images, kernel, taps):
    return _product(images, kernel, taps), (images, kernel)


def _product_backward(taps, saved, cotangent):
    images, kernel = saved
    count, channels, features = kernel.shape
    opposite = tuple((-di, -dj) for di, dj in taps)
    images_cotangent = _product(cotangent, kernel.transpose(0, 2, 1), opposite)
    # One product over all pixels of the batch.
    if channels <= features:
        kernel_cotangent = _dot_over_pixels(_shifted(images, taps), cotangent)
        return images_cotangent, kernel_cotangent.reshape(kernel.shape)
    kernel_cotangent = _dot_over_pixels(images, _shifted(cotangent, opposite))
    kernel_cotangent = kernel_cotangent.reshape(channels, count, features).transpose(1, 0, 2)
    return images_cotangent, kernel_cotangent


_product.defvjp(_product_forward, _product_backward)


def _margins(taps: Taps) -> tuple[tuple[int, int], tuple[int, int]]:
    """How far the taps reach beyond an image: before its start and after its end."""
    before = tuple(max(0, *(-tap[axis] for tap in taps)) for axis in (0, 1))
    after = tuple(max(0, *(tap[axis] for tap in taps)) for axis in (0, 1))
    return before, after


def _windows(images: jax.Array, taps: Taps) -> tuple[jax.Array, list[tuple[slice, ...]]]:
    """The images with a margin of zeros, and for each tap where it lies in them."""
    before, after = _margins(taps)
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), *zip(before, after, strict=True), (0, 0)))
    return padded, [
        (
            slice(None),
            slice(before[0] + di, before[0] + di + height),
            slice(before[1] + dj, before[1] + dj + width),
        )
        for di, dj in taps
    ]


def _shifted(images: jax.Array, taps: Taps) -> jax.Array:
    """`(B, H, W, T C)`: for each tap the images shifted, side by side."""
    padded, windows = _windows(images, taps)
    return jnp.concatenate([padded[window] for window in windows], axis=3)


def _dot(pixels: jax.Array, matrix: jax.Array) -> jax.Array:
    """`(..., C)` times `(C, K)`."""
    return lax.dot_general(pixels, matrix, (((pixels.ndim - 1,), (0,)), ((), ())))


def _dot_over_pixels(left: jax.Array, right: jax.Array) -> jax.Array:
    """`(B, H, W, C)` and `(B, H, W, K)` to the `(C, K)` sums over B, H and W of their products."""
    if left.shape[3] > right.shape[3]:  # The left one is transposed first; better the smaller.
        return _dot_over_pixels(right, left).T
    return lax.dot_general(left, right, (((0, 1, 2), (0, 1, 2)), ((), ())))


# ---- Kernels between phases


def _place(selection: np.ndarray, kernel: jax.Array) -> jax.Array:
    """Puts the nine `(C, K)` matrices of a kernel where `(9, T, P, Q)` `selection` has ones.

    The result is `(T, P C, Q K)`: T taps from P to Q phases.
    """
    taps, phases_in, phases_out = selection.shape[1:]
    channels, features = kernel.shape[2:]
    placed = jnp.einsum(
        "ntpq,nck->tpcqk",
        selection.astype(kernel.dtype),
        kernel.reshape(9, channels, features),
        precision=lax.Precision.HIGHEST,
    )
    return placed.reshape(taps, phases_in * channels, phases_out * features)


def _outer(rows: np.ndarray) -> np.ndarray:
    """A selection for both axes from the one for one axis, `(3, taps, phases, phases)`."""
    n, t, p, q = rows.shape
    return np.einsum("ntpq,NTPQ->nNtTpPqQ", rows, rows).reshape(n * n, t * t, p * p, q * q)


def _strided_kernel(kernel: jax.Array) -> jax.Array:
    """From the phases of an image, by `_AFTER`, to every second pixel's convolution.

    Output i sees pixels 2 i + n, n = 0, 1, 2.
    """
    rows = np.zeros((3, 2, 2, 1), np.float32)
    for n in range(3):
        rows[n, n // 2, n % 2, 0] = 1
    return _place(_outer(rows), kernel)


def _transposed_kernel(kernel: jax.Array) -> jax.Array:
    """From an image, by `_BEFORE`, to the phases of its transposed convolution.

    Output 2 i sees pixels i - 1 (n = 0) and i (n = 2); output 2 i + 1 sees pixel i (n = 1).
    """
    rows = np.zeros((3, 2, 1, 2), np.float32)
    rows[0, 0, 0, 0] = rows[2, 1, 0, 0] = rows[1, 1, 0, 1] = 1
    return _place(_outer(rows), kernel)


def _phases_kernel(kernel: jax.Array) -> jax.Array:
    """From phases, by `_ALL`, to the phases of the convolution.

    Output 2 i + q sees pixels 2 i + q + n - 1, n = 0, 1, 2.
    """
    rows = np.zeros((3, 3, 2, 2), np.float32)
    for n in range(3):
        for q in range(2):
            tap, phase = divmod(q + n - 1, 2)
            rows[n, tap + 1, phase, q] = 1
    return _place(_outer(rows), kernel)


# ---- Winograd

# G in the paper's equation 8; `transform` and `transform_back` multiply by its B and A.
_WINOGRAD_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def _winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution by tiles of 2×2 outputs, each from 4×4 pixels."""
    batch, height, width, channels = images.shape
    features = kernel.shape[3]
    rows, columns = -(-height // 2), -(-width // 2)
    # A margin of one pixel, and one more where the last tile reaches beyond the image.
    padded = jnp.pad(
        images, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0))
    )

    def transform(array, axis, count):
        a, b, c, d = (
            lax.slice_in_dim(array, first, first + 2 * count - 1, 2, axis) for first in range(4)
        )
        return a - c, b + c, c - b, b - d

    def transform_back(a, b, c, d):
        return a + b + c, b - c - d

    tiles = jnp.stack(
        [tile for part in transform(padded, 1, rows) for tile in transform(part, 2, columns)]
    )
    transformed_kernel = jnp.einsum(
        "is,jt,stck->ijck",
        *[_WINOGRAD_KERNEL.astype(kernel.dtype)] * 2,
        kernel,
        precision=lax.Precision.HIGHEST,
    )
    products = lax.dot_general(
        tiles.reshape(16, batch * rows * columns, channels),
        transformed_kernel.reshape(16, channels, features),
        (((2,), (1,)), ((0,), (0,))),
    ).reshape(4, 4, batch, rows, columns, features)
    outputs = [jnp.stack(transform_back(*row), axis=3) for row in transform_back(*products)]
    outputs = jnp.stack(outputs, axis=2)
    return outputs.reshape(batch, 2 * rows, 2 * columns, features)[:, :height, :width]
