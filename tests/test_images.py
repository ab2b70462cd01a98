import errno
import io
import logging
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, features

from aecore.errors import ImageError
from aecore.media import decoders, encoders, frames, images
from aecore.media.images import (
    Frame,
    Picture,
    from_pillow,
    read_picture,
    to_pillow,
    write_picture,
)

RANDOM = np.random.default_rng(0)
SIZE = (23, 31)
PATH = type(epath.Path("/"))
MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16", "LA;16", "RGB;16", "RGBA;16")
RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK_PROFILE = RGB_PROFILE[:16] + b"CMYK" + RGB_PROFILE[20:]


def noise(channels=0, dtype=np.uint8, size=SIZE):
    shape = (*size, channels) if channels else size
    return RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def random_frame(mode, size=SIZE, **carried):
    dtype = np.uint16 if "16" in mode else np.uint8
    values = noise(3 * mode.startswith("RGB"), dtype, size)
    if mode == "1":
        values = np.where(values < 128, 0, 255).astype(np.uint8)
    return Frame(values, noise(0, dtype, size) if "A" in mode else None, mode, carried)


def smooth(mode="RGB", size=SIZE):
    """A picture that JPEG changes little."""
    coarse = RANDOM.integers(64, 192, (4, 4, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    return picture.convert(mode)


def assert_same_frame(one, other):
    assert one.mode == other.mode
    for expected, found in ((one.values, other.values), (one.alpha, other.alpha)):
        assert (expected is None) == (found is None)
        if expected is not None:
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def rewrite(source, target):
    """Reads and writes unchanged; returns what was read, and what is read from the result."""
    picture = read_picture(source)
    notes = write_picture(picture, target)
    again = read_picture(target)
    assert images.read_extent(target)[0] == again.frames[0].values.shape[:2]
    return picture, again, notes


# Modes.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_every_mode_comes_back(tmp_path, mode, ending):
    frame = random_frame(mode)
    source = tmp_path / f"source{ending}"
    notes = write_picture(Picture((frame,), ""), source)
    if (mode, ending) == ("LA;16", ".tif"):
        assert notes == ("gray became RGB: TIFF holds no such gray",)
        return
    assert notes == ()
    picture, again, notes = rewrite(source, tmp_path / f"target{ending}")
    assert picture.notes == again.notes == notes == ()
    assert_same_frame(frame, picture.frames[0])
    assert_same_frame(frame, again.frames[0])
    assert picture.frames[0].values.flags.c_contiguous
    assert images.read_shape(source) == (*SIZE, 3 if mode.startswith("RGB") else 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "ending", [".jpg", ".webp", ".gif", ".bmp", ".ppm", ".tga", ".jp2", ".avif"]
)
def test_what_a_format_cannot_hold_is_told(tmp_path, mode, ending):
    frame = random_frame(mode)
    target = tmp_path / f"target{ending}"
    notes = " ".join(write_picture(Picture((frame,), ""), target))
    found = read_picture(target).frames[0]
    assert ("alpha was dropped" in notes) == (frame.alpha is not None and found.alpha is None)
    assert ("16 bits became 8" in notes) == ("16" in mode and "16" not in found.mode)
    assert ("gray became RGB" in notes) == (frame.values.ndim < found.values.ndim)
    assert ("1 bit became" in notes) == (mode == "1" and found.mode != "1")
    assert found.values.shape[:2] == SIZE


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "I;16"])
@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.every_room
def test_files_of_pillow(tmp_path, mode, ending):
    image = to_pillow(random_frame(mode))
    source, target = tmp_path / f"source{ending}", tmp_path / f"target{ending}"
    image.save(source)
    rewrite(source, target)
    with Image.open(target) as again:
        assert again.mode == mode
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))


def test_big_endian_gray(tmp_path):
    values = noise(0, np.uint16)
    source = tmp_path / "source.tif"
    tifffile.imwrite(source, values, byteorder=">")
    with Image.open(source) as image:
        assert image.mode == "I;16B"
    _, again, _ = rewrite(source, tmp_path / "target.tif")
    assert_same_frame(Frame(values, mode="I;16"), again.frames[0])


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("byteorder", "<>")
def test_deep_colour_of_tifffile(tmp_path, channels, planes, byteorder):
    pixels = noise(channels, np.uint16)
    source = tmp_path / "source.tif"
    tifffile.imwrite(
        source,
        pixels if planes == "contig" else pixels.transpose(2, 0, 1),
        photometric="rgb",
        planarconfig=planes,
        byteorder=byteorder,
        extrasamples=["unassalpha"] * (channels - 3),
        rowsperstrip=5,
    )
    target = tmp_path / "target.tif"
    _, again, _ = rewrite(source, target)
    np.testing.assert_array_equal(again.frames[0].values, pixels[..., :3])
    np.testing.assert_array_equal(tifffile.imread(target), pixels)
    assert again.frames[0].mode == ("RGB;16" if channels == 3 else "RGBA;16")


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_of_opencv(tmp_path, ending, channels):
    pixels = noise(channels, np.uint16)
    source, target = tmp_path / f"source{ending}", tmp_path / f"target{ending}"
    order = [2, 1, 0, 3][:channels]
    cv2.imwrite(str(source), pixels[..., order])
    _, again, _ = rewrite(source, target)
    np.testing.assert_array_equal(again.frames[0].values, pixels[..., :3])
    found = cv2.imread(str(target), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found[..., order], pixels)


def test_deep_gray_with_alpha_as_opencv_reads_it(tmp_path):
    frame = random_frame("LA;16")
    write_picture(Picture((frame,), ""), tmp_path / "a.png")
    found = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found[..., 0], frame.values)
    np.testing.assert_array_equal(found[..., -1], frame.alpha)


