"""3×3 convolutions, computed in the way that is fast on each platform.

Convolutions take `(B, H, W, C)` images and `(3, 3, C, K)` kernels of one float dtype, pad with
zeros to keep the size ("same", as in XLA and Keras), and agree with `jax.lax`'s except for
rounding. GPUs and TPUs use the compiler's own convolutions. On CPUs:

- The compiler's convolutions are fast, if they use all cores (`aecore.steps.cpu`) and have enough
  features, but not its gradients of them. The image's gradient is written as another convolution,
  and so is the kernel's, with a window as large as the image. `experiments/cpu_convolutions.py`
  compares them.
- With many channels, the height is cut into tiles of four rows, and rows are transformed so that
  half as many products do the work (Winograd's F(4, 3), in one dimension; Lavin and Gray, "Fast
  Algorithms for Convolutional Neural Networks", 2016). For the kernel's gradient, fewer channels
  suffice.
- With few channels, matrix products with the *batch last*, on `(C, H, W, B)`, are faster. A
  convolution is a sum over its nine taps: the image, shifted, times the tap's `(C, K)` matrix. If
  fewer channels go in than come out, the shifted images are put side by side and multiplied at
  once; otherwise the products with all taps are computed at once, then shifted and added. Shifting
  moves runs of B numbers, and the pixels are the long side of every product. Each function
  transposes its arguments and its result. Between two such functions the transpositions cancel,
  and the compiler drops them; therefore biases and activations are computed with the batch last
  too.
- An image of twice the size is handled as its four *phases*: `(B, H, W, 4 C)`, where channels
  `(2 p + q) C` and following hold the pixels `(2 i + p, 2 j + q)`. Strided and transposed
  convolutions are convolutions without stride from and to phases.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Taps = tuple[tuple[int, int], ...]
"""Displacements `(di, dj)`: output `(i, j)` depends on pixel `(i + di, j + dj)`."""

_ALL = tuple((di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1))
_BEFORE = tuple((di, dj) for di in (-1, 0) for dj in (-1, 0))
_AFTER = tuple((di, dj) for di in (0, 1) for dj in (0, 1))

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def traced_once(function: Callable) -> Callable:
    """The function, which Python runs once for all arguments of the same shapes and dtypes.

    Layers of equal shapes then share what was traced, and how it is lowered; the compiler puts it
    in place of each call. A training step of a UNet with three levels of three blocks is traced in
    a third of the time, and lowered in half of it.
    """
    return jax.jit(function)


def conv(
    images: jax.Array, kernel: jax.Array, stride: int = 1, batch_last: bool = False
) -> jax.Array:
    """`(B, H, W, C)` to `(B, H / stride, W / stride, K)`, rounded up; stride 1 or 2."""
    if stride == 2 and (images.shape[1] % 2 or images.shape[2] % 2):
        return _plain_conv(images, kernel, stride=stride)
    return _conv(stride, batch_last)(images, kernel)


@functools.cache
def _conv(stride: int, batch_last: bool) -> Callable:
    def plain(images, kernel):
        return _plain_conv(images, kernel, stride=stride)

    def product(images, kernel):
        return _product(images, kernel.reshape(9, *kernel.shape[2:]), _ALL)

    def strided_product(images, kernel):
        return _product(_split(images, 0), _strided_kernel(kernel), _AFTER)

    def direct(images, kernel):
        return _direct(images, kernel, (1, 1))

    def strided(images, kernel):
        return _direct(_split(images, 3), _as_square(_strided_kernel(kernel)), (0, 0))

    if batch_last:
        on_cpu = with_batch_last(product if stride == 1 else strided_product)
    else:
        on_cpu = direct if stride == 1 else strided
    return by_platform(plain, on_cpu)


def conv_transpose(images: jax.Array, kernel: jax.Array, batch_last: bool = False) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: `lax.conv_transpose` with stride 2."""
    return _conv_transpose(batch_last)(images, kernel)


