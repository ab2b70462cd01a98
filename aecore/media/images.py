"""Picture files and Pillow images to arrays and back: `(H, W)` gray or `(H, W, 3)` RGB, integers.

What a file carries besides its pixels (depth, alpha, colour profile, EXIF, resolution, timing of an
animation) is read with them and written with them. `read_picture` and `write_picture` do that;
`read`, `read_shape` and `at_working_size` serve training, which needs pixels only.
"""

import logging
import warnings
from typing import Any, Literal

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from aecore import storage
from aecore.errors import ConfigError, ImageError
from aecore.media import decoders
from aecore.media.decoders import from_pillow
from aecore.media.encoders import FORMATS, encode
from aecore.media.frames import Frame, Picture, check_mode_of_pillow, enlarged, to_pillow
from aecore.storage import is_disk_full, reason, to_path, write_whole

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Endings, in lower case, by which a picture is recognised in a folder."""

PIXEL_LIMIT = 2**30
"""Pixels that all frames of a picture may have together; a hostile file can claim any number."""

__all__ = [
    "PIXEL_LIMIT",
    "SUFFIXES",
    "Frame",
    "Picture",
    "at_working_size",
    "can_write",
    "check_mode_of_pillow",
    "ending",
    "enlarged",
    "from_array",
    "from_float",
    "from_pillow",
    "is_picture",
    "read",
    "read_extent",
    "read_picture",
    "read_shape",
    "save",
    "silence_pillow",
    "to_pillow",
    "walk",
    "write_picture",
]

# Without these Python prints the errors that the libraries log, where a program has set up no
# logging.
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


def silence_pillow() -> None:
    """Keeps Pillow from warning about the files it reads, in the whole process.

    For command lines, which report what they can't read themselves. `warnings.catch_warnings`
    would not do, as it changes the filters of all threads. What libtiff writes to stderr about
    damaged files can't be silenced.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")
    for library in ("PIL", "tifffile"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def walk(folder: epath.Path) -> list[epath.Path]:
    """The files under a folder, recursively, sorted; names that begin with a dot are left out."""
    depth = len(folder.parts)
    return sorted(
        path
        for path in storage.walk(folder)
        if not any(part.startswith(".") for part in path.parts[depth:])
    )


def can_write(suffix: str) -> bool:
    """Whether pictures can be written with an ending, such as `.png`."""
    return Image.registered_extensions().get(suffix.lower()) in FORMATS


def ending(file_format: str) -> str:
    """The usual ending of files in a format, in Pillow's terms; `.png` if it can't be written."""
    usual = {"JPEG": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}
    return usual.get(file_format, f".{file_format.lower()}" if file_format in FORMATS else ".png")


def is_picture(value: Any) -> bool:
    """Whether a value is a Pillow image."""
    return isinstance(value, Image.Image)


def read(path: epath.Path) -> Image.Image:
    """Reads the first frame of a picture for training, upright as its EXIF orientation says.

    Colour of 16 bits becomes 8; `read_picture` keeps it.

    Raises:
      ImageError: the file doesn't exist, or is no picture that Pillow can decode.
    """
    with decoders.opened(path) as image:
        return ImageOps.exif_transpose(decoders.loaded(image))


def read_shape(path: epath.Path) -> tuple[int, int, int]:
    """Height, width and channels (1 for gray, else 3) of an upright picture, decoding no pixels.

    Raises:
      ImageError: as for `read`, as far as the file's header shows it.
    """
    with decoders.opened(path) as image:
        return decoders.upright_shape(image)


def read_extent(path: epath.Path) -> tuple[tuple[int, int], int]:
    """Height and width of an upright picture, and the pixels of all frames, decoding none.

    Raises:
      ImageError: as for `read_shape`.
    """
    with decoders.opened(path) as image:
        height, width, _ = decoders.upright_shape(image)
        return (height, width), decoders.count_pixels(image, *decoders.frame_range(image))


def read_picture(path: epath.PathLike) -> Picture:
    """Reads all frames of a picture file, upright, with what belongs to them.

    Returns:
      The picture. GIF, WebP and PNG give the frames of an animation as they are shown, TIFF gives
      its pages, every other format its first picture. Palettes and other colour spaces become RGB,
      which the notes say.

    Raises:
      ImageError: the file can't be read, is damaged, too large, or has values of unknown range.
    """
    try:
        path = to_path(path)
    except ConfigError as error:
        raise ImageError(str(error)) from error
    with decoders.opened(path) as image, decoders.opened(path) as again:
        first, last = decoders.frame_range(image)
        notes = {}
        if first == last < getattr(image, "n_frames", 1) - 1:
            notes["only the first picture of the file was read"] = None
        if decoders.count_pixels(image, first, last) > PIXEL_LIMIT:
            raise ImageError(f"its frames have more than {PIXEL_LIMIT:,} pixels in all")
        carried = decoders.read_carried_by_file(image, animated=last > first)
        frames = []
        for index in range(first, last + 1):
            if last > 0:
                image.seek(index)
            frame, frame_notes = decoders.read_frame(image, again)
            notes |= dict.fromkeys(frame_notes)
            frames.append(frame)
        file_format = "JPEG" if image.format == "MPO" else str(image.format)
    return Picture(tuple(frames), file_format, carried, tuple(notes))


def from_array(array: np.ndarray) -> Image.Image:
    """`(H, W)` or `(H, W, 1)` uint8 or uint16, or `(H, W, 3)` uint8, as a Pillow image."""
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def from_float(array: np.ndarray) -> Image.Image:
    """An `(H, W, C)` array of floats in [0, 1], C 1 or 3, as an image of 8 bits."""
    return from_array(np.rint(array * 255).astype(np.uint8))


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


def write_picture(
    picture: Picture, path: epath.Path, *, quality: int | None = None
) -> tuple[str, ...]:
    """Writes a picture with all that belongs to it; the file appears whole or not at all.

    Without a quality, a JPEG that was read from a JPEG is compressed as strongly as that, with
    colour at the same resolution. Other JPEGs and AVIF have quality 95 with colour at full
    resolution. WebP has quality 95 if it was read from a lossy one. All else loses nothing that
    the format can hold.

    Args:
      picture: the picture.
      path: where to write; its ending determines the format.
      quality: from 1 to 100, of JPEG, WebP (which becomes lossy) and AVIF; other formats ignore it.

    Returns:
      What the file does not hold of the picture, each a few words.

    Raises:
      ImageError: the format is unknown, can't hold the picture, or the file can't be written.
      OSError: the disk, or a quota, is full; see `aecore.storage.is_disk_full`.
    """
    suffix = path.suffix.lower()
    file_format = Image.registered_extensions().get(suffix, "")
    if file_format not in FORMATS:
        named = file_format or f"the ending {suffix!r}"
        raise ImageError(f"{path}: pictures can't be written as {named}; use .png, .tif or .jpg")
    try:
        data, notes = encode(picture, file_format, quality)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # As in reading; limits of formats raise many.
        raise ImageError(f"{path} can't be written: {reason(error)}") from error
    try:
        write_whole(path, data)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ImageError(f"{path} can't be written: {reason(error)}") from error
    return notes


def save(image: Image.Image, path: epath.Path) -> None:
    """Writes a Pillow image as `write_picture` does.

    Raises:
      ImageError, OSError: as there.
    """
    write_picture(Picture((from_pillow(image)[0],), ""), path)
