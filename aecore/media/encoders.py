"""Encodes pictures as the bytes of files, with all that belongs to them.

Pillow compresses the pixels. This module builds the files that Pillow's own writers can't: with 16
bits of colour, colours under full transparency, equal frames in an animation, or pages of different
kinds. TIFF is among them: Pillow loses EXIF when it compresses, and tifffile can't write EXIF's
sub-directories.
"""

import dataclasses
import io
import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    TiffImagePlugin,
    TiffTags,
)

from aecore.errors import ImageError
from aecore.media.frames import (
    MODES,
    PIXEL_FORMATS,
    Frame,
    Picture,
    PixelFormat,
    check_frame,
    converted,
    interleaved,
    to_image,
)


@dataclasses.dataclass(frozen=True)
class _Format:
    """What a file format can hold, as far as Pillow or this module can write it."""

    modes: frozenset[str]
    carries: frozenset[str] = frozenset()
    frames: bool = False


_EMBEDDED = frozenset({"icc_profile", "exif", "xmp"})
FORMATS = {
    "PNG": _Format(
        frozenset(PIXEL_FORMATS), _EMBEDDED | {"dpi", "duration", "comment", "png"}, True
    ),
    "TIFF": _Format(frozenset(PIXEL_FORMATS) - {"LA;16"}, _EMBEDDED | {"dpi", "aspect"}, True),
    "WEBP": _Format(frozenset({"RGB", "RGBA"}), _EMBEDDED | {"dpi", "duration"}, True),
    "GIF": _Format(frozenset({"L", "RGB", "RGBA"}), frozenset({"duration", "comment"}), True),
    "JPEG": _Format(frozenset({"L", "RGB"}), _EMBEDDED | {"dpi", "comment"}),
    "JPEG2000": _Format(frozenset({"L", "LA", "RGB", "RGBA", "I;16"})),
    "AVIF": _Format(frozenset({"RGB", "RGBA"}), _EMBEDDED | {"dpi"}),
    "BMP": _Format(frozenset({"1", "L", "RGB"}), frozenset({"dpi"})),
    "PPM": _Format(frozenset({"1", "L", "I;16", "RGB", "RGB;16"})),
    "TGA": _Format(frozenset({"1", "L", "LA", "RGB", "RGBA"})),
}
_NAMES = {
    "icc_profile": "the colour profile was",
    "exif": "EXIF was",
    "xmp": "XMP was",
    "dpi": "the resolution was",
    "aspect": "the shape of pixels was",
    "duration": "durations were",
    "comment": "the comment was",
}
# zlib's level. A higher one takes three times as long for a 16-bit photograph, and saves 3 %.
_COMPRESSION = 3

