"""Picture files and Pillow images to arrays and back: `(H, W)` gray or `(H, W, 3)` RGB, integers.

What a file carries besides its pixels (depth, alpha, colour profile, EXIF, resolution, timing of an
animation) is read with them and written with them. `read_picture` and `write_picture` do that;
`read`, `read_shape` and `at_working_size` serve training, which needs pixels only.
"""

import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import re
import stat
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from aecore.errors import ImageError
from aecore.media.encoders import FORMATS, STRUCTURAL_TAGS, encode
from aecore.media.frames import KINDS, Frame, Picture, from_pillow, to_pillow
from aecore.storage import write_whole

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Endings, in lower case, by which a picture is recognised in a folder."""

PIXEL_LIMIT = 2**30
"""Pixels that all frames of a picture may have together; a hostile file can claim any number."""

__all__ = [
    "DISK_FULL",
    "PIXEL_LIMIT",
    "SUFFIXES",
    "Frame",
    "Picture",
    "at_working_size",
    "can_write",
    "find",
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

_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")

# An orientation 1 to 8 of EXIF to what turns an array upright.
_UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: array.swapaxes(0, 1)[:, ::-1],
    7: lambda array: array[::-1, ::-1].swapaxes(0, 1),
    8: lambda array: array.swapaxes(0, 1)[::-1],
}

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def silence_pillow() -> None:
    """Keeps Pillow from warning about the files it reads, in the whole process.

    For command lines, which report what they can't read themselves. `warnings.catch_warnings`
    would not do, as it changes the filters of all threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # libtiff writes to stderr, unless it has no handler; Pillow offers no way to say so. Where it
    # is linked statically its functions can't be found.
    with contextlib.suppress(OSError, AttributeError):
        pillow = ctypes.CDLL(Image.core.__file__)
        for function in (pillow.TIFFSetErrorHandler, pillow.TIFFSetWarningHandler):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)


# Without this Python prints the errors that Pillow logs, where a program has set up no logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())


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


def can_write(suffix: str) -> bool:
    """Whether pictures can be written with an ending, such as `.png`."""
    return Image.registered_extensions().get(suffix.lower()) in FORMATS


def is_picture(value: Any) -> bool:
    """Whether a value is a Pillow image."""
    return isinstance(value, Image.Image)


