"""Picture files and Pillow images to arrays and back: `(H, W)` gray or `(H, W, 3)` RGB, integers.

What a file carries besides its pixels (depth, alpha, colour profile, EXIF, resolution, timing of an
animation) is read with them and written with them. `read_picture` and `write_picture` do that;
`read`, `read_shape` and `at_working_size` serve training, which needs pixels only.
"""

import contextlib
import ctypes
import dataclasses
import errno
import io
import itertools
import logging
import os
import re
import stat
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    TiffTags,
    UnidentifiedImageError,
)

from aecore.errors import ImageError

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Endings, in lower case, by which a picture is recognised in a folder."""

PIXEL_LIMIT = 2**30
"""Pixels that all frames of a picture may have together; a hostile file can claim any number."""

_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a mode says of pixels."""

    gray: bool
    alpha: bool
    bits: int


_KINDS = {
    "1": _Kind(gray=True, alpha=False, bits=1),
    "L": _Kind(gray=True, alpha=False, bits=8),
    "LA": _Kind(gray=True, alpha=True, bits=8),
    "RGB": _Kind(gray=False, alpha=False, bits=8),
    "RGBA": _Kind(gray=False, alpha=True, bits=8),
    "I;16": _Kind(gray=True, alpha=False, bits=16),
    "LA;16": _Kind(gray=True, alpha=True, bits=16),
    "RGB;16": _Kind(gray=False, alpha=False, bits=16),
    "RGBA;16": _Kind(gray=False, alpha=True, bits=16),
}
_MODES = {kind: mode for mode, kind in _KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture as arrays, and what it must become again."""

    values: np.ndarray
    """`(H, W)` gray or `(H, W, 3)` RGB, uint8, or uint16 if the mode has 16 bits."""
    alpha: np.ndarray | None = None
    """`(H, W)`, of the same dtype; None if the mode has none."""
    mode: str = "RGB"
    """1, L, LA, RGB, RGBA or I;16, as Pillow calls them, or LA;16, RGB;16 or RGBA;16."""
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else belongs to this frame, as far as the file has it: icc_profile, exif (without
    orientation), xmp and comment (bytes), dpi (a pair), duration (ms), png (chunks of a PNG)."""

    def replace(self, values: np.ndarray, alpha: np.ndarray | None) -> "Frame":
        """The same frame with other pixels; `values` may be gray where these are RGB or reverse.

        Raises:
          ImageError: shapes or dtypes don't fit one another.
        """
        kind = _KINDS[self.mode]
        gray = values.ndim == 2
        bits = 16 if values.dtype == np.uint16 else 8
        if kind.bits == 1 and gray and bits == 8 and alpha is None:
            bits = 1
        frame = dataclasses.replace(
            self,
            values=values,
            alpha=alpha,
            mode=_MODES[_Kind(gray=gray, alpha=alpha is not None, bits=bits)],
        )
        _check(frame)
        return frame


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture file: one frame, or those of an animation, or the pages of a TIFF."""

    frames: tuple[Frame, ...]
    format: str
    """Pillow's name of the file format."""
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of an animation, loop: how often it is played, 0 for ever. Of WebP, lossless."""
    notes: tuple[str, ...] = ()
    """What was changed in reading, each a few words."""


@dataclasses.dataclass(frozen=True)
class _Format:
    """What a file format can hold, as far as Pillow or this module writes it."""

    modes: frozenset[str]
    carries: frozenset[str] = frozenset()
    frames: bool = False


_EMBEDDED = frozenset({"icc_profile", "exif", "xmp"})
_FORMATS = {
    "PNG": _Format(frozenset(_KINDS), _EMBEDDED | {"dpi", "duration", "comment", "png"}, True),
    "TIFF": _Format(frozenset(_KINDS) - {"LA;16"}, _EMBEDDED | {"dpi"}, True),
    "WEBP": _Format(frozenset({"RGB", "RGBA"}), _EMBEDDED | {"dpi", "duration"}, True),
    "GIF": _Format(frozenset({"L", "RGB", "RGBA"}), frozenset({"duration", "comment"}), True),
    "JPEG": _Format(frozenset({"L", "RGB"}), _EMBEDDED | {"dpi", "comment"}),
    "JPEG2000": _Format(frozenset({"L", "LA", "RGB", "RGBA", "I;16"})),
    "AVIF": _Format(frozenset({"RGB", "RGBA"}), _EMBEDDED),
    "BMP": _Format(frozenset({"1", "L", "RGB"}), frozenset({"dpi"})),
    "PPM": _Format(frozenset({"1", "L", "I;16", "RGB", "RGB;16"})),
    "TGA": _Format(frozenset({"1", "L", "LA", "RGB", "RGBA"})),
}
_NAMES = {
    "icc_profile": "the colour profile was",
    "exif": "EXIF was",
    "xmp": "XMP was",
    "dpi": "the resolution was",
    "duration": "durations were",
    "comment": "the comment was",
}

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

# Tags of a TIFF that describe how its pixels are stored: they are part of neither EXIF nor what
# may be copied to another file. Sizes and offsets, colour maps, JPEG tables, XMP, ICC, thumbnails.
_STRUCTURAL_TAGS = frozenset(
    tag
    for first, last in (
        (254, 259),
        (262, 266),
        (273, 274),
        (277, 281),
        (284, 284),
        (288, 293),
        (301, 301),
        (317, 325),
        (330, 330),
        (332, 334),
        (336, 343),
        (347, 347),
        (512, 521),
        (529, 532),
        (700, 700),
        (34377, 34377),
        (34675, 34675),
        (37724, 37724),
    )
    for tag in range(first, last + 1)
)
_SUB_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# Of zlib: a higher level takes 16 bits of a photograph three times as long and saves 3 %.
_COMPRESSION = 3
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
        height, width = image.height, image.width
        # Pillow's TIFF reader has swapped them itself.
        if image.format != "TIFF" and _orientation(image) >= 5:
            height, width = width, height
        gray = image.mode in _GRAY_MODES or _rawmode(image) == "LA;16B"
        return height, width, 1 if gray else 3


def read_size(path: Any) -> tuple[int, int]:
    """Height and width of an upright picture, decoding no pixels.

    Raises:
      ImageError: as for `read_shape`.
    """
    return read_shape(path)[:2]


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
        if _KINDS[frame.mode].bits == 8 and (";16" in rawmode or bits > 8):
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
    for tag in _STRUCTURAL_TAGS & set(exif):
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


def from_pillow(image: Image.Image) -> tuple[Frame, tuple[str, ...]]:
    """A Pillow image as a frame, with notes of what was changed.

    Palettes and colour spaces other than gray and RGB become RGB; a transparent colour becomes an
    alpha channel. The image is taken as it lies: EXIF orientation is not looked at.

    Raises:
      ImageError: the mode is I or F, whose range is unknown, or one that can't become RGB.
    """
    mode = image.mode
    if mode in ("I", "F"):
        raise ImageError(
            f"a picture of mode {mode} has no known range; save it with 8 or 16 bits a value"
        )
    transparent = image.has_transparency_data
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        if not transparent:
            return Frame(values, mode="I;16"), ()
        match = values == image.info["transparency"]
        return Frame(values, np.where(match, 0, 65535).astype(np.uint16), "LA;16"), ()
    notes = []
    if mode in ("1", "L", "LA", "La"):
        wanted = "LA" if transparent else "L"
    else:
        wanted = "RGBA" if transparent else "RGB"
    if mode in ("P", "PA"):
        notes.append(f"a palette became {wanted}")
    elif mode == "1" and transparent:
        notes.append(f"1 bit became {wanted}")
    elif mode not in (*_KINDS, "La", "RGBa", "RGBX"):
        notes.append(f"{mode} became {wanted}")
    if mode != wanted:
        try:
            image = image.convert(wanted)
        except (ValueError, KeyError, OSError) as error:
            raise ImageError(
                f"picture mode {mode} is not supported ({_reason(error)}); convert it to RGB first"
            ) from error
    array = np.asarray(image)
    kept = mode if mode == "1" and not transparent else wanted
    if not transparent:
        return Frame(array, mode=kept), tuple(notes)
    values = array[..., 0] if wanted == "LA" else array[..., :3]
    return Frame(np.ascontiguousarray(values), array[..., -1].copy(), kept), tuple(notes)


def to_pillow(frame: Frame) -> Image.Image:
    """A frame as a Pillow image of its mode; mode 1 is rounded at half.

    Raises:
      ImageError: the frame has colour, or gray with alpha, of 16 bits, which Pillow does not know.
    """
    _check(frame)
    if frame.mode not in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
        raise ImageError(f"Pillow has no images of mode {frame.mode}; use arrays, or 8 bits")
    if frame.mode == "1":
        return Image.fromarray(frame.values).point([0] * 128 + [255] * 128, "1")
    return Image.fromarray(_samples(frame))


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


def _check(frame: Frame) -> None:
    kind = _KINDS[frame.mode]
    dtype = np.uint16 if kind.bits == 16 else np.uint8
    shape = frame.values.shape[:2] + (() if kind.gray else (3,))
    if (
        frame.values.shape != shape
        or frame.values.dtype != dtype
        or frame.values.size == 0
        or (frame.alpha is not None) != kind.alpha
        or (kind.alpha and (frame.alpha.shape != shape[:2] or frame.alpha.dtype != dtype))
    ):
        arrays = ", ".join(
            "none" if array is None else f"{array.dtype} {array.shape}"
            for array in (frame.values, frame.alpha)
        )
        raise ImageError(f"values and alpha ({arrays}) do not make a picture of mode {frame.mode}")


def _samples(frame: Frame) -> np.ndarray:
    """Values and alpha in one array, `(H, W)` or `(H, W, C)`."""
    if frame.alpha is None:
        return np.ascontiguousarray(frame.values)
    return np.dstack([frame.values, frame.alpha])


def _convert(frame: Frame, mode: str) -> Frame:
    """A frame in another mode; colour can't become gray, as gray alone would not be told."""
    old, new = _KINDS[frame.mode], _KINDS[mode]

    def scale(array: np.ndarray) -> np.ndarray:
        if old.bits <= 8 and new.bits == 16:
            return array.astype(np.uint16) * 257
        if old.bits == 16 and new.bits == 8:
            return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return array

    values, alpha = frame.values, frame.alpha
    if old.bits == 1 and new.bits > 1:
        values = np.where(values < 128, 0, 255).astype(np.uint8)
    values = scale(values)
    if old.gray and not new.gray:
        values = np.repeat(values[..., None], 3, axis=2)
    if not new.alpha:
        alpha = None
    elif alpha is not None:
        alpha = scale(alpha)
    else:
        alpha = np.full(values.shape[:2], 65535 if new.bits == 16 else 255, values.dtype)
    return dataclasses.replace(frame, values=values, alpha=alpha, mode=mode)


def _fit(frame: Frame, file_format: str) -> tuple[Frame, list[str]]:
    """A frame as a file format can hold it, and notes of what it lost."""
    modes, carries = _FORMATS[file_format].modes, _FORMATS[file_format].carries
    old = _KINDS[frame.mode]
    notes = []
    if frame.mode not in modes:
        # What is lost first comes last: gray that becomes RGB loses nothing.
        candidates = itertools.product(
            (True, False) if old.alpha else (False,),
            (16, 8) if old.bits == 16 else (8,),
            (True, False) if old.gray else (False,),
        )
        new = next(
            kind
            for alpha, bits, gray in candidates
            if _MODES[kind := _Kind(gray, alpha, bits)] in modes
        )
        if old.alpha and not new.alpha:
            notes.append(f"alpha was dropped: {file_format} holds none")
        if old.bits == 16 and new.bits == 8:
            notes.append(f"16 bits became 8: {file_format} holds no more")
        if old.bits == 1:
            notes.append(f"1 bit became {new.bits}: {file_format} holds no less")
        if old.gray and not new.gray:
            notes.append(f"gray became RGB: {file_format} holds no such gray")
        frame = _convert(frame, _MODES[new])
    carried = dict(frame.carried)
    profile = carried.get("icc_profile", b"")
    space = b"GRAY" if _KINDS[frame.mode].gray else b"RGB "
    if old.gray != _KINDS[frame.mode].gray and profile[16:20] not in (space, b""):
        del carried["icc_profile"]
        notes.append("the colour profile was dropped: it is for gray")
    for name in set(carried) - carries:
        value = carried.pop(name)
        if name in _NAMES and value:
            notes.append(f"{_NAMES[name]} dropped: {file_format} holds none")
    return dataclasses.replace(frame, carried=carried), sorted(notes)


def _unify(frames: Sequence[Frame]) -> list[Frame]:
    """Frames of one animation in one mode that holds all.

    Raises:
      ImageError: they differ in size.
    """
    sizes = {frame.values.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ImageError("its pages differ in size, so they are no animation; use .tif")
    kinds = [_KINDS[frame.mode] for frame in frames]
    joint = _Kind(
        gray=all(kind.gray for kind in kinds),
        alpha=any(kind.alpha for kind in kinds),
        bits=max(kind.bits for kind in kinds),
    )
    if joint.alpha and joint.bits == 1:
        joint = dataclasses.replace(joint, bits=8)
    return [_convert(frame, _MODES[joint]) for frame in frames]


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
    if file_format not in _FORMATS:
        named = file_format or f"the ending {suffix!r}"
        raise ImageError(f"{path}: pictures can't be written as {named}; use .png, .tif or .jpg")
    try:
        data, notes = _encode(picture, file_format)
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
    """Writes a file by way of a temporary one beside it."""
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except Exception as error:  # Of a remote file system, any.
        if getattr(error, "errno", None) in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ImageError(f"{path} can't be written: {_reason(error)}") from error


def _encode(picture: Picture, file_format: str) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a file, and what it does not hold."""
    for frame in picture.frames:
        _check(frame)
    if not picture.frames:
        raise ImageError("the picture has no frames")
    if len(picture.frames) > 1 and not _FORMATS[file_format].frames:
        raise ImageError(
            f"the picture has {len(picture.frames)} frames, {file_format} holds one; "
            "use .gif, .webp, .png or .tif"
        )
    notes = {}
    frames = []
    for frame in picture.frames:
        frame, lost = _fit(frame, file_format)
        frames.append(frame)
        notes |= dict.fromkeys(lost)
    if file_format == "TIFF":
        return _tiff(frames), tuple(notes)
    frames = _unify(frames)
    plays = picture.carried.get("loop", 0)
    if file_format == "GIF":
        if any(_has_partial_alpha(frame) for frame in frames):
            notes["alpha became 1 bit: GIF holds no more"] = None
        return _gif(frames, plays), tuple(notes)
    if file_format == "PNG":
        return _png(frames, plays), tuple(notes)
    if file_format == "WEBP":
        return _webp(frames, plays, picture.carried.get("lossless", True)), tuple(notes)
    frame = frames[0]
    if frame.mode == "RGB;16":
        header = "P6\n{1} {0}\n65535\n".format(*frame.values.shape)
        return header.encode() + frame.values.astype(">u2").tobytes(), tuple(notes)
    return _with_pillow(frame, file_format, notes), tuple(notes)


def _with_pillow(frame: Frame, file_format: str, notes: dict[str, None]) -> bytes:
    """One frame, as Pillow writes it."""
    options = dict(frame.carried)
    if file_format == "JPEG":
        options |= {"quality": 95, "subsampling": "4:4:4"}
        for name in ("exif", "xmp", "comment"):
            # A JPEG has them in one segment, with a length of 16 bits and a name of up to 29.
            if len(options.get(name, b"")) > 65500:
                del options[name]
                notes[f"{_NAMES[name]} dropped: JPEG holds no more than 65,500 bytes of it"] = None
        if max(options.get("dpi", (0,))) >= 65536:
            del options["dpi"]
    elif file_format == "AVIF":
        options |= {"quality": 95, "subsampling": "4:4:4"}
    file = io.BytesIO()
    to_pillow(frame).save(file, format=file_format, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(frames: Sequence[Frame], plays: int) -> bytes:
    """A PNG, animated if there are several frames; each frame is stored whole.

    Not Pillow's writer of animations, which joins equal frames, nor of 16 bits, as it knows no
    such colour.
    """
    carried = frames[0].carried
    header, data = _png_pixels(frames[0])
    chunks = [(b"IHDR", header)]
    if "icc_profile" in carried:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(carried["icc_profile"])))
    chunks += carried.get("png", ())
    if "dpi" in carried:
        per_meter = [round(value / 0.0254) for value in carried["dpi"]]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_meter, 1)))
    if "exif" in carried:
        chunks.append((b"eXIf", carried["exif"].removeprefix(b"Exif\0\0")))
    if "xmp" in carried:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + carried["xmp"]))
    if "comment" in carried:
        chunks.append((b"tEXt", b"Comment\0" + carried["comment"].replace(b"\0", b"")))
    if len(frames) == 1:
        chunks.append((b"IDAT", data))
    else:
        chunks.append((b"acTL", struct.pack(">II", len(frames), plays)))
        numbers = itertools.count()
        for index, frame in enumerate(frames):
            seconds = Fraction(frame.carried.get("duration", 0) / 1000)
            # A duration is a fraction of two numbers of 16 bits.
            delay = min(seconds.limit_denominator(65535), Fraction(65535))
            if delay.numerator > 65535:
                delay = seconds.limit_denominator(max(1, int(65535 / delay)))
            height, width = frame.values.shape[:2]
            control = (next(numbers), width, height, 0, 0, delay.numerator, delay.denominator, 0, 0)
            chunks.append((b"fcTL", struct.pack(">5I2H2B", *control)))
            if index == 0:
                chunks.append((b"IDAT", data))
            else:
                number = struct.pack(">I", next(numbers))
                chunks.append((b"fdAT", number + _png_pixels(frame)[1]))
    chunks.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _png_pixels(frame: Frame) -> tuple[bytes, bytes]:
    """The header of a PNG and its compressed pixels."""
    if frame.mode in ("LA;16", "RGB;16", "RGBA;16"):
        height, width = frame.values.shape[:2]
        color = {"LA;16": 4, "RGB;16": 2, "RGBA;16": 6}[frame.mode]
        header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
        return header, _filtered(_samples(frame))
    file = io.BytesIO()
    to_pillow(frame).save(file, format="PNG")
    content = file.getvalue()
    header, pixels = b"", []
    place = 8
    while place < len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            header = data
        elif kind == b"IDAT":
            pixels.append(data)
        place += size + 12
    return header, b"".join(pixels)


def _filtered(samples: np.ndarray) -> bytes:
    """`(H, W, C)` uint16 as PNG compresses them: each row less its left or its upper neighbour."""
    height, _, channels = samples.shape
    compressor = zlib.compressobj(_COMPRESSION)
    parts = []
    above = np.zeros((1, samples.shape[1] * channels * 2), np.uint8)
    for start in range(0, height, 64):
        rows = samples[start : start + 64].astype(">u2").view(np.uint8).reshape(-1, above.shape[1])
        left = rows.copy()
        left[:, 2 * channels :] -= rows[:, : -2 * channels]
        up = rows - np.concatenate([above, rows[:-1]])
        above = rows[-1:]
        # The usual guess at which compresses better: the smaller sum of signed differences.
        weights = [np.abs(part.view(np.int8).astype(np.int16)).sum(axis=1) for part in (left, up)]
        kinds = np.where(weights[0] <= weights[1], 1, 2).astype(np.uint8)[:, None]
        block = np.concatenate([kinds, np.where(kinds == 1, left, up)], axis=1)
        parts.append(compressor.compress(block.tobytes()))
    return b"".join([*parts, compressor.flush()])


def _has_partial_alpha(frame: Frame) -> bool:
    return frame.alpha is not None and bool(((frame.alpha > 0) & (frame.alpha < 255)).any())


def _gif(frames: Sequence[Frame], plays: int) -> bytes:
    """A GIF, animated if there are several frames; each is stored whole, with its own palette."""
    parts = []
    for index, frame in enumerate(frames):
        image, transparent = _with_palette(frame)
        options: dict[str, Any] = {"duration": 10 * round(frame.carried.get("duration", 0) / 10)}
        options["duration"] = min(options["duration"], 655350)
        if transparent is not None:
            options["transparency"] = transparent
        if len(frames) > 1:
            options["disposal"] = 2 if transparent is not None else 1
        if index == 0:
            shared = {"comment": frame.carried.get("comment"), "duration": 1}
            if len(frames) > 1 and plays != 1:
                shared["loop"] = min(plays, 65536) - 1 if plays else 0
            parts += GifImagePlugin.getheader(image, info=shared)[0]
        else:
            options["include_color_table"] = True
        parts += GifImagePlugin.getdata(image, **options)
    return b"".join([*parts, b";"])


def _with_palette(frame: Frame) -> tuple[Image.Image, int | None]:
    """A frame as an image with a palette, and the index of the transparent colour, if any.

    Colours are exact if they are few enough.
    """
    if frame.mode == "L":
        image = Image.fromarray(frame.values).copy()
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([value for value in range(256) for _ in range(3)])
        return image, None
    hidden = None if frame.alpha is None else frame.alpha < 128
    if hidden is not None and not hidden.any():
        hidden = None
    room = 256 if hidden is None else 255
    values = np.ascontiguousarray(frame.values)
    color = [0, 0, 0]
    if hidden is not None:
        color = values[hidden][0].tolist()
        # What is hidden takes no room in the palette.
        shown = np.zeros(3, np.uint8) if hidden.all() else values[~hidden][0]
        values = np.where(hidden[..., None], shown, values)
    image = Image.fromarray(values)
    if image.getcolors(room) is None:
        image = image.quantize(room)
    else:
        packed = values.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        colors, indices = np.unique(packed, return_inverse=True)
        palette = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1)
        image = Image.fromarray(indices.reshape(packed.shape).astype(np.uint8))
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(palette.astype(np.uint8).tobytes())
    if hidden is None:
        return image, None
    palette = list(image.getpalette())
    transparent = len(palette) // 3
    image.putpalette(palette + color)
    image.paste(transparent, mask=Image.fromarray(hidden))
    return image, transparent


def _webp(frames: Sequence[Frame], plays: int, lossless: bool) -> bytes:
    """A WebP, animated if there are several frames.

    Not Pillow's writer of animations, which joins equal frames and changes hidden colours.
    """
    carried = frames[0].carried
    options = {"lossless": lossless, "quality": 80 if lossless else 95, "exact": True}
    embedded = {
        b"ICCP": carried.get("icc_profile", b""),
        b"EXIF": _with_resolution(carried).removeprefix(b"Exif\0\0"),
        b"XMP ": carried.get("xmp", b""),
    }
    bodies = []
    for frame in frames:
        file = io.BytesIO()
        to_pillow(frame).save(file, format="WEBP", **options)
        bodies.append(_webp_chunks(file.getvalue()))
    height, width = frames[0].values.shape[:2]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    alpha = frames[0].alpha is not None
    flags = 0x20 * bool(embedded[b"ICCP"]) | 0x10 * alpha | 0x08 * bool(embedded[b"EXIF"])
    flags |= 0x04 * bool(embedded[b"XMP "]) | 0x02 * (len(frames) > 1)
    parts = [_riff(b"VP8X", struct.pack("<I", flags) + size)]
    if embedded[b"ICCP"]:
        parts.append(_riff(b"ICCP", embedded[b"ICCP"]))
    if len(frames) == 1:
        parts += bodies
    else:
        parts.append(_riff(b"ANIM", struct.pack("<IH", 0, min(plays, 65535))))
        for frame, body in zip(frames, bodies, strict=True):
            duration = min(round(frame.carried.get("duration", 0)), 0xFFFFFF).to_bytes(3, "little")
            # At the origin, not blended with what was there before.
            parts.append(_riff(b"ANMF", bytes(6) + size + duration + b"\x02" + body))
    parts += [_riff(kind, embedded[kind]) for kind in (b"EXIF", b"XMP ") if embedded[kind]]
    return _riff(b"RIFF", b"WEBP" + b"".join(parts))


def _riff(kind: bytes, data: bytes) -> bytes:
    """A chunk of a WebP."""
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _webp_chunks(content: bytes) -> bytes:
    """The chunks of a still WebP that hold pixels."""
    parts = []
    place = 12
    while place < len(content):
        kind, size = struct.unpack_from("<4sI", content, place)
        end = place + 8 + size + size % 2
        if kind in (b"ALPH", b"VP8 ", b"VP8L"):
            parts.append(content[place:end])
        place = end
    return b"".join(parts)


def _with_resolution(carried: Mapping[str, Any]) -> bytes:
    """EXIF with the resolution in it, for formats that have no other place for it."""
    exif = Image.Exif()
    exif.load(carried.get("exif", b""))
    if "dpi" not in carried or ExifTags.Base.XResolution in exif:
        return carried.get("exif", b"")
    exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = carried["dpi"]
    exif[ExifTags.Base.ResolutionUnit] = 2
    return exif.tobytes()


def _tiff(frames: Sequence[Frame]) -> bytes:
    """A TIFF with a page for each frame, compressed without loss.

    Not Pillow's writer, which knows no colour of 16 bits, and loses EXIF where it compresses.
    """
    parts = [b"II*\0" + struct.pack("<I", 8)]
    place = 8
    for index, frame in enumerate(frames):
        kind = _KINDS[frame.mode]
        height, width = frame.values.shape[:2]
        samples = _samples(frame).reshape(height, width, -1)
        channels = samples.shape[2]
        rows = max(1, 2**18 // (width * channels * samples.itemsize))
        strips = [
            zlib.compress(_tiff_strip(samples[start : start + rows], kind), _COMPRESSION)
            for start in range(0, height, rows)
        ]
        sizes = [len(strip) for strip in strips]
        offsets = [0, *itertools.accumulate(sizes)][:-1]
        ifd = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
        _add_carried(ifd, frame.carried)
        ifd.tagtype |= {273: TiffTags.LONG, 278: TiffTags.LONG, 279: TiffTags.LONG}
        ifd[256], ifd[257], ifd[258] = width, height, (kind.bits,) * channels
        ifd[259] = 8  # Deflate, as in zip files.
        ifd[262] = 1 if kind.gray else 2
        ifd[273], ifd[277], ifd[278], ifd[279] = tuple(offsets), channels, rows, tuple(sizes)
        ifd[284] = 1
        if kind.bits > 1:
            ifd[317] = 2
        if kind.alpha:
            ifd[338] = 2
        header = bytearray(ifd.tobytes(place))
        following = place + len(header) + sum(sizes)
        padding = following % 2
        if index < len(frames) - 1:
            # The offset of the next page comes after the entries, of 12 bytes each.
            count = struct.unpack_from("<H", header)[0]
            struct.pack_into("<I", header, 2 + 12 * count, following + padding)
        parts += [header, *strips, bytes(padding)]
        place = following + padding
    if place >= 2**32:
        raise ImageError("it would be larger than 4 GiB, which TIFF can't be; use .png")
    return b"".join(parts)


def _tiff_strip(samples: np.ndarray, kind: _Kind) -> bytes:
    """Rows `(N, W, C)` as they are compressed: bits, or each pixel less its left neighbour."""
    if kind.bits == 1:
        return np.packbits(samples[..., 0] >= 128, axis=1).tobytes()
    rows = samples.copy()
    rows[:, 1:] -= samples[:, :-1]
    return rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()


def _add_carried(ifd: Any, carried: Mapping[str, Any]) -> None:
    exif = Image.Exif()
    exif.load(carried.get("exif", b""))
    for tag in set(exif) - _STRUCTURAL_TAGS:
        value = exif[tag]
        if tag in _SUB_IFDS:
            value = dict(exif.get_ifd(tag))
            if ExifTags.IFD.Interop in value:
                value[ExifTags.IFD.Interop] = dict(exif.get_ifd(ExifTags.IFD.Interop))
            ifd.tagtype[tag] = TiffTags.LONG
        ifd[tag] = value
    if "icc_profile" in carried:
        ifd.tagtype[34675] = TiffTags.UNDEFINED
        ifd[34675] = carried["icc_profile"]
    if "xmp" in carried:
        ifd.tagtype[700] = TiffTags.BYTE
        ifd[700] = carried["xmp"]
    if "dpi" in carried:
        ifd[282], ifd[283] = carried["dpi"]
        ifd[296] = 2
