"""Random crops of pictures at full resolution.

Which crops an epoch takes, and how each is turned, are functions of `(seed, epoch, index)`: the
number of processes, the feed, and what was read before change nothing.
"""

import dataclasses
import functools
import logging
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from aecore.data.headers import warn
from aecore.data.indexed import Pairs, Shape, Source
from aecore.errors import DataError, ImageError

_log = logging.getLogger(__name__)

_MOST_DRAWS = 1000
"""After so many pictures in a row that can't be used, training gives up."""


@dataclasses.dataclass(frozen=True)
class Crop:
    """How crops are taken."""

    size: tuple[int, int]
    """Height and width; of pairs, the original's."""
    per_image: int = 1
    """Crops of each picture in an epoch."""
    small: Literal["skip", "pad"] = "skip"
    """Whether pictures smaller than the crop are left out, or mirrored at their lower and right
    edges until they are large enough."""
    turn: bool = False
    """Whether each crop is turned and mirrored at random."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where crops lie: arrays of `(n,)` integers."""

    image: np.ndarray
    """The picture's index."""
    top: np.ndarray
    """The first row; of pairs, the original's."""
    left: np.ndarray
    """The first column; of pairs, the original's."""
    turn: np.ndarray
    """How the crop is turned, as for `turned`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where pictures of several sizes lie in one array of their pixels."""

    start: np.ndarray
    """`(N,)` int64: each picture's first pixel."""
    width: np.ndarray
    """`(N,)` int64: their widths."""
    scale: int
    """How many times larger the originals are, to which places belong."""

    def locate(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """The first pixel of each crop, and the width of its picture."""
        width = self.width[places.image]
        row, column = places.top // self.scale, places.left // self.scale
        return self.start[places.image] + row * width + column, width


@dataclasses.dataclass(frozen=True)
class Packed:
    """Pictures of several sizes in one array."""

    planes: np.ndarray
    """`(C, P)` uint8: the pixels of one picture after another, row by row."""
    layout: Layout


class _TooSmallError(ImageError):
    """A picture that is smaller than the crop."""


class Crops:
    """What an epoch takes from a source: `per_image` crops of each picture.

    The epoch's crop number n is of picture n modulo their number. In place of a picture that is
    broken or too small another one is drawn, so that the length of an epoch is known before a file
    is opened.

    Args:
      source: the pictures.
      crop: how crops are taken.
      grid: crops start at multiples of it, in pixels.

    Raises:
      DataError: the crop's size is no multiple of the pairs' scale.
    """

    def __init__(self, source: Source, crop: Crop, grid: int = 1):
        self._source = source
        self._crop = crop
        self._parts = (source.degraded, source.original) if isinstance(source, Pairs) else (source,)
        scale = source.scale if isinstance(source, Pairs) else 1
        if any(side % scale for side in crop.size):
            raise DataError(
                f"--data.crop {crop.size[0]} {crop.size[1]} is not a multiple of {scale}, by which "
                "the originals are larger than the degraded pictures; use one that is"
            )
        # How many times larger than each of the parts the originals are.
        self._scales = (scale, 1) if isinstance(source, Pairs) else (1,)
        self._grid = math.lcm(grid, scale)
        self._left_out: dict[int, ImageError] = {}
        self._noted = 0
        self._lock = threading.Lock()
        self._workers = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)

    def __len__(self) -> int:
        return len(self._source) * self._crop.per_image

    @property
    def shape(self) -> Shape:
        """Height, width and channels of a crop; of pairs, the original's."""
        return (*self._crop.size, self._source.channels)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The crop's shape; of pairs, the degraded one's and the original's."""
        height, width, channels = self.shape
        return tuple((height // scale, width // scale, channels) for scale in self._scales)

    def read(
        self, examples: np.ndarray, *, seed: int, epoch: int, flip: bool = False
    ) -> tuple[np.ndarray, ...]:
        """Reads crops, in parallel.

        Args:
          examples: `(n,)` numbers of crops of the epoch.
          seed: of the crops.
          epoch: from 0 on.
          flip: whether to mirror crops left to right at random; `Crop.turn` does that too.

        Returns:
          `(n, h, w, C)` uint8 crops; of pairs, the degraded ones and the originals.

        Raises:
          DataError: none of the pictures that were drawn can be used.
        """
        numbers = _numbers(seed, epoch, len(self))[examples]
        results = tuple(np.empty((len(examples), *shape), np.uint8) for shape in self.shapes)

        def fill(rows: np.ndarray) -> None:
            for row in rows.tolist():
                *place, turn = numbers[row].tolist()
                cut = self._first_cut(self._candidates(seed, epoch, int(examples[row])), place)
                for result, pixels in zip(results, cut, strict=True):
                    # Pixels are copied whole, which is faster than value by value.
                    pixel = f"V{pixels.shape[2]}"
                    pixels = turned(pixels.view(pixel), turn & self._turns(flip))
                    np.copyto(result[row].view(pixel), pixels)

        self._in_parallel(fill, len(examples))
        return results

    def places(self, examples: np.ndarray, *, seed: int, epoch: int, flip: bool = False) -> Places:
        """Where the crops lie that `read` reads. Broken pictures must be known from `pack`."""
        numbers = _numbers(seed, epoch, len(self))[examples]
        index = examples % len(self._source)
        for row in np.flatnonzero(np.isin(index, list(self._left_out))):
            others = self._candidates(seed, epoch, int(examples[row]))
            if (other := next(others, None)) is None:
                raise self._unusable()
            index[row] = other
        heights, widths = np.array([self._padded_size(i) for i in index.tolist()], np.uint64).T
        top, left = (
            _offset(number, sides - np.uint64(side), np.uint64(self._grid)).astype(np.int64)
            for number, sides, side in zip(
                numbers.T, (heights, widths), self._crop.size, strict=False
            )
        )
        turn = (numbers[:, 2] & np.uint64(self._turns(flip))).astype(np.int32)
        return Places(index, top, left, turn)

    def pack(self, check: Callable[[int], None] = lambda _: None) -> tuple[Packed, ...]:
        """Decodes all pictures, in parallel, into one array; of pairs, into one each.

        Those that are too small are left out, or padded.

        Args:
          check: called with the bytes that this takes, before it begins; may raise.

        Raises:
          DataError: none can be used.
        """
        sizes = np.zeros((len(self._source), 2), np.int64)

        def measure(rows: np.ndarray) -> None:
            for index in rows.tolist():
                try:
                    self._check(index)
                    sizes[index] = self._padded_size(index)
                except ImageError as error:
                    self._leave_out(index, error)

        self._in_parallel(measure, len(sizes))
        pixels = sum(int((sizes // scale).prod(1).sum()) for scale in self._scales)
        check(pixels * self._source.channels)
        packed = []
        for scale in self._scales:
            height, width = sizes.T // scale
            stop = np.cumsum(height * width)
            planes = np.empty((self._source.channels, stop[-1]), np.uint8)
            packed.append(Packed(planes, Layout(stop - height * width, width, scale)))

        def fill(rows: np.ndarray) -> None:
            for index in rows.tolist():
                if index in self._left_out:
                    continue
                try:
                    for part, pictures in zip(self._parts, packed, strict=True):
                        size = sizes[index] // pictures.layout.scale
                        pixels = pad(part[index], *size).reshape(-1, len(pictures.planes))
                        start = pictures.layout.start[index]
                        pictures.planes[:, start : start + len(pixels)] = pixels.T
                except ImageError as error:
                    self._leave_out(index, error)

        self._in_parallel(fill, len(sizes))
        self.note_small()
        if len(self._left_out) == len(sizes):
            raise self._unusable()
        return tuple(packed)

    def note_small(self) -> None:
        """Warns of how many pictures have been found too small, if there are new ones."""
        with self._lock:
            count = sum(isinstance(e, _TooSmallError) for e in self._left_out.values())
            is_new, self._noted = count > self._noted, count
        if is_new and count < len(self._source):  # Otherwise an error says so.
            _log.warning(
                "skipped: %d of %d pictures are smaller than the crop of %dx%d; "
                "--data.small pad keeps them",
                count,
                len(self._source),
                *self._crop.size,
            )

    def _candidates(self, seed: int, epoch: int, example: int) -> Iterator[int]:
        """The picture that a crop is of, then others at random, without those left out."""
        index = example % len(self._source)
        for draw in range(_MOST_DRAWS):
            if index not in self._left_out:
                yield index
            bits = _philox("replacement", seed, epoch, example, draw).random_raw()
            index = _offset(int(bits), len(self._source) - 1, 1)

    def _unusable(self) -> DataError:
        _, reason = self._left_out.copy().popitem()
        return DataError(
            f"too few of the {len(self._source)} pictures can be used (for example: {reason}); "
            "use others with --data.data-dir, or a smaller --data.crop"
        )

    def _leave_out(self, index: int, error: ImageError) -> None:
        with self._lock:
            is_new = index not in self._left_out
            self._left_out[index] = error
        if is_new and not isinstance(error, _TooSmallError):
            warn(error, self._source)

    def _check(self, index: int) -> None:
        """Raises ImageError if a picture can't be used, as far as its size tells."""
        own, size = self._source.shape(index), self._crop.size
        if self._crop.small == "skip" and (own[0] < size[0] or own[1] < size[1]):
            raise _TooSmallError(f"one is {own[0]}x{own[1]}, smaller than {size[0]}x{size[1]}")

    def _padded_size(self, index: int) -> tuple[int, int]:
        height, width, _ = self._source.shape(index)
        return max(height, self._crop.size[0]), max(width, self._crop.size[1])

    def _first_cut(self, candidates: Iterator[int], place: list[int]) -> list[np.ndarray]:
        """The crops of the first picture that can be used."""
        for index in candidates:
            try:
                return self._cut(index, place)
            except ImageError as error:
                self._leave_out(index, error)
        raise self._unusable()

    def _cut(self, index: int, place: list[int]) -> list[np.ndarray]:
        """The crops of one picture at the place that two random numbers choose."""
        self._check(index)
        sides = zip(place, self._padded_size(index), self._crop.size, strict=True)
        top, left = (_offset(number, size - side, self._grid) for number, size, side in sides)
        cut = []
        for part, scale, (height, width, _) in zip(
            self._parts, self._scales, self.shapes, strict=True
        ):
            pixels = part.window(index, top // scale, left // scale, height, width)
            cut.append(pad(pixels, height, width))
        return cut

    def _turns(self, flip: bool) -> int:
        """Which of the bits of `turned`'s code are drawn."""
        return 7 if self._crop.turn else int(flip)

    def _in_parallel(self, work: Callable[[np.ndarray], None], count: int) -> None:
        """Does work for the numbers below a count, of which each thread gets a part."""
        parts = np.array_split(np.arange(count), min(count, self._workers))
        list(self._pool.map(work, parts))


def central(source: Source, size: tuple[int, int], count: int) -> tuple[np.ndarray, ...]:
    """The middle of each of the first pictures, without broken ones.

    Args:
      source: the pictures. Small ones are padded.
      size: height and width; of pairs, the original's.
      count: of pictures at most.

    Returns:
      `(n, h, w, C)` uint8 crops; of pairs, the degraded ones and the originals.

    Raises:
      DataError: all of them are broken.
    """
    scale = source.scale if isinstance(source, Pairs) else 1
    parts: list[tuple[Source, int]] = [(source, 1)]
    if isinstance(source, Pairs):
        parts = [(source.degraded, scale), (source.original, 1)]

    def cut(index: int) -> list[np.ndarray] | None:
        try:
            sides = zip(source.shape(index), size, strict=False)
            top, left = (max(0, own - side) // 2 // scale * scale for own, side in sides)
            found = []
            for part, factor in parts:
                height, width = (side // factor for side in size)
                pixels = part.window(index, top // factor, left // factor, height, width)
                found.append(pad(pixels, height, width))
            return found
        except ImageError as error:
            warn(error, source)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [crop for crop in pool.map(cut, range(min(count, len(source)))) if crop is not None]
    if not found:
        raise DataError(f"none of the first {count} pictures for validation can be read")
    return tuple(map(np.stack, zip(*found, strict=True)))


def turned(image: np.ndarray, code: int) -> np.ndarray:
    """One of the eight ways to mirror and turn an image.

    Args:
      image: `(H, W, ...)`.
      code: 0 to 7. Rows and columns are exchanged if its bit 4 is set; then the image is mirrored
        top to bottom if bit 2 is set, and left to right if bit 1 is.
    """
    if code & 4:
        image = image.swapaxes(0, 1)
    if code & 2:
        image = image[::-1]
    return image[:, ::-1] if code & 1 else image


def pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mirrors an image at its lower and right edge, edge pixels repeated, to at least a size."""
    missing = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    if not any(missing):
        return image
    # Unlike a mirror without the edge itself, it does the same at each scale.
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")


def _offset(number: Any, room: Any, grid: Any) -> Any:
    """A multiple of `grid` from 0 to `room`, each as likely, chosen by 64 random bits."""
    return ((number >> 32) * (room // grid + 1) >> 32) * grid


def _philox(name: str, seed: int, epoch: int, *counter: int) -> np.random.Philox:
    """Random bits that depend on these arguments only."""
    counter = (0, *counter, *[0] * (2 - len(counter)), zlib.crc32(name.encode()))
    return np.random.Philox(key=[seed, epoch], counter=list(counter))


@functools.lru_cache(maxsize=4)  # Batches that are made at once may lie in two epochs.
def _numbers(seed: int, epoch: int, count: int) -> np.ndarray:
    """`(count, 3)` uint64: the random numbers of an epoch's crops."""
    return _philox("crop", seed, epoch).random_raw(3 * count).reshape(count, 3)
