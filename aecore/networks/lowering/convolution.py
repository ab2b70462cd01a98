"""3×3 convolutions of `(B, H, W, C)` images, computed in the way that is fast on each platform.

Kernels are `(3, 3, C, K)`, of the images' float dtype. Images are padded with zeros to keep their
size ("same", as in XLA and Keras). Results agree with those of `jax.lax` except for rounding.

GPUs and TPUs use the compiler's own convolutions (`xla`). CPUs use those with gradients that are as
fast, and with many channels Winograd's method (`cpu`); or, where the caller asks for it, matrix
products with the batch last (`products`).

An image of twice the size is often handled as its four phases (`phases`): strided and transposed
convolutions are convolutions without stride from and to phases.
"""

import jax

from aecore.errors import ConfigError
from aecore.networks.lowering import cpu, products, xla
from aecore.networks.lowering.platforms import by_platform
from aecore.networks.lowering.products import with_batch_last

_conv = by_platform(xla.convolve, cpu.conv)
_conv_batch_last = by_platform(xla.convolve, with_batch_last(products.conv))
_strided = by_platform(xla.conv_strided, cpu.conv_strided)
_strided_batch_last = by_platform(xla.conv_strided, with_batch_last(products.conv_strided))
_transpose = by_platform(xla.conv_transpose, cpu.conv_transpose)
_transpose_batch_last = by_platform(xla.conv_transpose, with_batch_last(products.conv_transpose))
_on_repeated = by_platform(xla.conv_on_repeated, cpu.conv_on_repeated)
_transpose_to_phases = by_platform(
    xla.conv_transpose_to_phases, with_batch_last(products.conv_transpose_to_phases)
)
_on_phases = by_platform(xla.conv_on_phases, with_batch_last(products.conv_on_phases))


def conv(
    images: jax.Array, kernel: jax.Array, stride: int = 1, batch_last: bool = False
) -> jax.Array:
    """`(B, H, W, C)` to `(B, H / stride, W / stride, K)`, rounded up.

    Args:
      images: to convolve.
      kernel: `(3, 3, C, K)`.
      stride: 1 or 2.
      batch_last: whether CPUs compute it with the batch last: faster for few channels, if what
        comes before or after it does so too.

    Raises:
      ConfigError: the stride is another.
    """
    if stride not in (1, 2):
        raise ConfigError(f"a convolution's stride can't be {stride}; use 1 or 2")
    if stride == 1:
        return (_conv_batch_last if batch_last else _conv)(images, kernel)
    if images.shape[1] % 2 or images.shape[2] % 2:
        return xla.conv_strided(images, kernel)
    return (_strided_batch_last if batch_last else _strided)(images, kernel)


def conv_transpose(images: jax.Array, kernel: jax.Array, batch_last: bool = False) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: `lax.conv_transpose` with stride 2."""
    return (_transpose_batch_last if batch_last else _transpose)(images, kernel)


def conv_on_repeated(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, 2 H, 2 W, K)`: `conv` of an image whose pixels are each repeated 2×2.

    Of the nine taps of an output, several meet the same pixel, so that their sum is multiplied
    once: 4/9 of the products, and the repeated image is never made. For TPU v5e, the compiler
    estimates 335,000 cycles an image for a training step of the enhance recipe (batch 64, bfloat16,
    resident feed), and 429,000 if the pixels are repeated.
    """
    return _on_repeated(images, kernel)


def conv_transpose_to_phases(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, C)` to `(B, H, W, 4 K)`: the phases of what `conv_transpose` gives."""
    return _transpose_to_phases(images, kernel)


def conv_on_phases(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """`(B, H, W, 4 C)` to `(B, H, W, 4 K)`: `conv` with stride 1, from phases to phases.

    Meant for a small K: except on CPUs, it computes four times as many products as `conv`.
    """
    return _on_phases(phases, kernel)