@functools.cache
def _conv_transpose(batch_last: bool) -> Callable:
    def product(images, kernel):
        return _merge(_product(images, _transposed_kernel(kernel), _BEFORE), 0)

    def direct(images, kernel):
        return _merge(_direct(images, _as_square(_transposed_kernel(kernel)), (1, 1)), 3)

    return by_platform(_dilated_conv, with_batch_last(product) if batch_last else direct)


def conv_on_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: `conv` of an image whose pixels are each repeated 2×2.

    Of the nine taps of an output, several meet the same pixel, so that their sum is multiplied
    once: 4/9 of the products, and the repeated image is never made. For TPU v5e, the compiler
    estimates 335,000 cycles an image for a training step of the enhance recipe (batch 64, bfloat16,
    resident feed), and 429,000 if the pixels are repeated.
    """
    return _conv_on_repeated()(images, kernel)


@functools.cache
def _conv_on_repeated() -> Callable:
    def plain(images, kernel):
        # The sums of two neighbouring taps meet the pixels, those of single ones the zeros between.
        rows = jnp.pad(kernel, ((1, 1), (0, 0), (0, 0), (0, 0)))
        rows = rows[:-1] + rows[1:]
        columns = jnp.pad(rows, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return _dilated_conv(images, columns[:, :-1] + columns[:, 1:])

    return by_platform(plain, _conv_on_repeated_on_cpu)


def conv_transpose_to_phases(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, 4 K)`: the phases of what `conv_transpose` gives."""
    return _conv_transpose_to_phases()(images, kernel)


@functools.cache
def _conv_transpose_to_phases() -> Callable:
    def plain(images, kernel):
        # A 2×2 kernel, which looks one pixel back.
        return _plain_conv(images, _as_square(_transposed_kernel(kernel)), ((1, 0), (1, 0)))

    def on_cpu(images, kernel):
        return _product(images, _transposed_kernel(kernel), _BEFORE)

    return by_platform(plain, with_batch_last(on_cpu))


