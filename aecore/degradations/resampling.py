"""Resampling: an image is brought to another number of pixels."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from aecore.degradations.base import (
    Array,
    Degradation,
    Ops,
    Range,
    choice,
    clip,
    mirrored,
    real,
    register,
)
from aecore.degradations.separable import as_matrices, namespace, separable
from aecore.errors import ConfigError


@register
@dataclasses.dataclass(frozen=True)
class Pixelate(Degradation):
    """Shrinks the image by averaging areas, then enlarges it to its old size by the same rule.

    Both ways as OpenCV's `INTER_AREA` does.
    """

    scale: Range = real(0.4, above=0, at_most=1)
    """Fraction of height and width that is kept, in (0, 1]; two numbers: a range."""

    def apply(self, images, ops):
        scale = self.draw("scale", images, ops)
        rows, columns = (_there_and_back(size, scale, ops) for size in images.shape[1:3])
        # The weights of a mean only add up to 1 up to rounding.
        return clip(separable(images, rows, columns, ops), ops)


def enlarging(size: int, scale: float) -> np.ndarray:
    """`(size, small)` matrix by which `Pixelate(scale)` brings a side back to `size` pixels."""
    small = int(_kept(np, size, as_matrices(scale)))
    return _area(np, small, size, size, small)


def _there_and_back(size: int, scale: Array, ops: Ops) -> Array:
    xp, einsum = namespace(scale, ops)
    small = _kept(xp, size, as_matrices(scale))
    down = _area(xp, size, small, size, size)
    up = _area(xp, small, size, size, size)
    return einsum("...ij,...jk->...ik", up, down)


def _kept(xp: Any, size: int, scale: Array) -> Array:
    """How many pixels a side of `size` pixels has once it is scaled."""
    # The recipe truncates; the margin keeps 0.29 * 100 from becoming 28.
    return xp.maximum(xp.floor(size * scale + 1e-4), 1.0)


def _area(xp: Any, size_in: Array, size_out: Array, rows: int, columns: int) -> Array:
    """`(..., rows, columns)` weights of an area resize from `size_in` to `size_out` values.

    Output value i covers [i, i + 1) * size_in / size_out of the input and is the mean of what it
    covers. The sizes may be below `columns` and `rows`; the weights beyond them are zero. In units
    of 1 / size_out all ends are whole numbers, so that nothing is rounded before the division.
    """
    i = np.arange(rows, dtype=np.float32)[:, None]
    j = np.arange(columns, dtype=np.float32)[None, :]
    start = xp.maximum(i * size_in, j * size_out)
    end = xp.minimum((i + 1) * size_in, (j + 1) * size_out)
    return xp.maximum(end - start, 0.0) / size_in


def _cubic_near(x: Array, a: float) -> Array:
    """Keys' cubic kernel for |x| = `x` up to 1 ("Cubic convolution interpolation for digital
    image processing", 1981)."""
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _cubic_far(x: Array, a: float) -> Array:
    """The same for |x| from 1 to 2."""
    return ((x - 5) * x + 8) * x * a - 4 * a


ResizeKernel = Literal["area", "bilinear", "bicubic"]


@register
@dataclasses.dataclass(frozen=True)
class Resize(Degradation):
    """Resizes the image by a factor, then back to its old size.

    As OpenCV's `INTER_AREA`, `INTER_LINEAR` and `INTER_CUBIC` do. The last two take the nearest 2
    or 4 pixels and so alias where they shrink, like much of what images go through on the web.
    """

    factor: Range = real(0.5, above=0, at_most=2)
    """Factor for height and width, above 0, at most 2; two numbers: a range."""
    kernel: ResizeKernel | tuple[ResizeKernel, ...] = choice(
        "bicubic", options=get_args(ResizeKernel)
    )
    """How values between pixels are found; several: each image draws one for the way there and
    one for the way back."""

    def apply(self, images, ops):
        factor = self.draw("factor", images, ops)
        rows, columns = (self._matrix(size, factor, images, ops) for size in images.shape[1:3])
        return clip(separable(images, rows, columns, ops), ops)

    def _matrix(self, size: int, factor: Array, images: Array, ops: Ops) -> Array:
        xp, _ = namespace(factor, ops)
        other = _kept(xp, size, as_matrices(factor))
        highest = self.factor[1] if isinstance(self.factor, tuple) else self.factor
        most = int(_kept(np, size, np.float32(highest)))

        def there(kernel):
            return _resizing(xp, size, other, most, size, kernel)

        def back(kernel):
            return _resizing(xp, other, size, size, most, kernel)

        down = self.choose("kernel", images, ops, there, "there")
        up = self.choose("kernel", images, ops, back, "back")
        if isinstance(down, np.ndarray) and isinstance(up, np.ndarray):
            return up @ down
        return ops.einsum("...ij,...jk->...ik", up, down)


