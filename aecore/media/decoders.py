"""Open Pillow images as frames: upright arrays, with what belongs to them besides pixels."""

import contextlib
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import tifffile
from etils import epath
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from aecore.errors import ImageError
from aecore.media.encoders import STRUCTURAL_TAGS, SUB_IFDS
from aecore.media.frames import PIXEL_FORMATS, Frame
from aecore.storage import is_remote, naming, reason

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


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[ImageFile.ImageFile]:
    """Opens a picture file. Whatever fails, here or while the image is used, is an ImageError."""
    try:
        # Opening a pipe would wait for somebody to write to it.
        if not is_remote(path) and stat.S_ISFIFO(os.stat(path).st_mode):  # noqa: PTH116
            raise ImageError("it is a pipe; save the picture to a file")
        with _open_binary(path) as file, Image.open(file) as image:
            if not image.width or not image.height:
                raise ImageError("it has no pixels")
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not a picture in a format that Pillow knows") from error
    except ImageError as error:
        message = str(error)
        named = message.startswith(str(path))
        raise ImageError(message if named else f"{path} can't be read: {message}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"{path} can't be read: it has more than {most:,} pixels") from error
    except Exception as error:  # Damaged files make Pillow's decoders fail in many ways.
        raise ImageError(f"{path} can't be read: {reason(error)}") from error


def _open_binary(path: epath.Path) -> IO[bytes]:
    with naming(path):
        file = path.open("rb")
        file.read(1)  # Remote files are only opened when they are read.
        file.seek(0)
    return file


def upright_shape(image: ImageFile.ImageFile) -> tuple[int, int, int]:
    """Height, width and channels (1 for gray, else 3) once the image is turned upright."""
    height, width = image.height, image.width
    # Pillow's TIFF reader has swapped them itself.
    if image.format != "TIFF" and _orientation(image) >= 5:
        height, width = width, height
    gray = image.mode in _GRAY_MODES or _rawmode(image) == "LA;16B"
    return height, width, 1 if gray else 3


def _orientation(image: ImageFile.ImageFile) -> int:
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


def frame_range(image: ImageFile.ImageFile) -> tuple[int, int]:
    """The first and the last frame to read."""
    if image.format not in ("GIF", "PNG", "TIFF", "WEBP"):
        return 0, 0
    # The default image of an animated PNG is for readers that know no animation.
    count = getattr(image, "n_frames", 1)
    first = 1 if getattr(image, "default_image", False) and count > 1 else 0
    return first, count - 1


def count_pixels(image: ImageFile.ImageFile, first: int, last: int) -> int:
    """The number of pixels of all frames, decoding none."""
    if image.format != "TIFF" or first == last:
        return (last - first + 1) * image.width * image.height
    total = 0
    for index in range(first, last + 1):
        image.seek(index)
        total += image.width * image.height
    return total


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF; of other images, none."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _rawmode(image: Any) -> str:
    """How the pixels of a picture that is not loaded yet are stored, in Pillow's terms."""
    if not getattr(image, "tile", None):
        return ""
    args = image.tile[0].args
    return str(args if isinstance(args, str) else args[0] if args else "")


def loaded(image: ImageFile.ImageFile) -> Image.Image:
    """Decodes an image's pixels. Gray of 12 or 16 bits comes out as mode I;16, white at 65535."""
    rawmode, tags = _rawmode(image), _tags(image)
    image.load()
    if "transparency" in image.info and rawmode in ("L;2", "L;4"):
        # Pillow scales the pixels to 8 bits, but not the value that is transparent.
        image.info["transparency"] *= 85 if rawmode == "L;2" else 17
    if image.format == "PPM" and image.mode == "I":
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if not image.mode.startswith("I;16") or not (inverted or rawmode == "I;12"):
        return image
    values = np.asarray(image).astype(np.uint16)
    if rawmode == "I;12":
        values = values << 4 | values >> 8  # So that 0xfff becomes 0xffff.
    # Pillow heeds "white is zero" with 8 bits only.
    return Image.fromarray(~values if inverted else values)


def read_frame(image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> tuple[Frame, list[str]]:
    """Decodes the frame that an open picture is at, and notes what was changed.

    Args:
      image: the picture.
      again: the same file, opened a second time.
    """
    rawmode, tags = _rawmode(image), _tags(image)
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,)))
    if image.format == "PPM" and image.tile[0].codec_name.startswith("ppm") and image.mode != "1":
        bits = int(image.tile[0].args[1]).bit_length()  # pyright: ignore[reportOptionalSubscript]
    # Pillow's TIFF reader turns the picture itself, and then forgets how it lay.
    turned = image.format == "TIFF" and tags.get(ExifTags.Base.Orientation, 1) >= 5
    notes = []
    deep = _deep_samples(image, again)
    if deep is not None:
        frame = _deep_frame(deep, image.info.get("transparency"))
    else:
        frame, changes = _to_frame(loaded(image))
        notes += changes
        if rawmode == "I;12":
            notes.append("12 bits became 16")
        if PIXEL_FORMATS[frame.mode].bits == 8 and (";16" in rawmode or bits > 8):
            notes.append("16 bits became 8")
    if image.format == "GIF" and frame.alpha is not None and (frame.alpha == 255).all():
        # In an animation a transparent colour may stand for what has not changed.
        frame = frame.replace(frame.values, None)
    return _with_carried(frame, image, turned, notes), notes


