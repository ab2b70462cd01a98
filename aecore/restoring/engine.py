"""A network on devices: images of any size, through few compiled shapes, in batches and tiles.

Images are `(N, H, W, C)` uint8, uint16 or float32 in [0, 1]. A network for colour restores gray
images as three equal channels and takes their mean.

Where there are several devices, each computes batches of the size that one device alone would
compute, of the same images, so that the results are the same bit for bit.
"""

import collections
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aecore.data.shapes import Size, shared_shapes, smallest_containing
from aecore.errors import ConfigError, ImageError
from aecore.networks.network import Network, fits_within
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import tiling
from aecore.restoring.tiling import Window
from aecore.steps import memory
from aecore.steps.devices import Devices

_log = logging.getLogger(__name__)

_TILE = {"cpu": 384}
_OTHER_TILE = 512
"""The side of tiles for networks that see little around a pixel; on CPUs, caches should hold
much of one. Networks that see far get larger tiles; see `tiling.economical_tile`.

On 2 cores, sides of 256, 384 and 512 take 7.8, 6.9 and 6.2 s for 1.5 megapixels with
`photo-upscale-2x`, and 0.5, 0.4 and 0.8 s for 12 with `fashion-mnist-denoise`."""

_SMALLEST_TILE = 64
"""Where memory is short, tiles become no smaller than this."""

_SMALLEST_SQUARE = 32

_MOST_IMAGES = 64
"""Images at a time. More would hardly lower the cost of a call for each."""

_MOST_PIXELS = {"cpu": 2**17}
_OTHER_MOST_PIXELS = 2**19
"""Pixels of several images at a time."""

_OWN_SHAPES = 2
"""How many sizes get arrays of their own shape where sizes are not known beforehand."""

_SHARED_SHAPES = 4
"""Most shapes of arrays for images whose sizes are known beforehand. Two more programs may be
compiled to learn about a network: whether sizes can share shapes, and its receptive field."""

_CPU_MEMORY = 2**30
"""Bytes that a network may need on a CPU, besides its inputs and outputs."""

_AHEAD = 2
"""Batches under way on the device while the host prepares the next one."""


class BatchKind(NamedTuple):
    """What a program is compiled for, besides the number of images."""

    shape: Size
    """Height and width of the arrays that images are put into."""
    dtype: np.dtype
    channels: int


class Program(NamedTuple):
    """What one compiled program restores."""

    kind: BatchKind
    images: int
    """How many each device restores."""
    within: bool
    """Whether images are smaller than their arrays; then `(images, 2)` sizes follow."""
    on_all: bool
    """Whether it runs on all devices."""


class Schedule(NamedTuple):
    """How images whose sizes are known beforehand are restored with little compiling and waste."""

    order: list[Any]
    """The images' keys; those of images that share a shape are neighbours."""
    shapes: list[Size]
    """Of the arrays that they share; none if each needs an array of its own size."""


_process: int | None = None


