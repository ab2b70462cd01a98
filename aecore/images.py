"""Picture files and Pillow images to arrays and back; `(H, W)` or `(H, W, C)`, uint8 or uint16."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from aecore.errors import ImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})
"""Endings, in lower case, by which a picture is recognised in a folder."""

_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")
_ARRAY_MODES = {"L": np.uint8, "RGB": np.uint8, "I;16": np.uint16}


def walk(folder: Any) -> list[Any]:
    """The files under a folder (an `epath.Path`), recursively, sorted, without hidden ones."""
    return sorted(
        root / name
        for root, _, names in folder.walk()
        for name in names
        if not any(part.startswith(".") for part in (root / name).relative_to(folder).parts)
    )


def find(folder: Any) -> list[Any]:
    """Of the files under a folder (an `epath.Path`), those whose ending is a picture's."""
    return [path for path in walk(folder) if path.suffix.lower() in SUFFIXES]


def is_picture(value: Any) -> bool:
    """Whether a value is a Pillow image."""
    return isinstance(value, Image.Image)


def read(path: Any) -> Image.Image:
    """Reads a picture and turns it upright, as its EXIF orientation says.

    Raises:
      ImageError: it does not exist, or is no picture that Pillow can decode.
    """
    with _open(path) as image:
        return ImageOps.exif_transpose(image)


def read_shape(path: Any) -> tuple[int, int, int]:
    """Height, width and channels (1 for gray, else 3) of an upright picture, decoding no pixels.

    Raises:
      ImageError: as for `read`, as far as the file's header tells.
    """
    with _open(path) as image:
        height, width = image.height, image.width
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
            height, width = width, height
        return height, width, 1 if image.mode in _GRAY_MODES else 3


@contextlib.contextmanager
def _open(path: Any) -> Iterator[Image.Image]:
    """Opens a picture; what goes wrong with it, here or while it is used, is an ImageError."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not a picture in a format that Pillow knows") from error
    except Exception as error:  # Damaged files make Pillow's decoders fail in many ways.
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} can't be read: {reason}") from error


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image as an array: mode L `(H, W)` uint8, RGB `(H, W, 3)` uint8, I;16 uint16.

    Raises:
      ImageError: the image has another mode.
    """
    if image.mode not in _ARRAY_MODES:
        raise ImageError(
            f"picture mode {image.mode} is not supported; convert it to L (gray) or RGB first"
        )
    return np.asarray(image, _ARRAY_MODES[image.mode])


def from_array(array: np.ndarray) -> Image.Image:
    """The inverse of `to_array`; also `(H, W, 1)`, as gray."""
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def from_float(array: np.ndarray) -> Image.Image:
    """An `(H, W, C)` array of floats in [0, 1], C 1 or 3, as an image of 8 bits."""
    return from_array(np.rint(array * 255).astype(np.uint8))


def save(image: Image.Image, path: Any) -> None:
    """Writes a picture in the format of the path's ending; the file appears whole or not at all.

    Raises:
      ImageError: the format is unknown, can't hold the picture, or the file can't be written.
    """
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format not in Image.SAVE:
        raise ImageError(f"{path}: Pillow writes no format with ending {path.suffix!r}; use .png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            image.save(file, format=file_format)
        temporary.replace(path)
    except Exception as error:  # As in reading.
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} can't be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def at_working_size(
    image: Image.Image,
    size: tuple[int, int],
    channels: int,
    resize: Literal["antialiased", "bilinear"],
) -> np.ndarray:
    """A training image: `(height, width, channels)` uint8.

    The picture is scaled so that it covers `size` and its middle is taken; its aspect ratio is
    kept. Gray becomes RGB by repetition, RGB becomes gray by ITU-R 601 luma, 16 bits become 8.

    Raises:
      ImageError: the picture has values of 32 bits, whose range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ImageError(f"a picture of mode {image.mode} has no known range; save it with 8 bits")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255.
        image = from_array(np.rint(np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left = (image.width - width * scale) / 2
        top = (image.height - height * scale) / 2
        if resize == "bilinear":
            # Unlike Image.resize, transform interpolates between 4 pixels however far it shrinks.
            image = image.transform(
                (width, height),
                Image.Transform.AFFINE,
                (scale, 0, left, 0, scale, top),
                Image.Resampling.BILINEAR,
            )
        else:
            box = (left, top, left + width * scale, top + height * scale)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image, np.uint8).reshape(height, width, channels)
