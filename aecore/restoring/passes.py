"""Restores images with an engine: collects windows in batches, and puts results together."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from aecore.data.shapes import Size, smallest_containing
from aecore.restoring.engine import Engine, refuse_fork
from aecore.restoring.programs import BatchKind, OutOfMemoryError, as_out_of_memory
from aecore.restoring.tiling import Window

_AHEAD = 2
"""Batches under way on the device while the host prepares the next one."""


def restore(
    engine: Engine,
    images: Iterable[np.ndarray],
    shapes: Sequence[Size] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[np.ndarray]:
    """Restores images, of which consecutive ones of one shape are batched.

    Args:
      images: `(N, H, W, C)`, taken as they are needed, some ahead. If taking some fails, those
        before them are restored first.
      shapes: those of the images' `Schedule`, if their sizes were known beforehand.
      progress: called when more is done, with how much that is, 1 for each item of `images`.
        What it raises ends the work.

    Yields:
      The restored images `(N, s H, s W, C)`, in order, where s is the network's scale.

    Raises:
      ImageError: the device's memory doesn't suffice.
    """
    refuse_fork()
    return _Pass(engine, shapes, progress)(images)


class _Stack:
    """Images of one size, and what is restored of them so far."""

    def __init__(self, array: np.ndarray, windows: list[Window], scale: int):
        count, height, width, channels = array.shape
        self.array = array
        self.windows = windows
        self.result = np.empty((count, scale * height, scale * width, channels), array.dtype)
        self.missing = len(array) * len(windows)


class _Piece(NamedTuple):
    """One window of some images, as a part of a batch."""

    stack: _Stack
    window: Window
    part: slice

    def __len__(self) -> int:
        return self.part.stop - self.part.start


class _Pass:
    """One pass over images: collects windows in batches, computes them, puts results together."""

    def __init__(self, engine: Engine, shapes: Sequence[Size], progress: Callable[[float], None]):
        self._engine = engine
        self._shapes = shapes
        self._progress = progress
        self._tile = engine.tile
        self._waiting = collections.deque()
        self._stacks = collections.deque()
        self._kind: BatchKind | None = None
        self._collected = []
        self._computing = collections.deque()
        self._counts = {}

    def __call__(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        images, failure = iter(images), None
        while failure is None:
            try:
                self._waiting.append(next(images))
            except StopIteration:
                break
            except Exception as error:  # Of whoever gives the images.
                failure = error
            self._go_on(self._start)
            yield from self._finished()
        while self._stacks:
            self._go_on(self._finish)
            yield from self._finished()
        if failure is not None:
            raise failure

    def _finished(self) -> Iterator[np.ndarray]:
        while self._stacks and not self._stacks[0].missing:
            yield self._stacks.popleft().result

    def _go_on(self, work: Callable[[], None]) -> None:
        """Does some work; where memory runs out, does what is unfinished again in smaller tiles."""
        while True:
            try:
                return work()
            except OutOfMemoryError as error:
                self._engine.shrink(self._tile, error)
                # These shapes were chosen for larger tiles.
                self._tile, self._shapes = self._engine.tile, ()
                self._counts.clear()
                self._waiting.extendleft(stack.array for stack in reversed(self._stacks))
                self._stacks.clear()
                self._collected.clear()
                self._computing.clear()
                work = self._start

    def _start(self) -> None:
        while self._waiting:
            images = self._waiting.popleft()
            stack = _Stack(images, self._engine.windows(images.shape[1:3]), self._engine.scale)
            self._stacks.append(stack)
            for window in stack.windows:
                shape = smallest_containing(window.size, self._shapes)
                shape = shape or self._engine.shape_for(window.size)
                kind = BatchKind(shape, images.dtype, images.shape[3])
                if kind != self._kind:
                    self._flush()
                    self._kind = kind
                self._collect(stack, window, kind)

    def _collect(self, stack: _Stack, window: Window, kind: BatchKind) -> None:
        first = 0
        most = self._engine.most_images(kind.shape) * len(self._engine.devices)
        while first < len(stack.array):
            room = most - sum(map(len, self._collected))
            part = slice(first, min(first + room, len(stack.array)))
            self._collected.append(_Piece(stack, window, part))
            if len(self._collected[-1]) == room:
                self._flush()
            first = part.stop

    def _finish(self) -> None:
        self._flush()
        while self._computing:
            self._take_in()

    def _flush(self) -> None:
        """Starts computing what was collected."""
        kind, pieces = self._kind, self._collected
        if kind is None or not pieces:
            return
        engine = self._engine
        # A batch that isn't full is filled up, as another size would be compiled anew.
        wanted, most = sum(map(len, pieces)), engine.most_images(kind.shape)
        count = self._counts.setdefault(kind, _next_power_of_2(wanted, most))
        if count < wanted:
            count = self._counts[kind] = most
        total = -(-wanted // count) * count
        batch = np.zeros((total, *kind.shape, kind.channels), kind.dtype)
        sizes = np.full((total, 2), kind.shape, np.int32)
        for piece, place in _places(pieces):
            height, width = piece.window.size
            sizes[place] = height, width
            batch[place, :height, :width] = _cut(piece.stack.array[piece.part], piece.window)
        self._computing.append((engine.programs.start(kind, count, batch, sizes), pieces, kind))
        self._collected = []
        while len(self._computing) > _AHEAD:
            self._take_in()

    def _take_in(self) -> None:
        """Waits for the oldest batch and copies its windows into the results."""
        restored, pieces, kind = self._computing[0]
        try:
            restored = jax.device_get(restored)
        except jax.errors.JaxRuntimeError as error:
            raise as_out_of_memory(error, kind) from error
        self._computing.popleft()
        restored = restored[0] if len(restored) == 1 else np.concatenate(restored)
        scale = self._engine.scale
        for piece, place in _places(pieces):
            (rows, columns, _), stack = piece.window, piece.stack
            to_rows = slice(scale * rows.first, scale * rows.last)
            to_columns = slice(scale * columns.first, scale * columns.last)
            target = stack.result[piece.part, to_rows, to_columns]
            height, width = target.shape[1:3]
            top, left = scale * (rows.first - rows.start), scale * (columns.first - columns.start)
            target[:] = restored[place, top : top + height, left : left + width]
            stack.missing -= len(piece)
            self._progress(len(piece) / (len(stack.array) * len(stack.windows)))


def _places(pieces: list[_Piece]) -> Iterator[tuple[_Piece, slice]]:
    """Each piece, and where its images are in the batch."""
    first = 0
    for piece in pieces:
        yield piece, slice(first, first + len(piece))
        first += len(piece)


def _cut(images: np.ndarray, window: Window) -> np.ndarray:
    """What a window shows; beyond the images' end, their reflection."""
    (top, *_), (left, *_), (height, width) = window
    part = images[:, top : top + height, left : left + width]
    missing = [(0, 0), (0, height - part.shape[1]), (0, width - part.shape[2]), (0, 0)]
    return np.pad(part, missing, mode="reflect") if missing[1][1] or missing[2][1] else part


def _next_power_of_2(number: int, most: int) -> int:
    return min(2 ** math.ceil(math.log2(number)), most)
