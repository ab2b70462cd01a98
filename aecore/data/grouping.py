"""Whole pictures of several sizes in batches of few shapes, for evaluation."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aecore.data.ahead import results_ahead
from aecore.data.crops import pad
from aecore.data.headers import readable_shapes, warn
from aecore.data.indexed import Pairs, Shape, Source
from aecore.data.shapes import Size, shared_shapes, smallest_containing
from aecore.errors import ImageError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PictureBatch:
    """Pictures, each mirrored at its lower and right edge to the batch's shape."""

    original: np.ndarray
    """`(B, H, W, C)` uint8."""
    degraded: np.ndarray | None
    """Of pairs, `(B, H / scale, W / scale, C)` uint8; else None."""
    sizes: np.ndarray
    """`(B, 2)` int32: the originals' own heights and widths. 0: there is no picture."""
    indices: np.ndarray
    """`(B,)` int32 positions in the source, on which noise should depend."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that share a shape."""

    shape: Shape
    """Height, width and channels of the arrays that they are put into."""
    members: list[int]
    """Their indices, in order."""


class GroupedPictures:
    """Pictures of several sizes, divided into groups of few shapes.

    Broken ones are left out, with a warning for each.

    Args:
      source: the pictures.
      most_shapes: for as many shapes a network will be compiled.
      multiple: what heights and widths of the shapes are multiples of, such as a network's stride.
      least: pictures with a side below it are left out, with one warning.

    Attributes:
      groups: the groups.
    """

    def __init__(self, source: Source, *, most_shapes: int = 6, multiple: int = 1, least: int = 1):
        self._source = source
        self._scale = source.scale if isinstance(source, Pairs) else 1
        self._broken: set[int] = set()
        self.groups: list[Group] = []
        sizes = {}
        too_small = 0
        readable = readable_shapes(source.shape, range(len(source)), source)
        for index, (height, width, _) in readable:
            if min(height, width) < least:
                too_small += 1
            else:
                sizes[index] = height, width
        if too_small:
            _log.warning("skipped: %d of the pictures have sides below %d pixels", too_small, least)
        if not sizes:
            return
        step = math.lcm(multiple, self._scale)
        rounded = {
            index: (-(-height // step) * step, -(-width // step) * step)
            for index, (height, width) in sizes.items()
        }
        shapes = shared_shapes(rounded.values(), most_shapes)
        found: dict[Size, list[int]] = {}
        for index, size in rounded.items():
            shape = smallest_containing(size, shapes)
            assert shape is not None
            found.setdefault(shape, []).append(index)
        self.groups = [
            Group((height, width, source.channels), members)
            for (height, width), members in sorted(found.items())
        ]

    def batch_shapes(self, group: Group, size: int) -> tuple[Any, Any]:
        """Shapes of `original` and `degraded` in batches of a group, the latter maybe None."""
        height, width, channels = group.shape
        smaller = (size, height // self._scale, width // self._scale, channels)
        return (size, *group.shape), smaller if isinstance(self._source, Pairs) else None

    def batches(
        self,
        batch_size: Callable[[Group], int],
        share: Callable[[int], slice] = lambda size: slice(0, size),
    ) -> Iterator[PictureBatch]:
        """Every picture once; those of one shape are in order of their indices.

        Args:
          batch_size: how many pictures make a batch of a group.
          share: which rows of a batch of a size to make, without reading the others.
        """
        plan = []
        for group in self.groups:
            size = batch_size(group)
            rows = share(size)
            for start in range(0, len(group.members), size):
                members = group.members[start : start + size]
                plan.append((group, members[rows], rows.stop - rows.start))
        with ThreadPoolExecutor(1) as pool:
            yield from results_ahead(lambda part: pool.submit(self._read, *part), plan)

    def _read(self, group: Group, members: list[int], count: int) -> PictureBatch:
        original_shape, degraded_shape = self.batch_shapes(group, count)
        batch = PictureBatch(
            original=np.zeros(original_shape, np.uint8),
            degraded=None if degraded_shape is None else np.zeros(degraded_shape, np.uint8),
            sizes=np.zeros((count, 2), np.int32),
            indices=np.zeros(count, np.int32),
        )
        for row, index in enumerate(members):
            if index in self._broken:
                continue
            try:
                original = self._source[index]
                batch.original[row] = pad(original, *original_shape[1:3])
                if isinstance(self._source, Pairs):
                    assert batch.degraded is not None
                    degraded = self._source.degraded[index]
                    batch.degraded[row] = pad(degraded, *batch.degraded.shape[1:3])
            except ImageError as error:
                self._broken.add(index)
                warn(error, self._source)
                continue
            batch.sizes[row] = original.shape[:2]
            batch.indices[row] = index
        return batch
