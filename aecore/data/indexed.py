"""Images by index: any one of a source can be read without reading the others.

An image is `(H, W, C)` uint8. Those of one source may differ in height and width, not in channels.
"""

import contextlib
import dataclasses
import errno
import io
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from aecore import storage
from aecore.data import jpeg
from aecore.errors import ImageError
from aecore.media import images

Shape = tuple[int, int, int]
"""Height, width and channels."""


class Source(Protocol):
    """Images that can be read in any order, by several threads at once."""

    @property
    def channels(self) -> int:
        """1 for gray, 3 for RGB."""
        ...

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def __getitem__(self, index: int, /) -> np.ndarray:
        """The image at an index, `(H, W, C)` uint8, not to be written to.

        Raises:
          ImageError: it is missing or broken, and always will be.
          OSError: it can't be read now, as without a network.
        """
        ...

    def shape(self, index: int) -> Shape:
        """The image's shape, found without decoding its pixels.

        Raises:
          ImageError: as for the image itself, as far as the file's header tells.
        """
        ...

    def window(self, index: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Part of an image, which ends where the image ends.

        Raises:
          ImageError: as for the image itself.
        """
        ...

    def checksum(self, crc: int) -> int:
        """Goes on with a CRC-32 over what identifies the images and their order."""
        ...


class ArraySource:
    """Images of one size, in memory or in a file that is mapped into it.

    Args:
      array: `(N, H, W, C)` uint8.
    """

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def channels(self) -> int:
        return self.array.shape[3]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.array[index]

    def shape(self, index: int) -> Shape:
        del index
        height, width, channels = self.array.shape[1:]
        return height, width, channels

    def window(self, index: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.array[index, top : top + height, left : left + width]

    def checksum(self, crc: int) -> int:
        for start in range(0, len(self), 4096):
            crc = zlib.crc32(self.array[start : start + 4096].tobytes(), crc)
        return crc


class Cache:
    """Keeps decoded images in memory until it is full; the others are decoded each time.

    Nothing is dropped to make room: an epoch reads all images once, in random order, so that those
    that are kept are read as often as those that would replace them.

    Args:
      limit: bytes to keep at most.

    Attributes:
      bytes: how many are kept.
      is_full: whether an image was too large for what room was left.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._kept: dict[Any, np.ndarray] = {}
        self._lock = threading.Lock()
        self.bytes = 0
        self.is_full = False

    def __contains__(self, key: Any) -> bool:
        return key in self._kept

    def get(self, key: Any, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The image of a key, decoded if it is not kept."""
        image = self._kept.get(key)
        if image is None:
            image = decode()
            image.flags.writeable = False
            with self._lock:
                if self.bytes + image.nbytes > self._limit:
                    self.is_full = True
                elif key not in self._kept:
                    self._kept[key] = image
                    self.bytes += image.nbytes
        return image


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture file of which only the bytes are at hand, such as part of something larger."""

    name: str
    read: Callable[[], bytes]

    def open(self, mode: str = "rb") -> io.BytesIO:
        del mode
        return io.BytesIO(self.read())

    def __fspath__(self) -> str:
        return self.name

    def __str__(self):
        return self.name


_LASTING = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
)
"""Numbers of the errors that a file gives until somebody changes it."""


@contextlib.contextmanager
def telling_what_lasts(file: Any) -> Iterator[None]:
    """Makes an ImageError of an error that will come again, and lets any other one pass.

    A picture with an ImageError is left out for good. One that can't be read for a moment mustn't
    be: a run would go on with other batches than if nothing had happened.
    """
    try:
        with storage.naming(file):
            yield
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise ImageError(f"{file} can't be read: {error.strerror}") from error
    except ImageError as error:
        cause = error.__cause__
        while isinstance(cause, Exception):
            # Pillow's own have no number.
            number = cause.errno if isinstance(cause, OSError) else None
            passing = isinstance(cause, MemoryError) or number not in (None, *_LASTING)
            if passing or storage.explained(cause) is not None:
                with storage.naming(file):
                    raise cause from error
            cause = cause.__cause__
        raise


def read_shape(file: Any) -> Shape:
    """The shape of a picture in a file, with the errors of `Source.shape`."""
    with telling_what_lasts(file):
        return images.read_shape(file)


class FileSource:
    """Pictures in files, each decoded when it is needed and kept while there is room.

    Args:
      files: `epath.Path`s, or other objects with `open("rb")` whose `str` names them.
      channels: 1 to turn all into gray, 3 into RGB.
      cache: where decoded pictures are kept; sources may share it.
    """

    def __init__(self, files: Sequence[Any], channels: int, cache: Cache):
        self._files = files
        self._channels = channels
        self._cache = cache
        self._shapes: dict[int, Shape] = {}

    @property
    def channels(self) -> int:
        return self._channels

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The file of an image, for messages."""
        return str(self._files[index])

    def __getitem__(self, index: int, /) -> np.ndarray:
        # The source itself keeps apart those that share the cache.
        image = self._cache.get((self, index), lambda: self._decode(index))
        height, width, channels = image.shape
        self._shapes[index] = height, width, channels
        return image

    def _decode(self, index: int) -> np.ndarray:
        content = self._content(index)
        if (image := jpeg.decode(content, self._channels)) is not None:
            return image
        file = self._files[index]
        with telling_what_lasts(file):
            try:
                read: Any = Encoded(str(file), lambda: content)
                picture = images.read(read)
                size = picture.height, picture.width
                return images.at_working_size(picture, size, self._channels, "antialiased")
            except ImageError as error:
                if str(file) in str(error):
                    raise
                raise ImageError(f"{file}: {error}") from error

    def _content(self, index: int) -> bytes:
        file = self._files[index]
        with telling_what_lasts(file), file.open("rb") as opened:
            return opened.read()

    def shape(self, index: int) -> Shape:
        if index not in self._shapes:
            height, width, _ = read_shape(self._files[index])
            self._shapes[index] = height, width, self._channels
        return self._shapes[index]

    def window(self, index: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        if self._cache.is_full and (self, index) not in self._cache:
            own_height, own_width, _ = self.shape(index)
            size = min(height, own_height - top), min(width, own_width - left)
            part = jpeg.decode(self._content(index), self._channels, (top, left, *size))
            if part is not None:
                return part
        return self[index][top : top + height, left : left + width]

    def checksum(self, crc: int) -> int:
        """Of the files' names and sizes, as their content would take long to read."""
        sizes = storage.sizes(file for file in self._files if isinstance(file, epath.Path))
        for file in self._files:
            line = f"{file.name} {sizes[file]}\n" if file in sizes else f"{file}\n"
            # Names may be no UTF-8.
            crc = zlib.crc32(line.encode(errors="surrogateescape"), crc)
        return crc


class Pairs:
    """Pictures of which there is an original and a degraded version. As a source: the originals.

    Args:
      degraded: the degraded pictures.
      original: the originals, in the same order.
      scale: how many times larger the originals are.
    """

    def __init__(self, degraded: FileSource, original: FileSource, scale: int):
        self.degraded = degraded
        self.original = original
        self.scale = scale

    @property
    def channels(self) -> int:
        return self.original.channels

    def __len__(self) -> int:
        return len(self.original)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.original[index]

    def shape(self, index: int) -> Shape:
        """The original's.

        Raises:
          ImageError: one of the two is broken, or the original is not `scale` times larger.
        """
        original, degraded = self.original.shape(index), self.degraded.shape(index)
        if original[:2] != (degraded[0] * self.scale, degraded[1] * self.scale):
            raise ImageError(
                f"{self.original.name(index)} is {original[0]}x{original[1]}, "
                f"{self.degraded.name(index)} is {degraded[0]}x{degraded[1]}; "
                f"the first should be {self.scale} times the second"
            )
        return original

    def window(self, index: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.original.window(index, top, left, height, width)

    def checksum(self, crc: int) -> int:
        return self.original.checksum(self.degraded.checksum(crc))