def refuse_fork() -> None:
    """Raises a ConfigError in a process that was forked from one that already used JAX here.

    JAX's threads don't survive a fork, so that computing would wait for them forever.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise ConfigError(
            "this process was forked after its parent used JAX, which can't work; start processes "
            'with multiprocessing.get_context("spawn") or "forkserver"'
        )


class Engine:
    """Runs a network; keeps what it compiles; safe to use from several threads.

    Args:
      network: what to run.
      params: its parameters.
      tile: `"auto"`, 0 for whole pictures always, or the side of tiles.
      batch_size: most images at a time; None for as many as are worth it.
      precision: `"float32"`, `"bfloat16"`, or `"auto"`.
      devices: of one platform; what is more than a batch is divided among them.

    Raises:
      ConfigError: a setting is out of bounds.
    """

    def __init__(
        self,
        network: Network,
        params: Any,
        *,
        tile: Literal["auto"] | int,
        batch_size: int | None,
        precision: Literal["auto", "float32", "bfloat16"],
        devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
    ):
        if tile != "auto" and not (isinstance(tile, int) and tile >= 0):
            raise ConfigError(f"tile {tile!r} is not possible; use auto, 0 for none, or a side")
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise ConfigError(f"batch_size {batch_size!r} is not possible; use 1 or more, or None")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision {precision!r} is unknown; use float32 or bfloat16")
        if precision == "auto":
            precision = "bfloat16" if devices[0].platform == "tpu" else "float32"
        self.network = network
        self.scale = network.scale
        self.devices = tuple(devices)
        self._all = Devices(devices)
        self._params = params
        self._computed = network.in_precision(precision)
        self._tile_setting = tile
        default = _TILE.get(devices[0].platform, _OTHER_TILE)
        self._tile = default if tile == "auto" else tile
        self._has_grown = False
        self._batch_size = batch_size
        self._most_pixels = _MOST_PIXELS.get(devices[0].platform, _OTHER_MOST_PIXELS)
        self._known: dict[Any, Any] = {}
        self._shapes: list[Size] = []
        self._lock = threading.RLock()

    def run(
        self,
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
        return _Pass(self, shapes, progress)(images)

    def plan(self, sizes: Mapping[Any, Size], more_follow: bool = False) -> Schedule:
        """In which order to restore images of these sizes, and in arrays of which few shapes.

        Args:
          sizes: height and width of each image, by any key.
          more_follow: whether the shapes should stay few over all calls, of which each has other
            sizes. They waste more than shapes chosen for these sizes alone.
        """
        parts = [window.size for size in sizes.values() for window in self.windows(size)]
        shapes = []
        if more_follow:
            shapes = sorted(set(map(self.shape_for, parts)))
        elif len(set(parts)) <= _SHARED_SHAPES or self._can_share:
            shapes = shared_shapes(parts, _SHARED_SHAPES)

        def shape(key):
            return smallest_containing(sizes[key], shapes) or sizes[key]

        return Schedule(sorted(sizes, key=shape), shapes)

    def in_parts(
        self, method: Literal["encode", "decode"], batch: np.ndarray, shape: Size
    ) -> np.ndarray:
        """Another function of the network, on `(N, ., ., .)` float32, some at a time.

        Args:
          method: which.
          batch: what it takes.
          shape: height and width of the images.

        Raises:
          ImageError: the device's memory doesn't suffice.
        """
        refuse_fork()
        most = self.most_images(shape)
        on_all = len(batch) > most and len(self.devices) > 1
        function = self._once(
            (method, on_all), lambda: self._function(getattr(self._computed, method), on_all)
        )
        most *= len(self.devices) if on_all else 1
        parts = []
        for start in range(0, len(batch), most):
            part = batch[start : start + most]
            count = len(part)
            if count < most and (start or on_all):
                # Filled up, as another size would be compiled anew.
                part = np.pad(part, [(0, most - count), (0, 0), (0, 0), (0, 0)])
            try:
                part = jax.device_put(part, self._sharding(on_all))
                parts.append(jax.device_get(function(self.params(on_all), (part,)))[:count])
            except jax.errors.JaxRuntimeError as error:
                if memory.ran_out(error):
                    raise self._memory_error(shape, "use smaller images") from error
                raise
        return np.concatenate(parts)

    def params(self, on_all: bool) -> Any:
        """The parameters, on the first device or on all."""
        sharding = self._all.replicated if on_all else self._sharding(False)
        return self._once(("params", on_all), lambda: jax.device_put(self._params, sharding))

    def _sharding(self, on_all: bool) -> jax.sharding.Sharding:
        """Of arrays that the first device holds, or of which each device holds a part."""
        return self._all.sharded if on_all else jax.sharding.SingleDeviceSharding(self.devices[0])

    def _function(self, function: Callable, on_all: bool) -> Any:
        """A function `(params, *arrays)`, jitted as `(params, arrays)`, for the devices."""

        def on_one(params, arrays):
            return function(params, *arrays)

        return jax.jit(
            self._all.divided(function) if on_all else on_one,
            compiler_options=self._all.options,
        )

    @property
    def field(self) -> ReceptiveField | None:
        """The network's receptive field; None if it sees the whole image at once."""
        return self._once("field", lambda: self.network.receptive_field(self._params))

    @property
    def _can_share(self) -> bool:
        return self._once("can share", lambda: fits_within(self.network, self._params))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Makes something once, in one thread, while others wait for it."""
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
            return self._known[key]

    # ---- Sizes and shapes

    def windows(self, size: Size) -> list[Window]:
        """The windows in which an image is restored, in a picture extended to the stride.

        Raises:
          ConfigError: the setting asks for tiles that the network can't be restored in.
        """
        stride = self.network.stride
        size = (-(-size[0] // stride) * stride, -(-size[1] // stride) * stride)
        whole = tiling.windows(size, size, None, stride)
        if self._is_whole(size, self._tile):
            return whole
        is_auto = self._tile_setting == "auto"
        if self.field is None:
            if is_auto:
                return whole
            raise ConfigError(
                f"{self.network.name} looks at whole pictures at once, so that it can't restore "
                "them in tiles; use tile 0"
            )
        lowest = tiling.smallest_tile(self.field, stride)
        if is_auto:
            self._grow_once(self.field)
            if self._is_whole(size, self._tile):
                return whole
            tile = tiling.tile_for(size, self._tile, self.field, stride)
        elif self._tile < lowest:
            raise ConfigError(
                f"tiles of {self._tile} pixels are too small for {self.network.name}, which sees "
                f"{self.field.before} and {self.field.after} pixels beyond; use at least {lowest}"
            )
        else:
            side = self._tile // stride * stride
            tile = (side, side)
        return tiling.windows(size, tile, self.field, stride)

    def _grow_once(self, field: ReceptiveField) -> None:
        """Makes tiles as large as the receptive field asks for, when it is first needed."""
        with self._lock:
            if not self._has_grown:
                self._has_grown = True
                self._tile = tiling.economical_tile(self._tile, field, self.network.stride)

    def shape_for(self, size: Size) -> Size:
        """The shape of the array that a window of an unannounced size is put into."""
        with self._lock:
            if size in self._shapes:
                return size
            if len(self._shapes) < _OWN_SHAPES or not self._can_share:
                self._shapes.append(size)
                return size
        # However many sizes come, their shapes stay few: squares, unless these are large.
        sides = [2 ** math.ceil(math.log2(side)) for side in size]
        square = max(*sides, _SMALLEST_SQUARE)
        shape = (square, square) if square <= _OTHER_TILE else tuple(sides)
        stride = self.network.stride
        return tuple(-(-side // stride) * stride for side in shape)

    def most_images(self, shape: Size) -> int:
        """How many images of a shape are restored at a time: a power of 2, unless one was set."""
        if self._batch_size is not None:
            return self._batch_size
        return 2 ** int(math.log2(min(_MOST_IMAGES, max(1, self._most_pixels // math.prod(shape)))))

    # ---- Compiling

    def start(
        self, kind: BatchKind, count: int, batch: np.ndarray, sizes: np.ndarray
    ) -> list[jax.Array]:
        """Begins to restore batches of a kind, on as many devices as there are batches.

        Args:
          kind: of the batches.
          count: how many images make a batch.
          batch: `(n * count, H, W, C)`, at most one batch for each device.
          sizes: `(n * count, 2)`: what of the arrays the images fill.

        Returns:
          The restored arrays, one after the other.

        Raises:
          OutOfMemoryError: the memory does not suffice, or would be more than it should be.
        """
        smaller = (sizes != kind.shape).any(axis=1).reshape(-1, count).any(axis=1)
        on_all = len(self.devices) > 1 and len(set(smaller)) == 1
        # One batch goes to all devices, most of which then have nothing to do, only if that saves
        # compiling.
        if len(smaller) == 1 and Program(kind, count, bool(smaller[0]), True) not in self._known:
            on_all = False
        if on_all:
            missing = count * (len(self.devices) - len(smaller))
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            sizes = np.concatenate([sizes, np.full((missing, 2), kind.shape, sizes.dtype)])
            parts = [(batch, sizes, bool(smaller[0]))]
        else:
            split = np.split(batch, len(smaller)), np.split(sizes, len(smaller))
            parts = list(zip(*split, map(bool, smaller), strict=True))
        try:
            restored = []
            for images, extents, within in parts:
                execute = self._compiled(Program(kind, count, within, on_all))
                arrays = (images, extents) if within else (images,)
                arrays = jax.device_put(arrays, self._sharding(on_all))
                restored.append(execute(self.params(on_all), arrays))
            return restored
        except jax.errors.JaxRuntimeError as error:
            raise _as_out_of_memory(error, kind) from error

    @property
    def programs(self) -> dict[Program, Any]:
        """What has been compiled."""
        return {key: known for key, known in self._known.items() if isinstance(key, Program)}

    def _compiled(self, program: Program) -> Callable:
        """The compiled `(params, arrays) -> batch`.

        Raises:
          OutOfMemoryError: it would need more memory than it should.
        """
        return self._once(program, lambda: self._compile(program))

    def _compile(self, program: Program) -> Callable:
        kind, count, within, on_all = program
        apply = self._computed.apply_within if within else self._computed.apply
        gray_for_colour = kind.channels != self.network.channels
        is_float = kind.dtype.kind == "f"
        highest = 1.0 if is_float else float(np.iinfo(kind.dtype).max)

        def restore(params, batch, *sizes):
            pixels = batch.astype(jnp.float32) / highest
            if gray_for_colour:
                pixels = pixels.repeat(self.network.channels, axis=3)
            restored = apply(params, pixels, *sizes)
            if gray_for_colour:
                restored = restored.mean(axis=3, keepdims=True)
            restored = jnp.clip(restored, 0.0, 1.0)
            return restored if is_float else jnp.rint(restored * highest).astype(kind.dtype)

        total = count * (len(self.devices) if on_all else 1)
        specs: list[tuple[tuple[int, ...], Any]] = [
            ((total, *kind.shape, kind.channels), kind.dtype)
        ]
        if within:
            specs.append(((total, 2), np.int32))
        sharding = self._sharding(on_all)
        arrays = tuple(jax.ShapeDtypeStruct(*spec, sharding=sharding) for spec in specs)
        try:
            compiled = self._function(restore, on_all).lower(self.params(on_all), arrays).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _as_out_of_memory(error, kind) from error
        analysis = compiled.memory_analysis()
        needed = 0 if analysis is None else analysis.temp_size_in_bytes
        if needed > self._memory and self._tile_setting == "auto" and self._smaller_tile(kind, 0.5):
            raise OutOfMemoryError(kind, share=self._memory / needed)
        return compiled

    @functools.cached_property
    def _memory(self) -> float:
        limit = memory.limit(self.devices[0])
        return _CPU_MEMORY if limit is None else limit / 4

    def _smaller_tile(self, kind: BatchKind, share: float) -> int | None:
        """The tile that is next tried instead of arrays of a kind; None if there is none.

        Args:
          kind: of the batch that needs too much memory.
          share: of its memory that there is. Memory grows with the pixels of a tile.
        """
        if max(kind.shape) <= _SMALLEST_TILE or self._tile_setting == 0 or self.field is None:
            return None
        stride = self.network.stride
        lowest = max(_SMALLEST_TILE, tiling.smallest_tile(self.field, stride))
        tile = max(int(self._tile * math.sqrt(share)) // stride * stride, lowest)
        while self._is_whole(kind.shape, tile) and tile // 2 >= lowest:
            tile //= 2
        return tile if tile < self._tile else None

    def _is_whole(self, size: Size, tile: int) -> bool:
        """Whether a picture is restored at once where tiles would have this side."""
        if self._tile_setting == "auto":
            return math.prod(size) <= 2 * tile**2
        return tile == 0 or max(size) <= tile

    @property
    def tile(self) -> int:
        """The largest side of tiles at present."""
        return self._tile

    def shrink(self, tile: int, error: "OutOfMemoryError") -> None:
        """After the device's memory did not suffice: goes on with smaller tiles.

        Args:
          tile: what `tile` was then. If another thread has made them smaller, this does nothing.
          error: what happened.

        Raises:
          ImageError: there are none.
        """
        with self._lock:
            if self._tile != tile:
                return
            smaller = self._smaller_tile(error.kind, error.share)
            if smaller is None:
                advice = "use tile auto" if self._tile_setting == 0 else "use another device"
                raise self._memory_error(error.kind.shape, advice) from error
            self._tile = smaller
            self._most_pixels = min(self._most_pixels, 2 * smaller**2)
            self._shapes = []
            if not error.is_expected:
                _log.warning(
                    "the memory of %s does not suffice; going on with tiles of %d pixels",
                    self.devices[0],
                    self._tile,
                )

    def _memory_error(self, shape: Size, advice: str) -> ImageError:
        return ImageError(
            f"the memory of {self.devices[0]} does not suffice for {shape[0]}x{shape[1]} pixels at "
            f"a time; {advice}, or a smaller batch size"
        )


class OutOfMemoryError(Exception):
    """The device's memory does not suffice for a batch of a kind.

    Args:
      kind: of the batch.
      share: of the memory that it needs, how much there is; None if it was tried and failed, so
        that this isn't known.
    """

    def __init__(self, kind: BatchKind, share: float | None = None):
        super().__init__()
        self.kind = kind
        self.is_expected = share is not None
        # Without a measurement, a tile of half the side is tried.
        self.share = 0.25 if share is None else min(share, 0.9)


def _as_out_of_memory(error: Exception, kind: BatchKind) -> Exception:
    """An `OutOfMemoryError` if memory ran out; else the same error."""
    return OutOfMemoryError(kind) if memory.ran_out(error) else error


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
        self._computing.append((engine.start(kind, count, batch, sizes), pieces, kind))
        self._collected = []
        while len(self._computing) > _AHEAD:
            self._take_in()

    def _take_in(self) -> None:
        """Waits for the oldest batch and copies its windows into the results."""
        restored, pieces, kind = self._computing[0]
        try:
            restored = jax.device_get(restored)
        except jax.errors.JaxRuntimeError as error:
            raise _as_out_of_memory(error, kind) from error
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