def from_pillow(image: Image.Image) -> tuple[Frame, tuple[str, ...]]:
    """A Pillow image as an upright frame, with notes of what was changed; `image` stays as it is.

    The frame carries the colour profile, EXIF (without orientation), XMP and resolution. Palettes
    and colour spaces other than gray and RGB become RGB; a transparent colour becomes alpha.

    Raises:
      ImageError: the mode is I or F, whose range is unknown, or can't become RGB; or the file from
        which the image was opened is damaged.
    """
    try:
        image.load()
    except Exception as error:  # As in `opened`.
        name = getattr(image, "filename", "") or "the image"
        raise ImageError(f"{name} can't be read: {reason(error)}") from error
    frame, notes = _to_frame(image)
    notes = list(notes)
    return _with_carried(frame, image, False, notes), tuple(notes)


def _with_carried(frame: Frame, image: Image.Image, turned: bool, notes: list[str]) -> Frame:
    """The frame turned upright, with what belongs to the image that it was decoded from."""
    orientation, carried = _read_carried(image, turned, notes)
    turn = _UPRIGHT.get(orientation, lambda array: array)
    values = np.ascontiguousarray(turn(frame.values))
    alpha = None if frame.alpha is None else np.ascontiguousarray(turn(frame.alpha))
    profile = carried.get("icc_profile")
    if profile and image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and profile[16:20] != b"RGB ":
        del carried["icc_profile"]
        notes.append(f"the colour profile was dropped: it is for {image.mode}")
    return Frame(values, alpha, frame.mode, carried)


