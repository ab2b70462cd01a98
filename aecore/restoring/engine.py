"""In which tiles, and in arrays of which few shapes, a network restores images of any size."""

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from aecore.data.shapes import Size, shared_shapes, smallest_containing
from aecore.errors import ConfigError, ImageError
from aecore.networks.network import Network
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import tiling
from aecore.restoring.programs import BatchKind, OutOfMemoryError, Programs
from aecore.restoring.tiling import Window
from aecore.steps import memory

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


def is_count(value: Any, least: int) -> bool:
    """Whether it is a whole number, which booleans are to Python."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Engine:
    """Divides images so that few programs are compiled, which fit into the devices' memory.

    It is safe to use from several threads; `passes.restore` restores with it.

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
        if tile != "auto" and not is_count(tile, least=0):
            raise ConfigError(f"tile {tile!r} is not possible; use auto, 0 for none, or a side")
        if batch_size is not None and not is_count(batch_size, least=1):
            raise ConfigError(f"batch_size {batch_size!r} is not possible; use 1 or more, or None")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision {precision!r} is unknown; use float32 or bfloat16")
        if precision == "auto":
            precision = "bfloat16" if devices[0].platform == "tpu" else "float32"
        self.network = network
        self.scale = network.scale
        self.programs = Programs(network, params, precision, devices, self._must_fit)
        self._tile_setting = tile
        default = _TILE.get(devices[0].platform, _OTHER_TILE)
        self._tile = default if tile == "auto" else tile
        self._has_grown = False
        self._batch_size = batch_size
        self._most_pixels = _MOST_PIXELS.get(devices[0].platform, _OTHER_MOST_PIXELS)
        self._shapes: list[Size] = []
        self._lock = threading.RLock()

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
        elif len(set(parts)) <= _SHARED_SHAPES or self.programs.can_share:
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
        try:
            return self.programs.in_parts(method, batch, self.most_images(shape))
        except jax.errors.JaxRuntimeError as error:
            if memory.ran_out(error):
                raise self._memory_error(shape, "use smaller images") from error
            raise

    @property
    def devices(self) -> tuple[jax.Device, ...]:  # pyright: ignore[reportInvalidTypeForm]
        """Those that it runs on."""
        return self.programs.devices

    @property
    def field(self) -> ReceptiveField | None:
        """The network's receptive field; None if it sees the whole image at once."""
        return self.programs.field

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
            if len(self._shapes) < _OWN_SHAPES or not self.programs.can_share:
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

    def _must_fit(self, kind: BatchKind) -> bool:
        """Whether smaller tiles would do, so that more memory than there should be is refused."""
        return self._tile_setting == "auto" and self._smaller_tile(kind, 0.5) is not None

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

    def shrink(self, tile: int, error: OutOfMemoryError) -> None:
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
