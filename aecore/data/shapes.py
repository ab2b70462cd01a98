"""The few shapes of array that pictures of many sizes share."""

import collections
import math
from collections.abc import Iterable, Mapping

import numpy as np

Size = tuple[int, int]
"""Height and width."""

_MOST_MERGED = 256
"""Distinct sizes between which the best merges are looked for."""


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