def _deep_samples(image: Any, again: Any) -> np.ndarray | None:
    """`(H, W, C)` uint16, C from 2 to 4, of a picture with more than 8 bits of colour; else None.

    Pillow's images hold 8 bits of each colour: it takes the upper of two bytes. Told that the bytes
    come in the other order it takes the lower one, so the picture is decoded twice.

    Args:
      image: the picture, an `ImageFile`, which is not loaded yet.
      again: the same file, opened a second time.
    """
    rawmode, tile = _rawmode(image), next(iter(image.tile), None)
    if tile is None or (image.format == "PNG" and image.is_animated):
        return None
    if tile.codec_name == "ppm" and tile.args == ("RGB", 65535):
        image.fp.seek(tile.offset)
        samples = np.frombuffer(image.fp.read(6 * image.width * image.height), ">u2")
        return samples.reshape(image.height, image.width, 3).astype(np.uint16)
    if image.format == "PNG" and rawmode == "LA;16B":
        # Four bytes a pixel, whatever they are called.
        image.tile = [tile._replace(args="RGBA")]
        image.load()
        return np.asarray(image).view(">u2").astype(np.uint16)
    tags = _tags(image)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, ())
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    if planes and image.mode in ("RGB", "RGBA") and 16 in bits:
        image.fp.seek(0)
        with tifffile.TiffFile(image.fp) as file:
            samples = file.pages[image.tell()].asarray()
        if samples.dtype != np.uint16 or samples.ndim != 3 or len(samples) not in (3, 4):
            raise ImageError(f"its {len(bits)} planes of 16 bits are neither RGB nor RGBA")
        return np.moveaxis(samples, 0, 2)
    match = re.fullmatch("(RGB|RGBA|RGBX|RGBa);16([BLN])", rawmode)
    if not match or tile.codec_name not in ("zip", "raw", "libtiff"):
        return None
    stored, order = match.groups()
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    again.seek(image.tell())
    halves = []
    for opening, half in ((image, order), (again, "L" if order == "B" else "B")):
        mode = f"{stored.upper()};16{half}"
        opening.tile = [
            tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))
            for tile in opening.tile
        ]
        opening.load()
        halves.append(np.asarray(opening))
    samples = halves[0].astype(np.uint16) << 8 | halves[1]
    if stored != "RGBa":
        return samples
    # Colours multiplied by alpha.
    opacity = np.maximum(samples[..., 3:], 1).astype(np.uint32)
    colours = (samples[..., :3] * np.uint32(65535) + opacity // 2) // opacity
    samples[..., :3] = np.minimum(colours, 65535)
    return samples


def _deep_frame(samples: np.ndarray, transparent: Any) -> Frame:
    channels = samples.shape[2]
    if channels == 2:
        return Frame(samples[..., 0], samples[..., 1], "LA;16")
    values, alpha = samples[..., :3], samples[..., 3] if channels == 4 else None
    if isinstance(transparent, tuple) and alpha is None:
        match = (values == np.array(transparent, np.uint16)).all(axis=2)
        alpha = np.where(match, 0, 65535).astype(np.uint16)
    return Frame(values, alpha, "RGB;16" if alpha is None else "RGBA;16")


def _to_frame(image: Image.Image) -> tuple[Frame, tuple[str, ...]]:
    """The pixels of an image as it lies, with notes of what was changed."""
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
    elif mode not in (*PIXEL_FORMATS, "La", "RGBa", "RGBX"):
        notes.append(f"{mode} became {wanted}")
    if mode != wanted:
        try:
            image = image.convert(wanted)
        except (ValueError, KeyError, OSError) as error:
            raise ImageError(
                f"picture mode {mode} is not supported ({error}); convert it to RGB first"
            ) from error
    array = np.asarray(image)
    kept = mode if mode == "1" and not transparent else wanted
    if not transparent:
        return Frame(array, mode=kept), tuple(notes)
    values = array[..., 0] if wanted == "LA" else array[..., :3]
    return Frame(np.ascontiguousarray(values), array[..., -1].copy(), kept), tuple(notes)


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
    in_exif = None
    try:
        exif = _exif_copy(image, notes)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        # Reading a JPEG or a PNG, Pillow may have failed already, and kept an empty one.
        if len(info.get("exif", b"")) > 24 and not len(exif):
            raise ValueError("no tag can be read")
        in_exif = _pop_resolution(exif)
        turned = turned or orientation in (5, 6, 7, 8)
        carried["exif"] = _exif_bytes(exif, turned=turned)
    except Exception:  # Any damage, as in reading pixels; these are worth having without.
        notes.append("EXIF was dropped: it is damaged")
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
    name, resolution = "dpi", info.get("dpi", in_exif)
    if image.format == "TIFF" and TiffImagePlugin.X_RESOLUTION not in _tags(image):
        resolution = None
    elif image.format == "TIFF" and resolution is None:
        # Without a unit, only the ratio of the two means something.
        name, resolution = "aspect", info.get("resolution")
    if (pair := _positive(resolution)) is not None:
        carried[name] = pair
    if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        carried["duration"] = float(info.get("duration", 0))
    if isinstance(image, PngImagePlugin.PngImageFile):
        carried["png"] = _png_chunks(image)
    return orientation, {key: value for key, value in carried.items() if value or value == 0}


def _pop_resolution(exif: Image.Exif) -> tuple[float, float] | None:
    """Takes the resolution out of EXIF, so that it is said once; None if it isn't known in dpi."""
    across = exif.pop(ExifTags.Base.XResolution, None)
    down = exif.pop(ExifTags.Base.YResolution, None)
    unit = exif.pop(ExifTags.Base.ResolutionUnit, 2)
    pair, per_inch = _positive((across, down)), {2: 1, 3: 2.54}.get(unit)
    if pair is None or per_inch is None:
        return None
    return per_inch * pair[0], per_inch * pair[1]


def _positive(resolution: Any) -> tuple[float, float] | None:
    """Two numbers that can be a resolution; None for anything else that a file may say."""
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        across, down = map(float, resolution)
        if 0 < across < 1e6 and 0 < down < 1e6:
            return across, down
    return None


def _exif_copy(image: Image.Image, notes: list[str]) -> Image.Exif:
    """An image's EXIF, to be changed without changing the image."""
    copy = Image.Exif()
    if getattr(_tags(image), "_bigtiff", False):
        # Pillow takes it for an ordinary TIFF, and reads nonsense.
        tags = _tags(image)
        copy.update({tag: tags[tag] for tag in set(tags) - set(SUB_IFDS)})
        if set(SUB_IFDS) & set(tags):
            notes.append("camera settings in EXIF were dropped: the file is a BigTIFF")
        return copy
    copy.load(image.getexif().tobytes())
    return copy


def _exif_bytes(exif: Image.Exif, *, turned: bool) -> bytes:
    """EXIF without orientation and without what describes how pixels are stored."""
    for tag in STRUCTURAL_TAGS & set(exif):
        del exif[tag]
    details = exif.get_ifd(ExifTags.IFD.Exif)
    sides = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
    if turned and set(sides) <= set(details):
        details[sides[0]], details[sides[1]] = details[sides[1]], details[sides[0]]
    return exif.tobytes() if len(exif) else b""


def _png_chunks(image: PngImagePlugin.PngImageFile) -> tuple[tuple[bytes, bytes], ...]:
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
    if not getattr(image, "is_animated", False):
        texts = PngImagePlugin.PngInfo()
        for key, text in image.text.items():
            if key not in ("XML:com.adobe.xmp", "Raw profile type exif"):
                texts.add_text(key, text)
        chunks += [(kind, data) for kind, data, _ in texts.chunks]
    return tuple(chunks)


def read_carried_by_file(image: ImageFile.ImageFile, *, animated: bool) -> dict[str, Any]:
    """What belongs to a picture file as a whole, before its pixels are loaded; see `Picture`."""
    carried = {}
    if animated and image.format in ("GIF", "PNG", "WEBP"):
        loop = image.info.get("loop")
        if image.format == "GIF":
            # GIF counts how often the animation is repeated.
            carried["loop"] = 1 if loop is None else loop and loop + 1
        else:
            carried["loop"] = int(loop or 0)
    if image.format == "WEBP":
        carried["lossless"] = _is_lossless_webp(image.fp)
    if isinstance(image, JpegImageFile):  # MPO too.
        sampling = get_sampling(image)
        carried["jpeg"] = {
            "qtables": list(image.quantization.values()),
            "subsampling": "4:4:4" if sampling < 0 else sampling,
        }
    return carried


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