@pytest.mark.parametrize("mode", ["LA;16", "RGB;16", "RGBA;16"])
def test_interlaced_deep_png(tmp_path, mode):
    frame = random_frame(mode)
    samples = frames.interleaved(frame).astype(">u2")
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    rows = b""
    for top, left, down, right in [*starts, (1, 0, 2, 1)]:
        rows += b"".join(b"\0" + row.tobytes() for row in samples[top::down, left::right])
    color = {"LA;16": 4, "RGB;16": 2, "RGBA;16": 6}[mode]
    header = struct.pack(">IIBBBBB", *SIZE[::-1], 16, color, 0, 0, 1)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    content = b"".join(encoders.png_chunk(*chunk) for chunk in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert_same_frame(frame, read_picture(tmp_path / "a.png").frames[0])


def test_large_deep_png(tmp_path):
    # Several blocks of rows, smooth, so that both filters are chosen.
    ramp = np.arange(200 * 50, dtype=np.uint16).reshape(200, 50)
    frame = Frame(np.dstack([ramp, ramp.T.reshape(200, 50) * 5, ramp * 6]), mode="RGB;16")
    write_picture(Picture((frame,), ""), tmp_path / "a.png")
    assert_same_frame(frame, read_picture(tmp_path / "a.png").frames[0])
    assert (tmp_path / "a.png").stat().st_size < frame.values.nbytes / 2


def test_premultiplied_deep_tiff(tmp_path):
    alpha = noise(0, np.uint16)
    values = noise(3, np.uint16)
    multiplied = (values.astype(np.uint64) * alpha[..., None] // 65535).astype(np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.dstack([multiplied, alpha]),
        photometric="rgb",
        extrasamples=["assocalpha"],
    )
    frame = read_picture(tmp_path / "a.tif").frames[0]
    np.testing.assert_array_equal(frame.alpha, alpha)
    opaque = alpha > 32768
    difference = frame.values.astype(int) - values
    assert np.abs(difference[opaque]).max() <= 2


def test_deep_ppm(tmp_path):
    values = noise(3, np.uint16)
    source = tmp_path / "source.ppm"
    source.write_bytes(b"P6\n31 23\n65535\n" + values.astype(">u2").tobytes())
    _, again, _ = rewrite(source, tmp_path / "target.ppm")
    assert_same_frame(Frame(values, mode="RGB;16"), again.frames[0])
    source.write_bytes(b"P6\n31 23\n1023\n" + (values >> 6).astype(">u2").tobytes())
    assert read_picture(source).notes == ("16 bits became 8",)
    source.write_bytes(b"P5\n31 23\n65535\n" + values[..., 0].astype(">u2").tobytes())
    assert_same_frame(Frame(values[..., 0], mode="I;16"), read_picture(source).frames[0])


def palette_image(colors=200):
    image = Image.fromarray(RANDOM.integers(0, colors, SIZE, np.uint8))
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(noise(3, size=(1, colors)).tobytes())
    return image


@pytest.mark.parametrize("transparency", [None, 7, bytes(range(200))])
def test_palettes(tmp_path, transparency):
    image = palette_image()
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "source.png", **options)
    with Image.open(tmp_path / "source.png") as source:
        expected = np.asarray(source.convert("RGBA"))
    picture, again, _ = rewrite(tmp_path / "source.png", tmp_path / "target.png")
    mode = "RGB" if transparency is None else "RGBA"
    assert picture.notes == (f"a palette became {mode}",)
    with Image.open(tmp_path / "target.png") as target:
        assert target.mode == mode
        np.testing.assert_array_equal(np.asarray(target.convert("RGBA")), expected)
    assert_same_frame(picture.frames[0], again.frames[0])


@pytest.mark.parametrize("transparency", [None, 7])
def test_gif(tmp_path, transparency):
    options = {} if transparency is None else {"transparency": transparency}
    palette_image(255).save(tmp_path / "source.gif", comment=b"hello", **options)
    picture, again, notes = rewrite(tmp_path / "source.gif", tmp_path / "target.gif")
    assert picture.frames[0].mode == ("RGB" if transparency is None else "RGBA")
    assert notes == ()
    assert_same_frame(picture.frames[0], again.frames[0])
    assert again.frames[0].carried["comment"] == b"hello"


@pytest.mark.parametrize("colors", [1, 2, 3, 255, 256])
@pytest.mark.parametrize("hidden", ["none", "some", "all"])
def test_few_colours_are_exact_in_a_gif(tmp_path, colors, hidden):
    chosen = np.stack([np.arange(colors), np.arange(colors)[::-1], np.full(colors, 9)], axis=1)
    values = chosen[RANDOM.permutation(SIZE[0] * SIZE[1]) % colors].reshape(*SIZE, 3)
    values = values.astype(np.uint8)
    alpha = {"none": None, "all": np.zeros(SIZE, np.uint8)}.get(hidden)
    if hidden == "some":
        alpha = noise() & 128
        alpha[alpha > 0] = 255
        values[alpha == 0] = [1, 2, 3]
    frame = Frame(values, alpha, "RGB" if alpha is None else "RGBA")
    if hidden == "all":
        values[:] = [1, 2, 3]
    write_picture(Picture((frame,), ""), tmp_path / "a.gif")
    found = read_picture(tmp_path / "a.gif").frames[0]
    if hidden == "some" and colors == 256:
        np.testing.assert_array_equal(found.alpha, alpha)
    else:
        assert_same_frame(frame, found)


def test_many_colours_are_chosen_for_a_gif(tmp_path):
    image = smooth("RGB", (64, 64))
    frame, _ = from_pillow(image)
    write_picture(Picture((frame,), ""), tmp_path / "a.gif")
    found = read_picture(tmp_path / "a.gif").frames[0]
    assert np.abs(found.values.astype(int) - frame.values).mean() < 6


@pytest.mark.parametrize(("mode", "transparent"), [("L", 40), ("RGB", (1, 2, 3)), ("1", 1)])
def test_a_transparent_colour_becomes_alpha(tmp_path, mode, transparent):
    image = to_pillow(random_frame(mode))
    if mode != "1":
        image.paste(transparent, (3, 3, 9, 9))
    image.save(tmp_path / "source.png", transparency=transparent)
    with Image.open(tmp_path / "source.png") as source:
        expected = np.asarray(source.convert("RGBA"))
    _, again, _ = rewrite(tmp_path / "source.png", tmp_path / "target.png")
    assert again.frames[0].mode == ("RGBA" if mode == "RGB" else "LA")
    with Image.open(tmp_path / "target.png") as target:
        np.testing.assert_array_equal(np.asarray(target.convert("RGBA")), expected)
    assert (again.frames[0].alpha == 0).any()