def read(path: Any) -> Image.Image:
    """Reads the first frame of a picture and turns it upright, as its EXIF orientation says.

    Colour of 16 bits becomes 8; `read_picture` keeps it.

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
        return _upright_shape(image)


def read_extent(path: Any) -> tuple[tuple[int, int], int]:
    """Height and width of an upright picture, and the pixels of all frames, decoding none.

    Raises:
      ImageError: as for `read_shape`.
    """
    with _open(path) as image:
        height, width, _ = _upright_shape(image)
        return (height, width), _pixels(image, *_frame_range(image))


def _upright_shape(image: Image.Image) -> tuple[int, int, int]:
    height, width = image.height, image.width
    # Pillow's TIFF reader has swapped them itself.
    if image.format != "TIFF" and _orientation(image) >= 5:
        height, width = width, height
    gray = image.mode in _GRAY_MODES or _rawmode(image) == "LA;16B"
    return height, width, 1 if gray else 3


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture whose pixels are not needed, 1 if it has none."""
    known = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & set(image.info)
    # Image.getexif decodes a PNG to find what follows the pixels, which is rare.
    if image.format == "PNG" and not known and not _has_late_chunks(image.fp):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _has_late_chunks(file: Any) -> bool:
    """Whether a PNG has EXIF or text after its pixels."""
    position = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            pixels |= kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            file.seek(size + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(position)


@contextlib.contextmanager
def _open(path: Any) -> Iterator[Image.Image]:
    """Opens a picture; what goes wrong with it, here or while it is used, is an ImageError."""
    try:
        # Opening a pipe would wait for somebody to write to it.
        if "://" not in str(path) and stat.S_ISFIFO(os.stat(path).st_mode):  # noqa: PTH116
            raise ImageError("it is a pipe; save the picture to a file")
        with path.open("rb") as file, Image.open(file) as image:
            if not image.width or not image.height:
                raise ImageError("it has no pixels")
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not a picture in a format that Pillow knows") from error
    except ImageError as error:
        message = str(error)
        named = message.startswith(str(path))
        raise ImageError(message if named else f"{path} can't be read: {message}") from error
    except Exception as error:  # Damaged files make Pillow's decoders fail in many ways.
        raise ImageError(f"{path} can't be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def read_picture(path: Any) -> Picture:
    """Reads all frames of a picture, upright, with what belongs to them.

    Args:
      path: an `epath.Path` or a `pathlib.Path`.

    Returns:
      The picture. GIF, WebP and PNG give the frames of an animation as they are shown, TIFF gives
      its pages, every other format its first picture. Palettes and other colour spaces became RGB,
      which the notes say.

    Raises:
      ImageError: the file can't be read, is damaged, too large, or has values of unknown range.
    """
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(_open(path))
        file_format = "JPEG" if image.format == "MPO" else str(image.format)
        first, last = _frame_range(image)
        notes = {}
        if first == last < getattr(image, "n_frames", 1) - 1:
            notes["only the first picture of the file was read"] = None
        low = None
        frames = []
        if _pixels(image, first, last) > PIXEL_LIMIT:
            raise ImageError(f"its frames have more than {PIXEL_LIMIT:,} pixels in all")
        for index in range(first, last + 1):
            if last > 0:
                image.seek(index)
            deep = None if last > first and file_format == "PNG" else _deep_tiles(image)
            if deep and deep.low:
                low = low or stack.enter_context(_open(path))
                if last > 0:
                    low.seek(index)
            frame, frame_notes = _read_frame(image, low, deep)
            notes |= dict.fromkeys(frame_notes)
            frames.append(frame)
        carried = {}
        if len(frames) > 1 and file_format in ("GIF", "PNG", "WEBP"):
            carried["loop"] = _plays(image, file_format)
        if file_format == "WEBP":
            with path.open("rb") as file:
                carried["lossless"] = _is_lossless_webp(file)
    return Picture(tuple(frames), file_format, carried, tuple(notes))


def _frame_range(image: Image.Image) -> tuple[int, int]:
    """The first and the last frame to read."""
    if image.format not in ("GIF", "PNG", "TIFF", "WEBP"):
        return 0, 0
    # The default image of an animated PNG is for readers that know no animation.
    first = 1 if getattr(image, "default_image", False) and image.n_frames > 1 else 0
    return first, image.n_frames - 1


def _pixels(image: Image.Image, first: int, last: int) -> int:
    """The number of pixels of all frames, decoding none."""
    if image.format != "TIFF" or first == last:
        return (last - first + 1) * image.width * image.height
    total = 0
    for index in range(first, last + 1):
        image.seek(index)
        total += image.width * image.height
    return total


def _rawmode(image: Image.Image) -> str:
    """How the pixels of a picture that is not loaded yet are stored, in Pillow's terms."""
    if not getattr(image, "tile", None):
        return ""
    args = image.tile[0].args
    return str(args if isinstance(args, str) else args[0] if args else "")


@dataclasses.dataclass(frozen=True)
class _Deep:
    """How to decode colour of 16 bits with Pillow, whose images hold 8 bits of it.

    Pillow unpacks such pixels by taking the upper of two bytes. Told that the bytes come in the
    other order, it takes the lower ones: the picture is decoded twice.
    """

    mode: str
    high: list[Any]
    low: list[Any]
    premultiplied: bool = False


def _deep_tiles(image: Image.Image) -> _Deep | None:
    """How to decode a picture that is not loaded yet, if it has colour of 16 bits.

    Raises:
      ImageError: the way it is stored can't be decoded.
    """
    tiles = list(image.tile)
    rawmode = _rawmode(image)
    codec = tiles[0].codec_name if tiles else ""
    if image.format == "PPM" and codec == "ppm" and tiles[0].args == ("RGB", 65535):
        codec, rawmode = "raw", "RGB;16B"
        tiles = [tiles[0]._replace(codec_name="raw", args=(rawmode, 0, 1))]
    if image.format == "PNG" and rawmode == "LA;16B":
        # Four bytes a pixel, whatever they are called.
        return _Deep("LA;16", [tiles[0]._replace(args="RGBA")], [])
    tags = getattr(image, "tag_v2", {})
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, ())
    if planes and image.mode in ("RGB", "RGBA") and 16 in bits:
        if codec != "raw" or set(bits) != {16}:
            raise ImageError("its planes of 16 bits are compressed; save it with interleaved ones")
        order = "B" if tags.prefix == b"MM" else "L"
        other = "L" if order == "B" else "B"
        return _Deep(
            f"{image.mode};16",
            [_with_rawmode(tile, f"{tile.args[0]};16{order}") for tile in tiles],
            [_with_rawmode(tile, f"{tile.args[0]};16{other}") for tile in tiles],
        )
    match = re.fullmatch("(RGB|RGBA|RGBX|RGBa);16([BLN])", rawmode)
    if not match or codec not in ("zip", "raw", "libtiff"):
        return None
    stored, order = match.groups()
    native = "L" if sys.byteorder == "little" else "B"
    other = "L" if (native if order == "N" else order) == "B" else "B"
    premultiplied = stored == "RGBa"
    stored = "RGBA" if premultiplied else stored
    return _Deep(
        "RGBA;16" if stored == "RGBA" else "RGB;16",
        [_with_rawmode(tile, f"{stored};16{order}") for tile in tiles],
        [_with_rawmode(tile, f"{stored};16{other}") for tile in tiles],
        premultiplied,
    )


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    args = tile.args
    return tile._replace(args=rawmode if isinstance(args, str) else (rawmode, *args[1:]))


def _read_frame(
    image: Image.Image, low: Image.Image | None, deep: _Deep | None
) -> tuple[Frame, list[str]]:
    """Decodes the frame that an open picture is at.

    Args:
      image: the picture.
      low: the same, opened a second time, if `deep` needs it.
      deep: how to decode it, if it has colour of 16 bits.
    """
    rawmode = _rawmode(image)
    tags = getattr(image, "tag_v2", {})
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,)))
    if image.format == "PPM" and image.tile[0].codec_name.startswith("ppm") and image.mode != "1":
        bits = image.tile[0].args[1].bit_length()
    # Pillow's TIFF reader turns the picture itself, and then forgets how it lay.
    turned = image.format == "TIFF" and tags.get(ExifTags.Base.Orientation, 1) >= 5
    notes = []
    if deep:
        frame = _read_deep(image, low, deep)
    else:
        image.load()
        if "transparency" in image.info and rawmode in ("L;2", "L;4"):
            # Pillow scales the pixels to 8 bits, but not the value that is transparent.
            image.info["transparency"] *= 85 if rawmode == "L;2" else 17
        if image.format == "PPM" and image.mode == "I":
            frame = Frame(np.asarray(image).astype(np.uint16), mode="I;16")
        else:
            frame, changes = from_pillow(image)
            notes += changes
        if frame.mode == "I;16":
            if rawmode == "I;12":
                # 0xfff becomes 0xffff.
                frame = dataclasses.replace(frame, values=frame.values << 4 | frame.values >> 8)
                notes.append("12 bits became 16")
            if white_is_zero:
                # Pillow minds it with 8 bits only.
                frame = dataclasses.replace(frame, values=~frame.values)
        if KINDS[frame.mode].bits == 8 and (";16" in rawmode or bits > 8):
            notes.append("16 bits became 8")
    if image.format == "GIF" and frame.alpha is not None and (frame.alpha == 255).all():
        # In an animation a transparent colour may stand for what has not changed.
        frame = frame.replace(frame.values, None)

    orientation, carried = _read_carried(image, turned, notes)
    turn = _UPRIGHT.get(orientation, lambda array: array)
    values, alpha = (
        None if array is None else np.ascontiguousarray(turn(array))
        for array in (frame.values, frame.alpha)
    )
    profile = carried.get("icc_profile")
    if profile and image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and profile[16:20] != b"RGB ":
        del carried["icc_profile"]
        notes.append(f"the colour profile was dropped: it is for {image.mode}")
    return Frame(values, alpha, frame.mode, carried), notes


