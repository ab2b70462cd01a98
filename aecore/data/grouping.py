"""Whole pictures of several sizes in batches of few shapes, for evaluation."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from aecore.data.crops import pad
from aecore.data.indexed import Pairs, Shape, Source
from aecore.errors import ImageError

_log = logging.getLogger(__name__)

_MOST_TO_MERGE = 64
"""Among so many shapes at most, the best two to make one of are searched for."""


@dataclasses.dataclass(frozen=True)
class PictureBatch:
    """Pictures, each mirrored at its lower and right edge to the batch's shape.

    Each batch of a shape has the same number of pictures. Copies that are not counted fill up the
    last one.
    """

    original: np.ndarray
    """`(B, H, W, C)` uint8."""
    degraded: np.ndarray | None
    """Of pairs, `(B, H / scale, W / scale, C)` uint8; else None."""
    sizes: np.ndarray
    """`(B, 2)` int32: the originals' own heights and widths."""
    indices: np.ndarray
    """`(B,)` int32 positions in the source, on which noise should depend."""
    count: int
    """How many of them, from the first, are counted."""


def picture_batches(
    source: Source,
    batch_size: Callable[[Shape], int],
    *,
    most_shapes: int = 6,
    multiple: int = 1,
) -> Iterator[PictureBatch]:
    """Every picture once, in batches of at most `most_shapes` shapes.

    Pictures of one shape are in order of their indices. Broken ones are skipped with a warning.

    Args:
      source: the pictures.
      batch_size: how many pictures of a shape make a batch; fewer if there aren't as many.
      most_shapes: for as many shapes a network will be compiled.
      multiple: what heights and widths of the shapes are multiples of, such as a network's stride.
    """
    sizes = {}
    for index in range(len(source)):
        try:
            sizes[index] = source.shape(index)[:2]
        except ImageError as error:
            _log.warning("skipped: %s", error)
    if not sizes:
        return
    scale = source.scale if isinstance(source, Pairs) else 1
    step = int(np.lcm(multiple, scale))
    shapes = shared_shapes(np.array(list(sizes.values())), most_shapes, step)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, shape in zip(sizes, shapes.tolist(), strict=True):
        groups.setdefault(tuple(shape), []).append(index)
    plan = []
    for (height, width), members in sorted(groups.items()):
        size = min(batch_size((height, width, source.channels)), len(members))
        parts = (members[start : start + size] for start in range(0, len(members), size))
        plan += [((height, width), part, size) for part in parts]

    def read(shape: tuple[int, int], members: list[int], size: int) -> PictureBatch | None:
        good, images = [], []
        for index in members:
            try:
                image = pad(source[index], *shape)
                degraded = None
                if isinstance(source, Pairs):
                    degraded = pad(source.degraded[index], *(side // scale for side in shape))
            except ImageError as error:
                _log.warning("skipped: %s", error)
                continue
            good.append(index)
            images.append((image, degraded))
        if not good:
            return None
        count = len(good)
        good += good[:1] * (size - count)
        images += images[:1] * (size - count)
        originals, degraded = zip(*images, strict=True)
        return PictureBatch(
            np.stack(originals),
            np.stack(degraded) if isinstance(source, Pairs) else None,
            np.array([sizes[index] for index in good], np.int32),
            np.array(good, np.int32),
            count,
        )

    # The next batch is read while one is used.
    with ThreadPoolExecutor(1) as pool:
        ahead: Future | None = None
        for arguments in [*plan, None]:
            ready, ahead = ahead, pool.submit(read, *arguments) if arguments else None
            if ready is not None and (batch := ready.result()) is not None:
                yield batch


def shared_shapes(sizes: np.ndarray, most: int, multiple: int) -> np.ndarray:
    """Few shapes into which pictures of many sizes fit, with little to spare.

    Args:
      sizes: `(N, 2)` heights and widths.
      most: shapes there may be.
      multiple: of what the shapes' heights and widths are multiples.

    Returns:
      `(N, 2)`: for each picture a shape that is at least as large.
    """
    step = multiple
    while True:
        rounded = -(-sizes // step) * step
        shapes, member, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
        if len(shapes) <= max(most, _MOST_TO_MERGE):
            break
        step *= 2
    member = member.reshape(-1)
    while len(np.unique(member)) > most:
        # The two shapes become one whose union adds the fewest pixels.
        used = np.unique(member)
        union = np.maximum(shapes[used][:, None], shapes[used][None])
        area = shapes.prod(axis=1) * counts
        added = union.prod(axis=2) * (counts[used][:, None] + counts[used][None])
        added = added - area[used][:, None] - area[used][None]
        np.fill_diagonal(added, np.iinfo(added.dtype).max)
        first, second = used[list(np.unravel_index(added.argmin(), added.shape))]
        shapes[first] = np.maximum(shapes[first], shapes[second])
        counts[first] += counts[second]
        member[member == second] = first
    return shapes[member]