def conv_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, 4 C)` to `(B, H, W, 4 K)`: `conv` with stride 1, from phases to phases.

    Meant for a small K: except on CPUs, it computes four times as many products as `conv`.
    """
    return _conv_on_phases()(phases, kernel)


@functools.cache
def _conv_on_phases() -> Callable:
    def plain(phases, kernel):
        return _plain_conv(phases, _as_square(_phases_kernel(kernel)))

    return by_platform(plain, with_batch_last(_product_on_phases))


@jax.custom_vjp
def max_pool(images: jax.Array) -> jax.Array:
    """`(B, 2 H, 2 W, C)` to `(B, H, W, C)`: the largest value of each 2×2 block.

    Equal largest values share the gradient; on TPUs, the first of them gets all of it.
    """
    return _max_pool_of_windows(images)


def _max_pool_of_windows(images):
    return nn.max_pool(images, (2, 2), (2, 2))


def _max_pool_forward(images):
    return max_pool(images), images


@traced_once
def _max_pool_backward(images, cotangent):
    def of_windows(images, cotangent):
        return jax.vjp(_max_pool_of_windows, images)[1](cotangent)

    def of_blocks(images, cotangent):
        batch, height, width, channels = images.shape
        blocks = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
        (gradient,) = jax.vjp(lambda blocks: blocks.max((2, 4)), blocks)[1](cotangent)
        return (gradient.reshape(images.shape),)

    # The gradient of windows is a scatter, which is fast only on TPUs.
    return lax.platform_dependent(images, cotangent, tpu=of_windows, default=of_blocks)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def split_phases(images: jax.Array, factor: int = 2) -> jax.Array:
    """`(B, f H, f W, C)` to its phases, `(B, H, W, f² C)`."""
    return _split(images, 3, factor)


def merge_phases(phases: jax.Array, factor: int = 2) -> jax.Array:
    """Phases `(B, H, W, f² C)` to their image, `(B, f H, f W, C)`.

    TPUs are slow to put the numbers of a row between those of another, and quick to multiply by a
    matrix that does it. For TPU v5e, the compiler estimates 47,900 cycles an image for a training
    step of `lfw_unet`'s network (batch 64, bfloat16, resident feed), and 50,700 without the matrix;
    for `photo_upscale`'s (batch 32), 115,500 and 161,200.
    """
    return phases if factor == 1 else _merging(factor)(phases)


@functools.cache
def _merging(factor: int) -> Callable:
    def moved(phases):
        return _merge(phases, 3, factor)

    def multiplied(phases):
        batch, height, width, channels = phases.shape
        parts = phases.reshape(batch, height, width, factor, factor, channels // factor**2)
        rows = _multiply_exactly("bijpqc,xjq->bipxc", parts, _places(width, factor))
        return rows.reshape(batch, factor * height, factor * width, -1)

    def moved_back(images):
        return _split(images, 3, factor)

    def multiplied_back(images):
        batch, height, width, channels = images.shape
        height, width = height // factor, width // factor
        rows = images.reshape(batch, height, factor, factor * width, channels)
        parts = _multiply_exactly("bipxc,xjq->bijpqc", rows, _places(width, factor))
        return parts.reshape(batch, height, width, -1)

    @jax.custom_vjp
    @traced_once
    def merge(phases):
        return lax.platform_dependent(phases, tpu=multiplied, default=moved)

    def forward(phases):
        return merge(phases), None

    @traced_once
    def backward(_, cotangent):
        # One channel's rows are parted more quickly without the matrix: a step of the denoise
        # recipe's network is 831 cycles an image so, and else 850.
        on_tpu = moved_back if cotangent.shape[3] == 1 else multiplied_back
        return (lax.platform_dependent(cotangent, tpu=on_tpu, default=moved_back),)

    merge.defvjp(forward, backward)
    return merge


def _places(width: int, factor: int) -> jax.Array:
    """`(f W, W, f)`: 1 where column j of phase q is in its place in the merged row, f j + q."""
    place, column, phase = (
        lax.broadcasted_iota(jnp.int32, (factor * width, width, factor), axis) for axis in range(3)
    )
    return place == factor * column + phase


def _multiply_exactly(equation: str, images: jax.Array, matrix: jax.Array) -> jax.Array:
    # Without HIGHEST, TPUs would round float32 to bfloat16.
    return jnp.einsum(
        equation, images, matrix.astype(images.dtype), precision=lax.Precision.HIGHEST
    )


def _plain_conv(
    images: jax.Array,
    kernel: jax.Array,
    padding: str | tuple[tuple[int, int], ...] = "SAME",
    stride: int = 1,
) -> jax.Array:
    """The compiler's own convolution."""
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def _opposite(kernel: jax.Array) -> jax.Array:
    """The kernel that takes a convolution's outputs back: `(n, n, C, K)` to `(n, n, K, C)`.

    If images and gradients are exchanged, the kernel's gradient is that of this one.
    """
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


@jax.custom_vjp
def _dilated_conv(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The compiler's own convolution, to twice the size, of an image with zeros between its pixels.

    With a kernel of 3×3 it is `lax.conv_transpose` of stride 2; the kernel may also be 4×4. It is
    the gradient of a strided convolution, and its own gradients are written as those of that
    convolution: GPUs would compute the kernel's gradient of a dilated convolution with a kernel as
    large as the image.
    """
    margin = (2, len(kernel) - 2)
    return lax.conv_general_dilated(
        images, kernel, (1, 1), (margin, margin), (2, 2), dimension_numbers=_LAYOUT
    )


def _dilated_conv_forward(images, kernel):
    return _dilated_conv(images, kernel), (images, kernel)


def _dilated_conv_backward(saved, cotangent):
    images, kernel = saved
    margin = (len(kernel) - 3, 1)
    strided, gradient_of_kernel = jax.vjp(
        lambda kernel: _plain_conv(cotangent, kernel, (margin, margin), stride=2),
        _opposite(kernel),
    )
    (kernel_cotangent,) = gradient_of_kernel(images)
    return strided, _opposite(kernel_cotangent)


_dilated_conv.defvjp(_dilated_conv_forward, _dilated_conv_backward)


def by_platform(plain: Callable, on_cpu: Callable) -> Callable:
    """A function that is `on_cpu` on CPUs and `plain` elsewhere; so is its gradient.

    For the gradient only the arguments are kept; whatever else it needs is computed from them.

    Make it once rather than for each call: layers of equal shapes then share what was traced.
    """

    def in_float32(*args):
        # Fewer bits than float32 are slow on CPUs, and would be rounded between the steps.
        dtype = args[0].dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        return on_cpu(*(arg.astype(wide) for arg in args)).astype(dtype)

    @jax.custom_vjp
    @traced_once
    def function(*args):
        return lax.platform_dependent(*args, cpu=in_float32, default=plain)

    def forward(*args):
        return function(*args), args

    @traced_once
    def backward(args, cotangent):
        def gradient_of(lowering):
            return lambda cotangent, *args: jax.vjp(lowering, *args)[1](cotangent)

        return lax.platform_dependent(
            cotangent, *args, cpu=gradient_of(in_float32), default=gradient_of(plain)
        )

    function.defvjp(forward, backward)
    return function


def with_batch_last(function: Callable) -> Callable:
    """A function of `(C, H, W, B)` images and further arguments, for `(B, H, W, C)` images."""

    def turned(images, *args):
        return function(images.transpose(3, 1, 2, 0), *args).transpose(3, 1, 2, 0)

    return turned


# ---- Matrix products, on images with the batch last: `(C, H, W, B)`


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(images: jax.Array, kernel: jax.Array, taps: Taps) -> jax.Array:
    """The convolution with a `(T, C, K)` kernel, as one matrix product."""
    count, channels, features = kernel.shape
    if channels <= features:
        return _multiply(_shifted(images, taps), kernel)
    kernel = kernel.transpose(1, 0, 2).reshape(1, channels, count * features)
    products = jnp.split(_multiply(images, kernel), count)
    terms = (_shift(product, tap) for product, tap in zip(products, taps, strict=True))
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


def _shift(images: jax.Array, tap: tuple[int, int]) -> jax.Array:
    """Moves pixel `(i + di, j + dj)` to `(i, j)`; zeros come in from outside."""
    di, dj = tap
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, ((0, 0, 0), (-di, di, 0), (-dj, dj, 0), (0, 0, 0)))


def _shifted(images: jax.Array, taps: Taps) -> jax.Array:
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


def _split(images: jax.Array, axis: int, factor: int = 2) -> jax.Array:
    """`(f H, f W)` pixels to f² phases; `axis` is that of the channels."""
    first, height, width, last = images.shape
    height, width, count = height // factor, width // factor, factor**2
    split = images.reshape(first, height, factor, width, factor, last)
    if axis == 3:
        return split.transpose(0, 1, 3, 2, 4, 5).reshape(first, height, width, count * last)
    return split.transpose(2, 4, 0, 1, 3, 5).reshape(count * first, height, width, last)


def _merge(phases: jax.Array, axis: int, factor: int = 2) -> jax.Array:
    """f² phases to their `(f H, f W)` pixels; `axis` is that of the channels."""
    first, height, width, last = phases.shape
    if axis == 3:
        last //= factor**2
        parts = phases.reshape(first, height, width, factor, factor, last)
        merged = parts.transpose(0, 1, 3, 2, 4, 5)
    else:
        first //= factor**2
        parts = phases.reshape(factor, factor, first, height, width, last)
        merged = parts.transpose(2, 3, 0, 4, 1, 5)
    return merged.reshape(first, factor * height, factor * width, last)


@jax.custom_vjp
def _product_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(4 C, H, W, B)` to `(4 K, H, W, B)`: each phase's products with all taps, shifted and added.

    Along each axis, output 2 i + q depends on pixels 2 i + q + n - 1, n = 0, 1, 2.
    """
    channels, features = kernel.shape[2:]
    matrix = kernel.transpose(0, 1, 3, 2).reshape(9 * features, channels)
    products = _multiply_phases(matrix, phases)
    products = products.reshape(2, 2, 3, 3, features, *phases.shape[1:])

    def term(p, q, n, m):
        (di, row), (dj, column) = divmod(p + n - 1, 2), divmod(q + m - 1, 2)
        return _shift(products[row, column, n, m], (di, dj))

    return jnp.concatenate(
        [
            functools.reduce(jnp.add, (term(p, q, n, m) for n in range(3) for m in range(3)))
            for p in range(2)
            for q in range(2)
        ]
    )


def _product_on_phases_forward(phases, kernel):
    return _product_on_phases(phases, kernel), (phases, kernel)


def _product_on_phases_backward(saved, cotangent):
    phases, kernel = saved
    channels, features = kernel.shape[2:]
    size = phases.shape[1:]
    cotangent = cotangent.reshape(2, 2, features, *size)

    def cotangent_of_product(p, q, n, m):
        (di, row), (dj, column) = divmod(p - n + 1, 2), divmod(q - m + 1, 2)
        return _shift(cotangent[row, column], (di, dj))

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


_product_on_phases.defvjp(_product_on_phases_forward, _product_on_phases_backward)


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


# ---- Kernels between phases


_ZEROS = 9
"""The number of a matrix of zeros, after those of a kernel's nine matrices."""


