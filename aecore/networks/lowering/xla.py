"""The compiler's own convolutions of `(B, H, W, C)` images, as GPUs and TPUs use them.

Those of CPUs are built on `convolve`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from aecore.networks.lowering import kernels

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    padding: str | tuple[tuple[int, int], ...] = "SAME",
    stride: int = 1,
) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, K)`; the kernel may have any size."""
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def conv_strided(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H / 2, W / 2, K)`, rounded up."""
    return convolve(images, kernel, stride=2)


@jax.custom_vjp
def conv_transpose(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: the convolution of an image with zeros between pixels.

    With a kernel of 3×3 it is `lax.conv_transpose` of stride 2; the kernel may also be 4×4. It is
    the gradient of a strided convolution, and its own gradients are written as those of that
    convolution: GPUs would compute the kernel's gradient of a dilated convolution with a kernel as
    large as the image.
    """
    margin = (2, len(kernel) - 2)
    return lax.conv_general_dilated(
        images, kernel, (1, 1), (margin, margin), (2, 2), dimension_numbers=_LAYOUT
    )


def _conv_transpose_forward(images, kernel):
    return conv_transpose(images, kernel), (images, kernel)


def _conv_transpose_backward(saved, cotangent):
    images, kernel = saved
    margin = (len(kernel) - 3, 1)
    strided, gradient_of_kernel = jax.vjp(
        lambda kernel: convolve(cotangent, kernel, (margin, margin), stride=2),
        kernels.opposite(kernel),
    )
    (kernel_cotangent,) = gradient_of_kernel(images)
    return strided, kernels.opposite(kernel_cotangent)


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


def conv_on_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: the convolution of the pixels, each repeated 2×2."""
    # The sums of two neighbouring taps meet the pixels, those of single ones the zeros between.
    rows = jnp.pad(kernel, ((1, 1), (0, 0), (0, 0), (0, 0)))
    rows = rows[:-1] + rows[1:]
    columns = jnp.pad(rows, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return conv_transpose(images, columns[:, :-1] + columns[:, 1:])


def conv_transpose_to_phases(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, 4 K)`: the phases of a transposed convolution."""
    # A 2×2 kernel, which looks one pixel back.
    return convolve(images, kernels.as_square(kernels.transposed(kernel)), ((1, 0), (1, 0)))


def conv_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, 4 C)` to `(B, H, W, 4 K)`: from phases to phases."""
    return convolve(phases, kernels.as_square(kernels.on_phases(kernel)))
