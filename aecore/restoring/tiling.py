"""Windows that cover a picture."""

from typing import NamedTuple

from aecore.data.shapes import Size
from aecore.networks.receptive_field import ReceptiveField

_MOST_COMPUTED = 2.0
"""Pixels computed for each that is kept, where memory allows such large tiles."""

_STEP = 64
"""Pixels by which tiles grow in looking for a side."""


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
