"""Resampling: an image is brought to another number of pixels."""

import dataclasses
from typing import Any

import numpy as np

from aecore.degradations.base import Array, Degradation, Ops, Range, clip, real, register
from aecore.degradations.separable import as_matrices, namespace, separable


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
    return _area_overlap(np, small, size, size)[:, :small]


def _there_and_back(size: int, scale: Array, ops: Ops) -> Array:
    xp, einsum = namespace(scale, ops)
    small = _kept(xp, size, as_matrices(scale))
    down = _area_overlap(xp, size, small, size)
    up = _area_overlap(xp, small, size, size)
    return einsum("...ij,...jk->...ik", up, down)


def _kept(xp: Any, size: int, scale: Array) -> Array:
    """How many of `size` pixels pixelation keeps."""
    # The recipe truncates; the margin keeps 0.29 * 100 from becoming 28.
    return xp.maximum(xp.floor(size * scale + 1e-4), 1.0)


def _area_overlap(xp: Any, size_in: Array, size_out: Array, rows: int) -> Array:
    """`(..., rows, rows)` weights of an area resize from `size_in` to `size_out` values.

    Output value i covers [i, i + 1) * size_in / size_out of the input and is the mean of what it
    covers. Both sizes may be below `rows`; the weights beyond them are zero. In units of
    1 / size_out all ends are whole numbers, so that nothing is rounded before the division.
    """
    i = np.arange(rows, dtype=np.float32)[:, None]
    j = np.arange(rows, dtype=np.float32)[None, :]
    start = xp.maximum(i * size_in, j * size_out)
    end = xp.minimum((i + 1) * size_in, (j + 1) * size_out)
    return xp.maximum(end - start, 0.0) / size_in