def _resizing(
    xp: Any, size_in: Array, size_out: Array, rows: int, columns: int, kernel: str
) -> Array:
    """`([B or 1,] rows, columns)` weights of OpenCV's resize, with sizes as in `_area`."""
    if kernel == "area":
        return _area(xp, size_in, size_out, rows, columns)
    i = np.arange(rows, dtype=np.float32)[:, None]
    j = np.arange(columns, dtype=np.float32)[None, :]
    place = (i + 0.5) * size_in / size_out - 0.5
    first = xp.floor(place)
    t = place - first
    if kernel == "bilinear":
        taps = {0: 1 - t, 1: t}
    else:
        a = -0.75
        taps = {-1: _cubic_far(1 + t, a), 0: _cubic_near(t, a)}
        taps |= {1: _cubic_near(1 - t, a), 2: _cubic_far(2 - t, a)}
    total = 0.0
    for offset, weight in taps.items():
        pixel = xp.minimum(xp.maximum(first + offset, 0.0), size_in - 1.0)
        total = total + xp.where(pixel == j, weight, 0.0)
    return total


DownscaleKernel = Literal["area", "bicubic", "lanczos", "matlab"]


@register
@dataclasses.dataclass(frozen=True)
class Downscale(Degradation):
    """Makes the image smaller by a whole factor, and is what super-resolution undoes.

    All kernels are antialiased. Values are clipped to [0, 1].
    """

    scale: Literal[2, 3, 4] = 2
    """Factor by which height and width become smaller; they must be divisible by it."""
    kernel: DownscaleKernel | tuple[DownscaleKernel, ...] = choice(
        "bicubic", options=get_args(DownscaleKernel)
    )
    """bicubic and lanczos are Pillow's, matlab is the bicubic of MATLAB's imresize, which most
    benchmarks are made with, area is the mean. Several: each image draws one."""

    def __post_init__(self):
        super().__post_init__()
        if type(self.scale) is not int or self.scale not in (2, 3, 4):
            raise ConfigError(f"Downscale: scale {self.scale!r} is unknown; use 2, 3 or 4")

    @property
    def reduction(self):
        return self.scale

    def apply(self, images, ops):
        height, width = images.shape[1:3]
        low = [side // self.scale * self.scale for side in (height, width)]
        if [height, width] != low:
            raise ConfigError(
                f"images of {height}x{width} can't be made smaller by {self.scale}; "
                f"use a multiple, such as {max(low[0], self.scale)}x{max(low[1], self.scale)}"
            )

        def downscaled(kernel):
            rows, columns = (reducing(side, self.scale, kernel) for side in (height, width))
            return clip(separable(images, rows, columns, ops), ops)

        return self.choose("kernel", images, ops, downscaled)


def reducing(size: int, scale: int, kernel: DownscaleKernel) -> np.ndarray:
    """`(size / scale, size)` matrix by which `Downscale` reduces a side of `size` pixels."""
    # Pillow leaves out what lies beyond the edge, MATLAB mirrors the image there.
    beyond = 2 * scale if kernel == "matlab" else 0
    pixels = np.arange(-beyond, size + beyond) + 0.5
    centres = (np.arange(size // scale)[:, None] + 0.5) * scale
    x = np.abs(pixels - centres) / scale
    if kernel == "area":
        weights = np.where(x < 0.5, 1.0, 0.0)
    elif kernel == "lanczos":
        weights = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    else:
        near, far = _cubic_near(x, -0.5), _cubic_far(x, -0.5)
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    folded = weights @ np.eye(size)[mirrored(size, beyond)]
    return (folded / folded.sum(1, keepdims=True)).astype(np.float32)
