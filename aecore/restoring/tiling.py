"""Windows that cover a picture, and the few shapes of array that pictures of many sizes share."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from aecore.networks.receptive_field import ReceptiveField

Size = tuple[int, int]
"""Height and width."""

_MOST_COMPUTED = 2.0
"""Pixels computed for each that is kept, where memory allows such large tiles."""

_STEP = 64
"""Pixels by which tiles grow in looking for a side."""

_MOST_MERGED = 256
"""Distinct sizes between which the best merges are looked for."""


class Span(NamedTuple):
    """Along one axis: the window's start, and the first and last + 1 pixel kept of its result."""

    start: int
    first: int
    last: int


class Window(NamedTuple):
    """A part of a picture that is restored at once."""

    rows: Span
    columns: Span
    size: Size


def windows(size: Size, tile: Size, field: ReceptiveField | None, stride: int) -> list[Window]:
    """Windows that cover a picture; no kept part is affected by the border of its window.

    Args:
      size: of the picture, multiples of the stride.
      tile: of the windows, likewise; where the picture is smaller, the windows are too.
      field: of the network; may be None where one window is enough.
      stride: of the network.
    """
    tile = (min(tile[0], size[0]), min(tile[1], size[1]))
    rows, columns = (
        _spans(length, part, field, stride) for length, part in zip(size, tile, strict=True)
    )
    return [Window(row, column, tile) for row in rows for column in columns]


def _spans(length: int, tile: int, field: ReceptiveField | None, stride: int) -> list[Span]:
    if tile == length:
        return [Span(0, 0, length)]
    assert field is not None and tile >= smallest_tile(field, stride)
    spans = [Span(0, 0, tile - field.after)]
    while spans[-1].last < length:
        first = spans[-1].last
        start = min(first - field.before, length - tile)
        last = length if start + tile == length else start + tile - field.after
        spans.append(Span(start, first, last))
    return spans


def smallest_tile(field: ReceptiveField, stride: int) -> int:
    """The smallest side of which a tile keeps at least half."""
    return max(2 * (field.before + field.after), 2 * stride)


def computed_per_kept(tile: int, field: ReceptiveField) -> float:
    """How many pixels are computed for each that is kept, in the inner tiles of a large picture."""
    kept = tile - field.before - field.after
    return (tile / kept) ** 2


def economical_tile(at_least: int, field: ReceptiveField, stride: int) -> int:
    """The smallest side of tiles, of at least `at_least` pixels, that wastes little work.

    A small tile fits caches, but each tile computes a border as wide as the receptive field that
    its neighbours compute again. For wide fields, larger tiles cost less in all.
    """
    tile = max(at_least, smallest_tile(field, stride))
    while computed_per_kept(tile, field) > _MOST_COMPUTED:
        tile += _STEP
    return tile


def tile_for(size: Size, tile: int, field: ReceptiveField, stride: int) -> Size:
    """The tile with sides of at most `tile` pixels that covers a picture with the least work.

    Few sides are considered, so that pictures of many sizes share the shapes of their tiles.
    """
    lowest = smallest_tile(field, stride)
    sides = {max(tile * eighths // 8 // stride * stride, lowest) for eighths in range(4, 9)}

    def side(length):
        def work(side):
            return len(_spans(length, side, field, stride)) * side

        return min((s for s in sides if s < length), key=lambda s: (work(s), -s), default=length)

    return side(size[0]), side(size[1])


def shared_shapes(sizes: Iterable[Size], most: int) -> list[Size]:
    """Chooses a few shapes of arrays, so that each size fits into one.

    Pairs of shapes that waste the least area are merged until few enough are left.

    Args:
      sizes: one for each image; sizes that occur often weigh more.
      most: how many shapes there may be.
    """
    counts = collections.Counter(sizes)
    if len(counts) <= most:
        return sorted(counts)
    shapes = _coarse(counts)
    sides = np.array(list(shapes), np.float64)
    numbers = np.array(list(shapes.values()), np.float64)
    while len(sides) > most:
        merged = np.maximum(sides[:, None], sides[None])
        areas = numbers * sides.prod(axis=1)
        waste = merged.prod(axis=2) * (numbers[:, None] + numbers) - areas[:, None] - areas
        np.fill_diagonal(waste, math.inf)
        i, j = np.unravel_index(waste.argmin(), waste.shape)
        sides[i], numbers[i] = merged[i, j], numbers[i] + numbers[j]
        sides, numbers = np.delete(sides, j, axis=0), np.delete(numbers, j)
    return sorted({(int(height), int(width)) for height, width in sides})


def smallest_containing(size: Size, shapes: Iterable[Size]) -> Size | None:
    """Of some shapes, the one of least area into which a size fits."""
    fitting = [shape for shape in shapes if shape[0] >= size[0] and shape[1] >= size[1]]
    return min(fitting, key=math.prod, default=None)


def _coarse(counts: Mapping[Size, int]) -> collections.Counter:
    """Sizes rounded up to powers of a factor, which grows until few enough are distinct."""
    shapes, factor = collections.Counter(counts), 1.0
    while len(shapes) > _MOST_MERGED:
        factor += 0.02
        keys = [tuple(math.ceil(math.log(side, factor)) for side in size) for size in counts]
        # Of those that are rounded alike, the largest sides are enough.
        largest = {}
        for size, key in zip(counts, keys, strict=True):
            before = largest.get(key, (0, 0))
            largest[key] = (max(before[0], size[0]), max(before[1], size[1]))
        shapes = collections.Counter()
        for size, key in zip(counts, keys, strict=True):
            shapes[largest[key]] += counts[size]
    return shapes