@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_gray_of_few_bits(tmp_path, bits):
    image = Image.fromarray(noise() >> (8 - bits))
    image.save(tmp_path / "a.png", bits=bits, transparency=2)
    frame = read_picture(tmp_path / "a.png").frames[0]
    np.testing.assert_array_equal(frame.alpha == 0, frame.values == 2 * 255 // (2**bits - 1))
    assert (frame.alpha == 0).any()


@pytest.mark.parametrize("mode", ["I;16", "RGB;16"])
def test_a_transparent_colour_of_16_bits(tmp_path, mode):
    frame = random_frame(mode)
    frame.values[3:9, 4:8] = 1234
    write_picture(Picture((frame,), ""), tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    count = 1 if mode == "I;16" else 3
    transparent = encoders.png_chunk(b"tRNS", (1234).to_bytes(2, "big") * count)
    (tmp_path / "a.png").write_bytes(content[:33] + transparent + content[33:])
    _, again, _ = rewrite(tmp_path / "a.png", tmp_path / "b.png")
    found = again.frames[0]
    assert found.mode == {"I;16": "LA;16", "RGB;16": "RGBA;16"}[mode]
    np.testing.assert_array_equal(found.values, frame.values)
    same = frame.values.reshape(*SIZE, -1) == 1234
    np.testing.assert_array_equal(found.alpha, np.where(same.all(axis=2), 0, 65535))


@pytest.mark.parametrize("ending", [".jpg", ".tif"])
def test_cmyk_becomes_rgb(tmp_path, ending):
    image = smooth().convert("CMYK")
    source = tmp_path / f"source{ending}"
    image.save(source, icc_profile=CMYK_PROFILE, quality=95)
    picture, again, _ = rewrite(source, tmp_path / "target.png")
    assert picture.notes == (
        "CMYK became RGB",
        "the colour profile was dropped: it is for CMYK",
    )
    with Image.open(source) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(again.frames[0].values, expected)
    assert "icc_profile" not in again.frames[0].carried


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV"])
def test_other_colour_spaces_become_rgb(tmp_path, mode):
    image = smooth()
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    frame, notes = from_pillow(image)
    assert notes[0] == f"{mode} became RGB"
    assert frame.values.shape == (*SIZE, 3)
    if mode != "HSV":
        image.save(tmp_path / "a.tif")
        read = read_picture(tmp_path / "a.tif")
        assert read.frames[0].values.shape == (*SIZE, 3)


def test_white_may_be_zero(tmp_path):
    values = noise(0, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").frames[0].values, ~values)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_unknown_ranges_are_refused(tmp_path, mode):
    image = Image.fromarray(noise(0, np.uint8).astype(np.int32 if mode == "I" else np.float32))
    image.save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"a\.tif.*{mode} has no known range"):
        read_picture(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="no known range"):
        from_pillow(image)


def test_values_of_mode_1_are_rounded_at_half():
    frame = Frame(np.array([[0, 127, 128, 255]], np.uint8), mode="1")
    image = to_pillow(frame)
    assert image.mode == "1"
    np.testing.assert_array_equal(np.asarray(image), [[False, False, True, True]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16"])
def test_pillow_and_back(mode):
    frame = random_frame(mode)
    again, notes = from_pillow(to_pillow(frame))
    assert notes == ()
    assert_same_frame(frame, again)


def test_pillow_has_no_deep_colour():
    with pytest.raises(ImageError, match="RGB;16"):
        to_pillow(random_frame("RGB;16"))


def test_frames_that_contradict_themselves_are_refused(tmp_path):
    for frame in (
        Frame(noise(3), mode="L"),
        Frame(noise(3), noise(), "RGB"),
        Frame(noise(3), None, "RGBA"),
        Frame(noise(3, np.uint16), mode="RGB"),
        Frame(noise(3), noise(0, np.uint16), "RGBA"),
        Frame(np.zeros((0, 4), np.uint8), mode="L"),
    ):
        with pytest.raises(ImageError, match="don't make a picture"):
            write_picture(Picture((frame,), ""), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_replacing_pixels():
    frame = random_frame("RGBA;16", dpi=(72.0, 72.0))
    gray = frame.replace(frame.values[..., 0], None)
    assert (gray.mode, gray.carried) == ("I;16", frame.carried)
    bits = random_frame("1")
    assert bits.replace(bits.values, None).mode == "1"
    assert bits.replace(bits.values, bits.values).mode == "LA"
    with pytest.raises(ImageError, match="don't make"):
        frame.replace(frame.values, noise())


# What a file carries.


def exif_of_a_camera(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Artist] = "Artist"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExposureTime] = TiffImagePlugin.IFDRational(1, 250)
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight] = SIZE[::-1]
    details[ExifTags.Base.LensModel] = "Lens"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (47.0, 30.0, 12.5)
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" b="c"/></x:xmpmeta>'


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("target_ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGB", "RGB;16"])
def test_what_a_file_carries_comes_back(tmp_path, ending, target_ending, mode):
    source = tmp_path / f"source{ending}"
    if mode == "RGB":
        smooth().save(
            source,
            exif=exif_of_a_camera().tobytes(),
            icc_profile=RGB_PROFILE,
            **({} if ending in (".webp", ".tif") else {"dpi": (300, 200)}),
            **({"resolution": 300, "resolution_unit": 2} if ending == ".tif" else {}),
        )
    elif ending in (".png", ".tif"):
        carried = dict(
            exif=exif_of_a_camera().tobytes(), icc_profile=RGB_PROFILE, dpi=(300, 200), xmp=XMP
        )
        write_picture(Picture((random_frame("RGB;16", **carried),), ""), source)
    else:
        return
    target = tmp_path / f"target{target_ending}"
    picture, again, _ = rewrite(source, target)
    carried = again.frames[0].carried
    assert carried["icc_profile"] == RGB_PROFILE
    if ending != ".webp":
        expected = (300, 300) if ending == ".tif" and mode == "RGB" else (300, 200)
        assert carried["dpi"] == pytest.approx(expected, abs=0.02)
    if mode == "RGB;16":
        assert carried["xmp"] == XMP.replace(b'tiff:Orientation="6"', b"")
    with Image.open(target) as image:
        assert image.info.get("icc_profile") == RGB_PROFILE
        exif = image.getexif()
        assert ExifTags.Base.Orientation not in exif
        assert exif[ExifTags.Base.Make] == "Maker"
        assert exif[ExifTags.Base.Artist] == "Artist"
        details = exif.get_ifd(ExifTags.IFD.Exif)
        assert float(details[ExifTags.Base.ExposureTime]) == 1 / 250
        assert details[ExifTags.Base.LensModel] == "Lens"
        latitude = exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude]
        assert latitude == pytest.approx((47.0, 30.0, 12.5))
    if ending == target_ending == ".png":
        assert_same_frame(picture.frames[0], again.frames[0])


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("target_ending", [".png", ".tif"])
def test_orientations(tmp_path, ending, orientation, target_ending):
    source = tmp_path / f"source{ending}"
    options = {"lossless": True} if ending == ".webp" else {}
    smooth().save(source, exif=exif_of_a_camera(orientation).tobytes(), **options)
    upright = images.read(source)
    turned = orientation >= 5
    assert upright.size == (SIZE if turned else SIZE[::-1])
    assert images.read_extent(source)[0] == upright.size[::-1]
    target = tmp_path / f"target{target_ending}"
    picture, again, _ = rewrite(source, target)
    for found in (picture, again):
        np.testing.assert_array_equal(found.frames[0].values, np.asarray(upright))
    with Image.open(target) as image:
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))
        details = image.getexif().get_ifd(ExifTags.IFD.Exif)
        assert details[ExifTags.Base.ExifImageWidth] == upright.width
        assert details[ExifTags.Base.ExifImageHeight] == upright.height


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_orientations_of_deep_colour(tmp_path, orientation, ending):
    frame = random_frame("RGBA;16")
    source = tmp_path / f"source{ending}"
    if ending == ".tif":
        tifffile.imwrite(
            source,
            np.dstack([frame.values, frame.alpha]),
            photometric="rgb",
            extrasamples=["unassalpha"],
            extratags=[(274, 3, 1, orientation, True)],
        )
    else:
        write_picture(Picture((frame,), ""), source)
        exif = encoders.png_chunk(b"eXIf", exif_of_a_camera(orientation).tobytes()[6:])
        content = source.read_bytes()
        source.write_bytes(content[:33] + exif + content[33:])
    small = Image.fromarray((frame.values >> 8).astype(np.uint8))
    method = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]
    expected = np.asarray(small if method is None else small.transpose(method))
    picture, again, _ = rewrite(source, tmp_path / f"target{ending}")
    np.testing.assert_array_equal(picture.frames[0].values >> 8, expected)
    assert_same_frame(picture.frames[0], again.frames[0])