def _place(selection: np.ndarray, kernel: jax.Array) -> jax.Array:
    """Puts the nine `(C, K)` matrices of a kernel where `(9, T, P, Q)` `selection` has ones.

    The result is `(T, P C, Q K)`: T taps from P to Q phases. No place may have two matrices, and
    all matrices must have equally many places.
    """
    taps, phases_in, phases_out = selection.shape[1:]
    channels, features = kernel.shape[2:]
    numbers = np.where(selection.any(0), selection.argmax(0), _ZEROS).flatten()
    taken: Any = _take(kernel.reshape(9, channels, features), tuple(numbers.tolist()))
    placed = taken.reshape(taps, phases_in, phases_out, channels, features)
    return placed.transpose(0, 1, 3, 2, 4).reshape(taps, phases_in * channels, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _take(matrices: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
    """Picks matrices by number, and zeros for `_ZEROS`; each of the nine equally often."""
    return jnp.concatenate([matrices, jnp.zeros_like(matrices[:1])])[np.array(numbers)]


def _take_forward(matrices, numbers):
    return _take(matrices, numbers), None


def _take_backward(numbers, _, cotangent):
    # Picked and summed rather than scattered: that is slow, and adds in any order on GPUs.
    places = np.stack([np.flatnonzero(np.equal(numbers, n)) for n in range(_ZEROS)])
    return (cotangent[places].sum(1),)


_take.defvjp(_take_forward, _take_backward)


def _outer(rows: np.ndarray) -> np.ndarray:
    """The selection for both axes, from that for one axis, `(3, taps, phases, phases)`."""
    n, t, p, q = rows.shape
    return np.einsum("ntpq,NTPQ->nNtTpPqQ", rows, rows).reshape(n * n, t * t, p * p, q * q)


def _as_square(kernel: jax.Array) -> jax.Array:
    """`(n², C, K)` taps as `(n, n, C, K)`."""
    side = math.isqrt(len(kernel))
    return kernel.reshape(side, side, *kernel.shape[1:])


def _strided_kernel(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `_AFTER`, that gives a strided convolution from an image's phases.

    Output i depends on pixels 2 i + n, n = 0, 1, 2.
    """
    rows = np.zeros((3, 2, 2, 1), np.float32)
    for n in range(3):
        rows[n, n // 2, n % 2, 0] = 1
    return _place(_outer(rows), kernel)


def _transposed_kernel(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `_BEFORE`, that gives a transposed convolution's phases from an image.

    Output 2 i depends on pixels i - 1 (n = 0) and i (n = 2), output 2 i + 1 on pixel i (n = 1).
    """
    rows = np.zeros((3, 2, 1, 2), np.float32)
    rows[0, 0, 0, 0] = rows[2, 1, 0, 0] = rows[1, 1, 0, 1] = 1
    return _place(_outer(rows), kernel)


def _phases_kernel(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `_ALL`, that gives a convolution's phases from an image's phases.

    Output 2 i + q depends on pixels 2 i + q + n - 1, n = 0, 1, 2.
    """
    rows = np.zeros((3, 3, 2, 2), np.float32)
    for n in range(3):
        for q in range(2):
            tap, phase = divmod(q + n - 1, 2)
            rows[n, tap + 1, phase, q] = 1
    return _place(_outer(rows), kernel)


# ---- The compiler's own convolutions, with gradients that are as fast


_FEW = 8
"""Features that are too few for the compiler's own convolution to be fast on CPUs."""


@functools.cache
def _many() -> int:
    """Channels and features from which on Winograd's fewer products outweigh its transformations.

    The wider a CPU's registers, the less its products cost. On 2 cores with AVX-512, it is 1.2 to
    1.6 times as fast with 64, and as fast with 48; on 2 with AVX2, 1.2 to 1.5 times with 48 or
    more, 1.1 times with 32, and as fast with 24.
    """
    config: Any = np.show_config(mode="dicts")
    # Lists that would be empty are left out. What compilers call x86-64-v4 has AVX-512.
    known = config.get("SIMD Extensions", {})
    names = (*known.get("baseline", ()), *known.get("found", ()))
    return 56 if any(name.startswith(("AVX512", "X86_V4")) for name in names) else 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _direct(images: jax.Array, kernel: jax.Array, before: tuple[int, int]) -> jax.Array:
    """The convolution with an `(n, n, C, K)` kernel that begins `before` pixels up and left."""
    side, _, channels, features = kernel.shape
    margins = tuple((first, side - 1 - first) for first in before)
    if side == 3 and before == (1, 1) and min(channels, features) >= _many():
        return _winograd(images, kernel)
    if features > _FEW:
        return _plain_conv(images, kernel, margins)
    # So few columns of a matrix product leave registers empty. Three times as many don't: a row
    # convolution for each row of the kernel; their results are shifted and added.
    rows = kernel.transpose(1, 2, 0, 3).reshape(1, side, channels, side * features)
    parts = jnp.split(_plain_conv(images, rows, ((0, 0), margins[1])), side, axis=3)
    padded = jnp.pad(jnp.stack(parts), ((0, 0), (0, 0), margins[0], (0, 0), (0, 0)))
    height = images.shape[1]
    return functools.reduce(jnp.add, (padded[n, :, n : n + height] for n in range(side)))


def _direct_forward(images, kernel, before):
    return _direct(images, kernel, before), (images, kernel)


def _direct_backward(before, saved, cotangent):
    images, kernel = saved
    after = tuple(len(kernel) - 1 - first for first in before)
    # Without the barrier the compiler would make it a reversed window, for which it has slow code.
    opposite = lax.optimization_barrier(_opposite(kernel))
    images_cotangent = _direct(cotangent, opposite, after)
    return images_cotangent, _gradient_of_kernel(images, cotangent, len(kernel), before)


_direct.defvjp(_direct_forward, _direct_backward)


@jax.custom_vjp
def _conv_on_repeated_on_cpu(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Repeats the pixels, which is faster than putting phases together; its gradient is theirs."""
    repeated = images.repeat(2, axis=1).repeat(2, axis=2)
    return conv(repeated, kernel)


def _conv_on_repeated_on_cpu_forward(images, kernel):
    return _conv_on_repeated_on_cpu(images, kernel), (images, kernel)


def _conv_on_repeated_on_cpu_backward(saved, cotangent):
    return jax.vjp(_phases_of_repeated, *saved)[1](_split(cotangent, 3))


_conv_on_repeated_on_cpu.defvjp(_conv_on_repeated_on_cpu_forward, _conv_on_repeated_on_cpu_backward)


def _phases_of_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The phases of the convolution of an image whose pixels are repeated, by four of 2×2."""

    def halves(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        # Of an even output row, the first tap meets the pixel before.
        before = jnp.concatenate([first, middle + last], axis)
        return before, jnp.concatenate([first + middle, last], axis)

    phases = [
        jnp.asarray(_direct(images, part, (1 - row, 1 - column)))
        for row, part_of_rows in enumerate(halves(kernel, 0))
        for column, part in enumerate(halves(part_of_rows, 1))
    ]
    return jnp.concatenate(phases, 3)


_ADJACENT = 16
"""Images whose same pixels should lie side by side, where a window is as large as an image: one
register of AVX-512."""

_ENOUGH = 24
"""Channels and features from which on Winograd's method is faster for the kernel's gradient: on
2 cores 1.2 to 1.5 times with 32, 1.2 to 2.1 times with more, 0.8 times with 12."""


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
    if side == 3 and before == (1, 1) and fewest >= _ENOUGH:
        return _winograd_gradient_of_kernel(images, cotangent)
    if images.shape[3] > cotangent.shape[3]:
        # Of what has the fewer channels, windows are cut out, each as often as there are taps.
        row, column = before
        after = side - 1 - row, side - 1 - column
        return _opposite(_gradient_of_kernel(cotangent, images, side, after))
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
    return _plain_conv(windows, kernel, ((0, 0), (left, right))).transpose(1, 2, 0, 3)


@jax.custom_vjp
def add_bias(features: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias `(K,)` to each pixel of `(B, H, W, K)` features."""
    return features + bias


def _add_bias_forward(features, bias):
    return add_bias(features, bias), None


@traced_once
def _add_bias_backward(_, cotangent):
    def added(cotangent):
        def of(bias):
            return jnp.broadcast_to(bias, cotangent.shape)

        bias = jax.ShapeDtypeStruct(cotangent.shape[-1:], cotangent.dtype)
        return jax.linear_transpose(of, bias)(cotangent)[0]

    def multiplied(cotangent):
        # The compiler's sums over pixels take three times as long as its matrix products.
        pixels = cotangent.reshape(-1, cotangent.shape[-1]).astype(jnp.float32)
        return (jnp.ones(len(pixels)) @ pixels).astype(cotangent.dtype)

    return cotangent, lax.platform_dependent(cotangent, cpu=multiplied, default=added)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


# ---- Winograd

# Bᵀ, G and Aᵀ of F(4, 3), as there.
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


def _winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution by tiles of four rows, each from six.

    Six convolutions with 1×3 kernels take the place of the twelve that four rows otherwise need.
    """
    batch, height, width, _ = images.shape
    count = -(-height // 4)
    rows = _combined(_FOR_IMAGES, _six_rows(images, count))
    kernels = _combined(_FOR_KERNELS, list(kernel))
    products = [_plain_conv(part, taps[None]) for part, taps in zip(rows, kernels, strict=True)]
    outputs = jnp.stack(_combined(_BACK, products), 2)
    return outputs.reshape(batch, 4 * count, width, kernel.shape[3])[:, :height]


def _winograd_gradient_of_kernel(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """What `_gradient_of_kernel` gives for a convolution that `_winograd` computes.

    Each 1×3 kernel's gradient is a matrix product over all pixels; of what has the fewer channels,
    copies shifted by columns are side by side.
    """
    (_, height, width, channels), features = images.shape, cotangent.shape[3]
    if channels < features:
        return _opposite(_winograd_gradient_of_kernel(cotangent, images))
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
        # after its last row, so that rows 1 to 4 need none. With `_shift`, which adds zeros that
        # are cut off again, all of `_winograd` takes 1.3 to 1.7 times as long.
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