# TIFF tags that describe how the pixels are stored in one file, and so aren't copied to another:
# sizes and offsets, colour maps, JPEG tables, XMP, ICC, thumbnails.
STRUCTURAL_TAGS = frozenset(
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
SUB_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


def _fit(frame: Frame, file_format: str) -> tuple[Frame, list[str]]:
    """Converts a frame to what a file format can hold; also returns notes of what it lost."""
    modes, carries = FORMATS[file_format].modes, FORMATS[file_format].carries
    old = PIXEL_FORMATS[frame.mode]
    notes = []
    if frame.mode not in modes:
        # The first that the format holds loses least: gray that becomes RGB loses nothing.
        candidates = itertools.product(
            (True, False) if old.alpha else (False,),
            (16, 8) if old.bits == 16 else (8,),
            (True, False) if old.gray else (False,),
        )
        new = next(
            kind
            for alpha, bits, gray in candidates
            if MODES[kind := PixelFormat(gray, alpha, bits)] in modes
        )
        if old.alpha and not new.alpha:
            notes.append(f"alpha was dropped: {file_format} can't hold it")
        if old.bits == 16 and new.bits == 8:
            notes.append(f"16 bits became 8: {file_format} holds no more")
        if old.bits == 1:
            notes.append(f"1 bit became {new.bits}: {file_format} holds no less")
        if old.gray and not new.gray:
            notes.append(f"gray became RGB: {file_format} holds no such gray")
        frame = converted(frame, MODES[new])
    carried = dict(frame.carried)
    profile = carried.get("icc_profile", b"")
    space = b"GRAY" if PIXEL_FORMATS[frame.mode].gray else b"RGB "
    if old.gray != PIXEL_FORMATS[frame.mode].gray and profile[16:20] not in (space, b""):
        del carried["icc_profile"]
        notes.append("the colour profile was dropped: it is for gray")
    for name in set(carried) - carries:
        value = carried.pop(name)
        if name in _NAMES and value:
            notes.append(f"{_NAMES[name]} dropped: {file_format} can't hold it")
    return dataclasses.replace(frame, carried=carried), sorted(notes)


def _unify(frames: Sequence[Frame]) -> list[Frame]:
    """Converts the frames of an animation to one mode that can hold all of them.

    Raises:
      ImageError: they differ in size.
    """
    sizes = {frame.values.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ImageError("its pages differ in size, so they are no animation; use .tif")
    kinds = [PIXEL_FORMATS[frame.mode] for frame in frames]
    joint = PixelFormat(
        gray=all(kind.gray for kind in kinds),
        alpha=any(kind.alpha for kind in kinds),
        bits=max(kind.bits for kind in kinds),
    )
    if joint.alpha and joint.bits == 1:
        joint = dataclasses.replace(joint, bits=8)
    return [converted(frame, MODES[joint]) for frame in frames]


def encode(
    picture: Picture, file_format: str, quality: int | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a file, and what it does not hold; `quality` as for `write_picture`."""
    for frame in picture.frames:
        check_frame(frame)
    if not picture.frames:
        raise ImageError("the picture has no frames")
    if len(picture.frames) > 1 and not FORMATS[file_format].frames:
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
        lossless = quality is None and picture.carried.get("lossless", True)
        return _webp(frames, plays, lossless, quality or 95), tuple(notes)
    frame = frames[0]
    if frame.mode == "RGB;16":
        header = "P6\n{1} {0}\n65535\n".format(*frame.values.shape)
        return header.encode() + frame.values.astype(">u2").tobytes(), tuple(notes)
    compression = {"quality": quality or 95, "subsampling": "4:4:4"}
    if file_format == "JPEG" and quality is None:
        compression = picture.carried.get("jpeg", compression)
    return _with_pillow(frame, file_format, compression, notes), tuple(notes)


def _with_pillow(
    frame: Frame, file_format: str, compression: Mapping[str, Any], notes: dict[str, None]
) -> bytes:
    """Encodes one frame with Pillow; `compression` is for JPEG and AVIF."""
    options = dict(frame.carried)
    if file_format == "JPEG":
        options |= compression
        for name in ("exif", "xmp", "comment"):
            # A JPEG has them in one segment, with a length of 16 bits and a name of up to 29.
            if len(options.get(name, b"")) > 65500:
                del options[name]
                notes[f"{_NAMES[name]} dropped: JPEG holds no more than 65,500 bytes of it"] = None
        if max(options.get("dpi", (0,))) >= 65536:
            del options["dpi"]
    elif file_format == "AVIF":
        options |= compression
        options["exif"] = _with_resolution(frame.carried)
    file = io.BytesIO()
    to_image(frame).save(file, format=file_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(frames: Sequence[Frame], plays: int) -> bytes:
    """Encodes a PNG, animated if there are several frames; each frame is stored whole.

    Pillow's writer merges equal frames of an animation, and has no colour of 16 bits.
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
            # A duration is stored as a fraction of two 16-bit numbers.
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
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _png_pixels(frame: Frame) -> tuple[bytes, bytes]:
    """The header of a PNG and its compressed pixels."""
    if frame.mode in ("LA;16", "RGB;16", "RGBA;16"):
        height, width = frame.values.shape[:2]
        color = {"LA;16": 4, "RGB;16": 2, "RGBA;16": 6}[frame.mode]
        header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
        return header, _filtered(interleaved(frame))
    file = io.BytesIO()
    to_image(frame).save(file, format="PNG")
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
    """Compresses `(H, W, C)` uint16 for PNG, each row minus its left or its upper neighbours."""
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
        # As most encoders do, guess that the smaller sum of signed differences compresses better.
        weights = [np.abs(part.view(np.int8).astype(np.int16)).sum(axis=1) for part in (left, up)]
        kinds = np.where(weights[0] <= weights[1], 1, 2).astype(np.uint8)[:, None]
        block = np.concatenate([kinds, np.where(kinds == 1, left, up)], axis=1)
        parts.append(compressor.compress(block.tobytes()))
    return b"".join([*parts, compressor.flush()])


def _has_partial_alpha(frame: Frame) -> bool:
    return frame.alpha is not None and bool(((frame.alpha > 0) & (frame.alpha < 255)).any())


def _gif(frames: Sequence[Frame], plays: int) -> bytes:
    """Encodes a GIF, animated if there are several frames; each has a palette of its own."""
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
    """Converts a frame to a palette; also returns the index of the transparent colour, if any.

    Up to 256 colours stay exact, counting the transparent one.
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
        # Hidden colours take no room in the palette.
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
    palette = list(image.getpalette() or ())
    transparent = len(palette) // 3
    image.putpalette(palette + color)
    image.paste(transparent, mask=Image.fromarray(hidden))
    return image, transparent


def _webp(frames: Sequence[Frame], plays: int, lossless: bool, quality: int) -> bytes:
    """Encodes a WebP, animated if there are several frames.

    Pillow's writer of animations merges equal frames and changes hidden colours.
    """
    carried = frames[0].carried
    options = {"lossless": lossless, "quality": 80 if lossless else quality, "exact": True}
    embedded = {
        b"ICCP": carried.get("icc_profile", b""),
        b"EXIF": _with_resolution(carried).removeprefix(b"Exif\0\0"),
        b"XMP ": carried.get("xmp", b""),
    }
    bodies = []
    for frame in frames:
        file = io.BytesIO()
        to_image(frame).save(file, format="WEBP", **options)
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
    """EXIF that includes the resolution, for formats that have no other place for it."""
    if "dpi" not in carried:
        return carried.get("exif", b"")
    exif = Image.Exif()
    exif.load(carried.get("exif", b""))
    exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = carried["dpi"]
    exif[ExifTags.Base.ResolutionUnit] = 2
    return exif.tobytes()


def _tiff(frames: Sequence[Frame]) -> bytes:
    """Encodes a TIFF with a page for each frame, compressed without loss."""
    parts = [b"II*\0" + struct.pack("<I", 8)]
    place = 8
    for index, frame in enumerate(frames):
        kind = PIXEL_FORMATS[frame.mode]
        height, width = frame.values.shape[:2]
        samples = interleaved(frame).reshape(height, width, -1)
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


def _tiff_strip(samples: np.ndarray, kind: PixelFormat) -> bytes:
    """Rows `(N, W, C)` as they are compressed: bits, or pixels minus their left neighbours."""
    if kind.bits == 1:
        return np.packbits(samples[..., 0] >= 128, axis=1).tobytes()
    rows = samples.copy()
    rows[:, 1:] -= samples[:, :-1]
    return rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()


def _add_carried(ifd: Any, carried: Mapping[str, Any]) -> None:
    exif = Image.Exif()
    exif.load(carried.get("exif", b""))
    for tag in set(exif) - STRUCTURAL_TAGS:
        value = exif[tag]
        if tag in SUB_IFDS:
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
    for name, unit in (("aspect", 1), ("dpi", 2)):
        if name in carried:
            ifd[282], ifd[283] = carried[name]
            ifd[296] = unit