def test_an_orientation_in_xmp_is_applied_once(tmp_path):
    smooth().save(tmp_path / "a.jpg", xmp=XMP)
    assert images.read_extent(tmp_path / "a.jpg")[0] == SIZE[::-1]
    _, again, _ = rewrite(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert again.frames[0].values.shape[:2] == SIZE[::-1]
    assert b"tiff:Orientation" not in again.frames[0].carried["xmp"]
    assert b'b="c"' in again.frames[0].carried["xmp"]


def test_exif_after_the_pixels_of_a_png(tmp_path):
    smooth().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    exif = encoders.png_chunk(b"eXIf", exif_of_a_camera(6).tobytes()[6:])
    (tmp_path / "a.png").write_bytes(content[:-12] + exif + content[-12:])
    assert images.read_extent(tmp_path / "a.png")[0] == SIZE[::-1]
    assert read_picture(tmp_path / "a.png").frames[0].values.shape[:2] == SIZE[::-1]


def test_the_size_of_a_png_is_known_without_its_pixels(tmp_path):
    smooth().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:60])
    assert images.read_extent(tmp_path / "a.png")[0] == SIZE
    with pytest.raises(ImageError, match=r"a\.png"):
        read_picture(tmp_path / "a.png")


def test_damaged_exif_is_dropped(tmp_path):
    exif = exif_of_a_camera().tobytes()
    smooth().save(tmp_path / "a.jpg", exif=exif[:6] + b"XX" + exif[8:])
    picture, _, _ = rewrite(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert picture.notes == ("EXIF was dropped: it is damaged",)


def test_what_only_png_has(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a picture")
    info.add_itxt("Author", "Æ")
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    smooth().save(tmp_path / "a.png", pnginfo=info)
    rewrite(tmp_path / "a.png", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.text == {"Title": "a picture", "Author": "Æ"}
        assert image.info["gamma"] == 0.45455


def test_long_metadata_are_dropped_from_a_jpeg_only(tmp_path):
    frame = random_frame("RGB", xmp=b"x" * 70_000, icc_profile=RGB_PROFILE * 100)
    picture = Picture((frame,), "")
    notes = write_picture(picture, tmp_path / "a.jpg")
    assert notes == ("XMP was dropped: JPEG holds no more than 65,500 bytes of it",)
    assert read_picture(tmp_path / "a.jpg").frames[0].carried["icc_profile"] == RGB_PROFILE * 100
    assert write_picture(picture, tmp_path / "a.png") == ()
    assert len(read_picture(tmp_path / "a.png").frames[0].carried["xmp"]) == 70_000


def test_colours_under_full_transparency_are_kept(tmp_path):
    frame = Frame(noise(3), np.zeros(SIZE, np.uint8), "RGBA")
    for ending in (".png", ".webp", ".tif", ".tga"):
        write_picture(Picture((frame,), ""), tmp_path / f"a{ending}")
        assert_same_frame(frame, read_picture(tmp_path / f"a{ending}").frames[0])


@pytest.mark.parametrize("unit", [1, 2, 3])
def test_the_resolution_of_a_tiff_keeps_its_meaning(tmp_path, unit):
    resolution = {"resolution": (30, 20), "resolutionunit": unit}
    tifffile.imwrite(tmp_path / "a.tif", noise(3), photometric="rgb", **resolution)
    _, again, _ = rewrite(tmp_path / "a.tif", tmp_path / "b.tif")
    carried = again.frames[0].carried
    assert carried.get("dpi") == {1: None, 2: (30, 20), 3: (76.2, 50.8)}[unit]
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        (across, one), (down, other) = (file.pages[0].tags[tag].value for tag in (282, 283))
        assert file.pages[0].tags[296].value == (1 if unit == 1 else 2)
        assert across / one == pytest.approx(1.5 * down / other)
    picture = read_picture(tmp_path / "a.tif")
    notes = write_picture(picture, tmp_path / "b.png")
    assert notes == (("the shape of pixels was dropped: PNG can't hold it",) if unit == 1 else ())


RESOLUTION = (
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("target_ending", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_a_larger_picture_has_one_resolution(tmp_path, ending, target_ending):
    if ".avif" in (ending, target_ending) and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = exif_of_a_camera()
    exif.update(zip(RESOLUTION, (72.0, 72.0, 2), strict=True))
    smooth().save(tmp_path / f"a{ending}", exif=exif.tobytes())
    picture = read_picture(tmp_path / f"a{ending}")
    larger = picture.frames[0].restored(noise(3, size=(2 * SIZE[0], 2 * SIZE[1])))
    notes = write_picture(Picture((larger,), "", picture.carried), tmp_path / f"b{target_ending}")
    assert notes == ()
    again = read_picture(tmp_path / f"b{target_ending}").frames[0].carried
    assert again["dpi"] == pytest.approx((144, 144), abs=0.02)
    with Image.open(tmp_path / f"b{target_ending}") as image:
        tags = image.getexif()
        assert tags[ExifTags.Base.Make] == "Maker"
        stated = tuple(tags[tag] for tag in RESOLUTION if tag in tags)
        assert stated == (() if target_ending in (".png", ".jpg") else (144, 144, 2))


@pytest.mark.parametrize(("unit", "expected"), [(None, 30), (1, None), (2, 30), (3, 76.2)])
def test_a_resolution_that_only_exif_has(tmp_path, unit, expected):
    exif = Image.Exif()
    exif.update(zip(RESOLUTION[:2], (30.0, 30.0), strict=True))
    if unit is not None:
        exif[ExifTags.Base.ResolutionUnit] = unit
    smooth().save(tmp_path / "a.webp", exif=exif.tobytes())
    picture = read_picture(tmp_path / "a.webp")
    assert picture.notes == ()
    assert picture.frames[0].carried.get("dpi") == (expected and (expected, expected))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 3])
def test_bigtiff(tmp_path, dtype, channels):
    pixels = noise(channels, dtype)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        bigtiff=True,
        photometric="rgb" if channels else "minisblack",
        extratags=[(315, 2, None, "Artist", True)],
    )
    picture, again, notes = rewrite(tmp_path / "a.tif", tmp_path / "b.tif")
    assert picture.notes == notes == ()
    np.testing.assert_array_equal(again.frames[0].values, pixels)
    with Image.open(tmp_path / "b.tif") as image:
        assert image.getexif()[ExifTags.Base.Artist] == "Artist"
    assert images.read(tmp_path / "a.tif").size == SIZE[::-1]


def test_planes_of_16_bits_may_be_compressed(tmp_path):
    pixels = noise(3, np.uint16)
    options = dict(photometric="rgb", planarconfig="separate", compression="zlib")
    tifffile.imwrite(tmp_path / "a.tif", pixels.transpose(2, 0, 1), **options)
    assert_same_frame(Frame(pixels, mode="RGB;16"), read_picture(tmp_path / "a.tif").frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_a_pillow_image_comes_back_upright_with_what_it_carried(tmp_path, orientation, ending):
    source = tmp_path / f"a{ending}"
    options = {} if ending == ".webp" else {"dpi": (300, 300)}
    exif = exif_of_a_camera(orientation).tobytes()
    smooth().save(source, exif=exif, icc_profile=RGB_PROFILE, **options)
    upright = images.read(source)
    with Image.open(source) as image:
        image.load()
        before = image.getexif().get(ExifTags.Base.Orientation), dict(image.info)
        frame, notes = from_pillow(image)
        assert (image.getexif().get(ExifTags.Base.Orientation), dict(image.info)) == before
    assert notes == ()
    result = to_pillow(frame)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(upright))
    assert result.info["icc_profile"] == RGB_PROFILE
    assert result.info.get("dpi", (300, 300)) == pytest.approx((300, 300), abs=0.02)
    result.save(tmp_path / "b.png", exif=result.info["exif"])
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == RGB_PROFILE
        assert ExifTags.Base.Orientation not in image.getexif()
        assert image.getexif()[ExifTags.Base.Artist] == "Artist"


def test_a_truncated_image_that_was_opened_already(tmp_path):
    smooth().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with (
        Image.open(tmp_path / "a.png") as image,
        pytest.raises(ImageError, match=r"a\.png can't be read: .*truncated"),
    ):
        from_pillow(image)


@pytest.mark.parametrize("address", ["http://x.org/a.png", "https://x.org/a.png", "ftp://x/a.png"])
def test_addresses_are_refused(address):
    with pytest.raises(ImageError, match=f"{address}: .*download the file first"):
        read_picture(address)


# Training.


@pytest.mark.parametrize("largest", [255, 1023, 65535])
def test_training_reads_gray_pictures_as_restoring_does(tmp_path, largest):
    values = noise(0, np.uint16) & np.uint16(largest)
    samples = values.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5\n31 23\n%d\n" % largest + samples)
    read = read_picture(tmp_path / "a.pgm").frames[0].values
    expected = np.rint(read / 257) if largest > 255 else read
    image = images.read(tmp_path / "a.pgm")
    found = images.at_working_size(image, SIZE, 1, "antialiased")
    np.testing.assert_array_equal(found[..., 0], expected)
    assert images.read_shape(tmp_path / "a.pgm") == (*SIZE, 1)


# Animations and pages.


def moving(count=5, mode="RGBA", colors=40):
    """Frames with few colours, two equal ones, and, in RGBA, holes that move."""
    chosen = noise(3, size=(1, colors))[0]
    frames = []
    for index in range(count):
        values = chosen[RANDOM.integers(0, colors, SIZE)]
        if mode == "RGBA":
            alpha = np.full(SIZE, 255, np.uint8)
            alpha[index : index + 6, 3:9] = 0
            values[alpha == 0] = 0
            frames.append(Image.fromarray(np.dstack([values, alpha])))
        else:
            frames.append(Image.fromarray(values))
    return [*frames[:2], frames[1].copy(), *frames[2:]]


DURATIONS = [100, 50, 70, 200, 30, 1000]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
@pytest.mark.parametrize("target_ending", [".gif", ".png", ".webp"])
@pytest.mark.parametrize("loop", [0, 3])
def test_animations(tmp_path, mode, ending, target_ending, loop):
    frames = [from_pillow(frame)[0] for frame in moving(mode=mode)]
    frames = [
        Frame(frame.values, frame.alpha, frame.mode, {"duration": duration})
        for frame, duration in zip(frames, DURATIONS, strict=True)
    ]
    source = tmp_path / f"source{ending}"
    write_picture(Picture(tuple(frames), "", {"loop": loop}), source)
    picture, again, notes = rewrite(source, tmp_path / f"target{target_ending}")
    assert notes == ()
    for found in (picture, again):
        assert len(found.frames) == len(frames)
        assert [frame.carried["duration"] for frame in found.frames] == pytest.approx(DURATIONS)
        assert found.carried["loop"] == loop
        for one, other in zip(frames, found.frames, strict=True):
            assert_same_frame(one, other)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_animations_of_pillow(tmp_path, mode, ending):
    source, target = tmp_path / f"source{ending}", tmp_path / f"target{ending}"
    first, *rest = moving(mode=mode)
    options = {"lossless": True} if ending == ".webp" else {"disposal": 2}
    first.save(source, save_all=True, append_images=rest, duration=DURATIONS, loop=2, **options)
    rewrite(source, target)

    def shown(path):
        with Image.open(path) as image:
            for index in range(image.n_frames):
                image.seek(index)
                image.load()
                yield image.info["duration"], np.asarray(image.convert("RGBA"))
            yield image.info["loop"], np.zeros(1)

    for (one, pixels), (other, found) in zip(shown(source), shown(target), strict=True):
        assert one == other
        np.testing.assert_array_equal(found, pixels)


def test_a_gif_without_loop_is_played_once(tmp_path):
    first, *rest = moving(mode="RGB")
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=DURATIONS)
    picture, _, _ = rewrite(tmp_path / "a.gif", tmp_path / "b.gif")
    assert picture.carried["loop"] == 1
    with Image.open(tmp_path / "b.gif") as image:
        assert "loop" not in image.info


def test_a_gray_animation_stays_gray(tmp_path):
    frames = tuple(random_frame("L", duration=100) for _ in range(4))
    write_picture(Picture(frames, ""), tmp_path / "a.gif")
    _, again, _ = rewrite(tmp_path / "a.gif", tmp_path / "b.gif")
    for one, other in zip(frames, again.frames, strict=True):
        assert_same_frame(one, other)


def test_a_deep_animation_is_read_with_8_bits(tmp_path):
    frames = tuple(random_frame("RGB;16", duration=100) for _ in range(3))
    write_picture(Picture(frames, ""), tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.notes == ("16 bits became 8",)
    for one, other in zip(frames, picture.frames, strict=True):
        np.testing.assert_array_equal(other.values, one.values >> 8)


def test_the_default_image_of_an_animation_is_ignored(tmp_path):
    first, *rest = moving(mode="RGB")
    first.save(
        tmp_path / "a.png",
        save_all=True,
        append_images=rest,
        default_image=True,
        duration=DURATIONS[1:],
    )
    picture = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.frames[0].values, np.asarray(rest[0]))


def test_pages_may_differ(tmp_path):
    frames = tuple(
        random_frame(mode, (5 + index, 40 - 3 * index), dpi=(100.0 + index, 50.0))
        for index, mode in enumerate(mode for mode in MODES if mode != "LA;16")
    )
    write_picture(Picture(frames, ""), tmp_path / "a.tif")
    _, again, notes = rewrite(tmp_path / "a.tif", tmp_path / "b.tif")
    assert notes == ()
    for one, other in zip(frames, again.frames, strict=True):
        assert_same_frame(one, other)
        assert other.carried["dpi"] == one.carried["dpi"]
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        for page, frame in zip(file.pages, frames, strict=True):
            found = page.asarray()
            found = np.where(found, 255, 0) if frame.mode == "1" else found
            np.testing.assert_array_equal(
                found.reshape(*frame.values.shape[:2], -1)[..., : frame.values.shape[-1]]
                if frame.values.ndim == 3
                else found.reshape(*frame.values.shape, -1)[..., 0],
                frame.values,
            )
    with pytest.raises(ImageError, match=r"a\.gif: .*differ in size"):
        write_picture(again, tmp_path / "a.gif")


def test_pages_of_pillow_compressed_in_many_ways(tmp_path):
    source = tmp_path / "a.tif"
    pages = [smooth(mode, (30 + index, 20)) for index, mode in enumerate(["RGB", "L", "RGBA"])]
    for compression in ("raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_ccitt"):
        if compression == "tiff_ccitt":
            pages, compression = [smooth("1"), smooth("1")], "group4"
        pages[0].save(source, save_all=True, append_images=pages[1:], compression=compression)
        picture, again, notes = rewrite(source, tmp_path / "b.tif")
        assert picture.notes == notes == ()
        for page, one, other in zip(pages, picture.frames, again.frames, strict=True):
            assert_same_frame(from_pillow(page)[0], one)
            assert_same_frame(one, other)


def test_animations_in_formats_without(tmp_path):
    frames = tuple(random_frame("RGB", duration=100) for _ in range(3))
    for ending in (".jpg", ".bmp", ".ppm"):
        with pytest.raises(
            ImageError, match=rf"a\{ending}: the picture has 3 frames, .* holds one"
        ):
            write_picture(Picture(frames, ""), tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())
    assert write_picture(Picture(frames, ""), tmp_path / "a.tif") == (
        "durations were dropped: TIFF can't hold it",
    )


def test_the_first_of_several_pictures_of_a_jpeg(tmp_path):
    smooth().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[smooth()])
    picture = read_picture(tmp_path / "a.jpg")
    assert (picture.format, len(picture.frames)) == ("JPEG", 1)
    assert picture.notes == ("only the first picture of the file was read",)