def _read_deep(image: Image.Image, low: Image.Image | None, deep: _Deep) -> Frame:
    image.tile = deep.high
    image.load()
    if deep.mode == "LA;16":
        pairs = np.asarray(image).view(">u2").astype(np.uint16)
        return Frame(pairs[..., 0], pairs[..., 1], deep.mode)
    low.tile = deep.low
    low.load()
    pixels = np.asarray(image).astype(np.uint16)
    pixels <<= 8
    pixels |= np.asarray(low)
    values, alpha = pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None
    if deep.premultiplied:
        opacity = np.maximum(alpha, 1)[..., None].astype(np.uint32)
        values = np.minimum((values * np.uint32(65535) + opacity // 2) // opacity, 65535)
        values = values.astype(np.uint16)
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and alpha is None:
        match = (values == np.array(transparent, np.uint16)).all(axis=2)
        return Frame(values, np.where(match, 0, 65535).astype(np.uint16), "RGBA;16")
    return Frame(values, alpha, deep.mode)


def _read_carried(image: Image.Image, turned: bool, notes: list[str]) -> tuple[int, dict[str, Any]]:
    """The orientation of a loaded frame, 1 if it is upright already, and what belongs to it.

    Args:
      image: the picture.
      turned: whether Pillow has swapped height and width.
      notes: to which is added what is lost.
    """
    info = image.info
    carried = {}
    orientation = 1
    try:
        exif = image.getexif()
        if image.format == "TIFF":
            # These are what `dpi` is made from.
            for tag in {282, 283, 296} & set(exif):
                del exif[tag]
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        # Reading a JPEG or a PNG, Pillow may have failed already, and kept an empty one.
        if len(info.get("exif", b"")) > 24 and not len(exif):
            raise ValueError("no tag can be read")
        turned = turned or orientation in (5, 6, 7, 8)
        carried["exif"] = _exif_bytes(exif, turned=turned)
    except Exception:  # Any damage, as in reading pixels; these are worth having without.
        notes.append("EXIF was dropped: it is damaged")
        exif = Image.Exif()
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if isinstance(xmp, bytes):
        for pattern in (
            rb'tiff:Orientation="[0-9]"',
            rb"<tiff:Orientation>[0-9]</tiff:Orientation>",
        ):
            xmp = re.sub(pattern, b"", xmp)
        carried["xmp"] = xmp
    for name in ("icc_profile", "comment"):
        if isinstance(info.get(name), bytes):
            carried[name] = info[name]
    dpi = info.get("dpi")
    if image.format == "TIFF" and TiffImagePlugin.X_RESOLUTION not in image.tag_v2:
        dpi = None
    if image.format == "WEBP" and exif.get(ExifTags.Base.ResolutionUnit) == 2:
        dpi = (exif.get(ExifTags.Base.XResolution), exif.get(ExifTags.Base.YResolution))
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        dpi = tuple(float(value) for value in dpi)
        if len(dpi) == 2 and all(0 < value < 1e6 for value in dpi):
            carried["dpi"] = dpi
    if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        carried["duration"] = float(info.get("duration", 0))
    if image.format == "PNG":
        carried["png"] = _png_chunks(image)
    return orientation, {key: value for key, value in carried.items() if value or value == 0}


def _exif_bytes(exif: Image.Exif, *, turned: bool) -> bytes:
    """EXIF without orientation and without what describes how pixels are stored."""
    for tag in STRUCTURAL_TAGS & set(exif):
        del exif[tag]
    details = exif.get_ifd(ExifTags.IFD.Exif)
    sides = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
    if turned and set(sides) <= set(details):
        details[sides[0]], details[sides[1]] = details[sides[1]], details[sides[0]]
    return exif.tobytes() if len(exif) else b""


def _png_chunks(image: Image.Image) -> tuple[tuple[bytes, bytes], ...]:
    """The chunks of a PNG that have no counterpart in other formats: how its colours are meant
    without a profile, and texts."""
    info = image.info
    chunks = []
    if "chromaticity" in info:
        values = [round(value * 100_000) for value in info["chromaticity"]]
        chunks.append((b"cHRM", struct.pack(">8I", *values)))
    if "gamma" in info:
        chunks.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 100_000))))
    if "srgb" in info and "icc_profile" not in info:
        chunks.append((b"sRGB", bytes([info["srgb"]])))
    if not image.is_animated:
        texts = PngImagePlugin.PngInfo()
        for key, text in image.text.items():
            if key not in ("XML:com.adobe.xmp", "Raw profile type exif"):
                texts.add_text(key, text)
        chunks += [(kind, data) for kind, data, _ in texts.chunks]
    return tuple(chunks)