# Compression.


def test_jpeg_loses_little(tmp_path):
    smooth(size=(60, 60)).save(tmp_path / "a.png")
    picture, again, notes = rewrite(tmp_path / "a.png", tmp_path / "b.jpg")
    assert notes == ()
    difference = again.frames[0].values.astype(int) - picture.frames[0].values
    assert np.abs(difference).max() <= 8
    with Image.open(tmp_path / "b.jpg") as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 99])
def test_a_jpeg_stays_as_small_as_it_was(tmp_path, mode, subsampling, quality):
    options = dict(quality=quality, subsampling=subsampling)
    smooth(mode, size=(64, 80)).save(tmp_path / "a.jpg", **options)
    picture, _, _ = rewrite(tmp_path / "a.jpg", tmp_path / "b.jpg")
    write_picture(picture, tmp_path / "c.jpg", quality=50)
    smooth().save(tmp_path / "50.jpg", quality=50)

    def compression(name):
        with Image.open(tmp_path / f"{name}.jpg") as image:
            return image.quantization, image.layer if mode == "RGB" else None

    assert compression("b") == compression("a")
    assert compression("c")[0][0] == compression("50")[0][0]


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".avif"])
def test_a_lower_quality_makes_smaller_files(tmp_path, ending):
    picture = Picture((from_pillow(smooth(size=(90, 90)))[0],), "")
    sizes = []
    for quality in (20, 60, 99):
        write_picture(picture, tmp_path / f"a{ending}", quality=quality)
        sizes.append((tmp_path / f"a{ending}").stat().st_size)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("animated", [False, True])