def _plays(image: Image.Image, file_format: str) -> int:
    """How often an animation is played, 0 for ever."""
    loop = image.info.get("loop")
    if file_format != "GIF":
        return int(loop or 0)
    # GIF tells how often it is repeated.
    return 1 if loop is None else loop and loop + 1


def _is_lossless_webp(file: Any) -> bool:
    """Whether no frame of a WebP file is compressed with loss."""
    place = 12
    file.seek(place)
    while len(header := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", header)
        if kind == b"VP8 ":
            return False
        # Frames of an animation hold chunks themselves, after 16 bytes.
        place += 8 + (16 if kind == b"ANMF" else size + size % 2)
        file.seek(place)
    return True


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


def write_picture(picture: Picture, path: Any, file_format: str | None = None) -> tuple[str, ...]:
    """Writes a picture with all that belongs to it; the file appears whole or not at all.

    JPEG and AVIF are written with quality 95, JPEG without subsampling of colour; WebP too, if it
    was read from one with loss; all else loses nothing that the format can hold.

    Args:
      picture: the picture.
      path: an `epath.Path` or a `pathlib.Path`.
      file_format: Pillow's name of the format; by default the path's ending tells.

    Returns:
      What the file does not hold of the picture, each a few words.

    Raises:
      ImageError: the format is unknown, can't hold the picture, or the file can't be written.
      OSError: the disk, or a quota, is full. `errno` tells: ENOSPC, EDQUOT or EFBIG.
    """
    suffix = path.suffix.lower()
    file_format = (file_format or "").upper() or Image.registered_extensions().get(suffix, "")
    if file_format not in FORMATS:
        named = file_format or f"the ending {suffix!r}"
        raise ImageError(f"{path}: pictures can't be written as {named}; use .png, .tif or .jpg")
    try:
        data, notes = encode(picture, file_format)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # As in reading; limits of formats raise many.
        raise ImageError(f"{path} can't be written: {_reason(error)}") from error
    _write(path, data)
    return notes


def save(image: Image.Image, path: Any) -> None:
    """Writes a Pillow image as `write_picture` does.

    Raises:
      ImageError, OSError: as there.
    """
    write_picture(Picture((from_pillow(image)[0],), ""), path)


def _write(path: Any, data: bytes) -> None:
    try:
        write_whole(path, data)
    except Exception as error:  # Of a remote file system, any.
        if getattr(error, "errno", None) in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ImageError(f"{path} can't be written: {_reason(error)}") from error