def test_webp_stays_lossless_or_lossy(tmp_path, animated):
    first, second = smooth(size=(60, 60)), smooth(size=(60, 60))
    frames = dict(save_all=True, append_images=[second], duration=100) if animated else {}
    for lossless in (True, False):
        first.save(tmp_path / "a.webp", lossless=lossless, **frames)
        picture, again, _ = rewrite(tmp_path / "a.webp", tmp_path / "b.webp")
        assert picture.carried["lossless"] == again.carried["lossless"] == lossless
        same = np.array_equal(picture.frames[0].values, again.frames[0].values)
        assert same == lossless
    first.save(tmp_path / "a.png")
    _, again, _ = rewrite(tmp_path / "a.png", tmp_path / "b.webp")
    assert again.carried["lossless"]


# What can't be read or written.


@pytest.fixture
def unreadable(tmp_path):
    smooth().save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    header = bytearray(content)
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    crc = encoders.png_chunk(b"IHDR", bytes(header[16:29]))
    (tmp_path / "bomb.png").write_bytes(content[:8] + crc + content[33:])
    ifd = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    ifd[256], ifd[257], ifd[258], ifd[262], ifd[273] = 2**31, 2**31, 8, 1, 0
    (tmp_path / "bomb.tif").write_bytes(b"II*\0\x08\0\0\0" + ifd.tobytes(8))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated.png", "truncated"),
        ("empty.png", "not a picture"),
        ("text.png", "not a picture"),
        ("folder.png", "directory"),
        ("loop.png", "symbolic links"),
        ("dangling.png", "No such file"),
        ("missing.png", "No such file"),
        ("pipe.png", "pipe"),
        ("bomb.png", "more than 178,956,970 pixels"),
        ("bomb.tif", "more than 178,956,970 pixels"),
    ],
)
def test_errors_of_reading(unreadable, name, reason):
    path = unreadable / name
    with pytest.raises(ImageError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and reason in message and "\n" not in message
    assert message.count(str(path)) == 1


def test_an_animation_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    first, *rest = moving()
    for ending in (".gif", ".webp", ".png", ".tif"):
        first.save(tmp_path / f"a{ending}", save_all=True, append_images=rest)
        monkeypatch.setattr(images, "PIXEL_LIMIT", SIZE[0] * SIZE[1] * 3)
        monkeypatch.setattr(decoders, "read_frame", lambda *_: pytest.fail("decoded"))
        with pytest.raises(ImageError, match=r"a\.\w+ can't be read: its frames have more than"):
            read_picture(tmp_path / f"a{ending}")
        monkeypatch.undo()


def test_large_pictures_are_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] - 1)
    smooth().save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        images.silence_pillow()
        assert read_picture(tmp_path / "a.png").frames[0].values.shape[:2] == SIZE
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.xyz", "'.xyz'"),
        ("a", "''"),
        ("a.psd", "PSD"),
        ("a.ico", "ICO"),
        ("missing/a.png", "No such file"),
        ("folder.png", "directory"),
    ],
)
def test_errors_of_writing(tmp_path, name, reason):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError) as caught:
        write_picture(Picture((random_frame("RGB"),), ""), tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and reason in message
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("ending", sorted(images.SUFFIXES))
def test_pictures_that_are_found_in_folders_can_be_written(tmp_path, ending):
    write_picture(Picture((random_frame("L"),), ""), tmp_path / f"a{ending}")
    assert images.read_extent(tmp_path / f"a{ending}")[0] == SIZE


def test_a_picture_too_large_for_the_format(tmp_path):
    frame = Frame(np.zeros((1, 70_000), np.uint8), mode="L")
    for ending in (".jpg", ".webp"):
        with pytest.raises(ImageError, match="can't be written"):
            write_picture(Picture((frame,), ""), tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_apart(tmp_path, monkeypatch, number):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(number, os.strerror(number))

    real = PATH.open

    def limited(path, mode="r", *rest):
        file = real(path, mode, *rest)
        if mode != "wb":
            return file
        file.close()
        return Full()

    monkeypatch.setattr(PATH, "open", limited)
    with pytest.raises(OSError) as caught:
        write_picture(Picture((random_frame("RGB"),), ""), target)
    assert caught.value.errno == number and not isinstance(caught.value, ImageError)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"old"


def test_a_file_that_may_not_grow(tmp_path):
    code = (
        "import sys, numpy as np, pathlib\n"
        "from aecore.media.images import Frame, Picture, write_picture\n"
        "values = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)\n"
        "try:\n"
        "    write_picture(Picture((Frame(values),), ''), pathlib.Path(sys.argv[1]))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert result.stdout == f"{errno.EFBIG}\n"
    assert not list(tmp_path.iterdir())


def test_paths_of_etils(tmp_path):
    frame = random_frame("RGBA;16")
    write_picture(Picture((frame,), ""), epath.Path(tmp_path) / "a.tif")
    assert_same_frame(frame, read_picture(epath.Path(tmp_path) / "a.tif").frames[0])


def test_threads(tmp_path):
    for index, mode in enumerate(MODES * 4):
        write_picture(Picture((random_frame(mode),), ""), tmp_path / f"{index}.png")
    before = set(threading.enumerate())

    def again(index):
        rewrite(tmp_path / f"{index}.png", tmp_path / f"same{index}.png")
        write_picture(read_picture(tmp_path / f"{index}.png"), tmp_path / "one.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(again, range(len(MODES) * 4)))
    assert not set(threading.enumerate()) - before
    assert not list(tmp_path.glob(".*"))


# Damaged files.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Small files of every format, by name."""
    folder = tmp_path_factory.mktemp("whole")
    first, *rest = moving(3)
    exif = exif_of_a_camera(6).tobytes()
    smooth().save(folder / "a.jpg", exif=exif, icc_profile=RGB_PROFILE[:200], xmp=XMP, dpi=(9, 9))
    smooth().save(folder / "a.png", exif=exif, icc_profile=RGB_PROFILE[:200], dpi=(9, 9))
    palette_image().save(folder / "p.png", transparency=bytes(100))
    smooth().save(folder / "a.webp", exif=exif, lossless=True)
    smooth().save(folder / "b.webp", exif=exif)
    smooth().save(folder / "a.tif", exif=exif, dpi=(9, 9))
    smooth("CMYK").save(folder / "cmyk.tif", compression="tiff_lzw")
    smooth("1").save(folder / "1.tif", compression="group4")
    for ending in ("bmp", "ppm", "tga", "jp2", "avif", "ico", "pcx", "sgi", "icns", "dds"):
        smooth().save(folder / f"a.{ending}")
    for ending in ("gif", "png", "webp", "tif"):
        first.save(folder / f"animated.{ending}", save_all=True, append_images=rest, duration=90)
    for mode in ("LA;16", "RGB;16", "RGBA;16", "I;16"):
        for ending in ("png", "tif"):
            frame = random_frame(mode, dpi=(9.0, 9.0), exif=exif)
            write_picture(Picture((frame,), ""), folder / f"{mode}.{ending}".replace(";", "-"))
    tifffile.imwrite(folder / "big.tif", noise(3, np.uint16), byteorder=">", photometric="rgb")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(content, random):
    content = bytearray(content)
    for _ in range(int(random.integers(1, 6))):
        if not content:
            break
        place = int(random.integers(len(content)))
        match int(random.integers(5)):
            case 0:
                content[place] = int(random.integers(256))
            case 1:
                content[place] ^= 1 << int(random.integers(8))
            case 2:
                del content[place : place + int(random.integers(1, 20))]
            case 3:
                content[place:place] = random.bytes(int(random.integers(1, 20)))
            case 4:
                # Headers are where most can go wrong.
                place = int(random.integers(min(len(content), 64)))
                content[place] = int(random.choice([0, 1, 127, 128, 255]))
    if random.random() < 0.2:
        del content[int(random.integers(len(content) + 1)) :]
    return bytes(content)


@pytest.fixture
def quiet(capfd, caplog):
    """Fails a test in which something is printed, or a warning gets past the filter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        level = logging.getLogger("PIL").level
        images.silence_pillow()
        yield
        logging.getLogger("PIL").setLevel(level)
    assert not [str(warning.message) for warning in caught]
    output, errors = capfd.readouterr()
    # libtiff says on stderr what is damaged, which Pillow can't prevent.
    assert not output
    assert "Traceback" not in errors and "Warning" not in errors


def try_to_read(path):
    for read in (read_picture, images.read_shape, images.read):
        try:
            found = read(path)
        except ImageError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            found = None
        if isinstance(found, Picture):
            target = path.with_name("target.tif")
            try:
                write_picture(found, target)
            except ImageError:
                assert not target.exists()
            target.unlink(missing_ok=True)


def test_damaged_files(whole, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    monkeypatch.setattr(images, "PIXEL_LIMIT", 10**7)
    random = np.random.default_rng(0)
    for name, content in whole.items():
        path = tmp_path / name
        for _ in range(60):
            path.write_bytes(mutated(content, random))
            try_to_read(path)
        path.unlink()
    assert not list(tmp_path.iterdir())


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    head=st.sampled_from(
        [
            *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF89a", b"BM", b"P6\n"),
            *(b"P5 9 9 65535\n", b"RIFF\x20\0\0\0WEBPVP8L", b"", b"8BPS", b"\0\0\x01\0"),
        ]
    ),
    tail=st.binary(max_size=200),
)
def test_made_up_files(head, tail, tmp_path, quiet):
    path = tmp_path / "a.png"
    path.write_bytes(head + tail)
    try_to_read(path)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ending=st.sampled_from([".png", ".tif", ".webp", ".gif", ".ppm", ".bmp", ".tga"]),
    count=st.integers(1, 3),
)
def test_every_size_comes_back(mode, size, ending, count, tmp_path):
    if ending in (".ppm", ".bmp", ".tga"):
        count = 1
    frames = tuple(random_frame(mode, size, duration=10.0) for _ in range(count))
    path = tmp_path / f"a{ending}"
    notes = write_picture(Picture(frames, ""), path)
    found = read_picture(path).frames
    assert len(found) == count
    if not notes and not (count > 1 and "16" in mode) and ending != ".gif":
        for one, other in zip(frames, found, strict=True):
            assert_same_frame(one, other)
