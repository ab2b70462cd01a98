"""Pictures as arrays, `(H, W)` gray or `(H, W, 3)` RGB, with what is needed to write them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from aecore.errors import ImageError


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """The properties of pixels that a mode stands for."""

    gray: bool
    alpha: bool
    bits: int


PIXEL_FORMATS = {
    "1": PixelFormat(gray=True, alpha=False, bits=1),
    "L": PixelFormat(gray=True, alpha=False, bits=8),
    "LA": PixelFormat(gray=True, alpha=True, bits=8),
    "RGB": PixelFormat(gray=False, alpha=False, bits=8),
    "RGBA": PixelFormat(gray=False, alpha=True, bits=8),
    "I;16": PixelFormat(gray=True, alpha=False, bits=16),
    "LA;16": PixelFormat(gray=True, alpha=True, bits=16),
    "RGB;16": PixelFormat(gray=False, alpha=False, bits=16),
    "RGBA;16": PixelFormat(gray=False, alpha=True, bits=16),
}
MODES = {kind: mode for mode, kind in PIXEL_FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture as arrays, with its mode and metadata."""

    values: np.ndarray
    """`(H, W)` gray or `(H, W, 3)` RGB, uint8, or uint16 if the mode has 16 bits."""
    alpha: np.ndarray | None = None
    """`(H, W)`, of the same dtype; None if the mode has no alpha."""
    mode: str = "RGB"
    """1, L, LA, RGB, RGBA or I;16, as Pillow calls them, or LA;16, RGB;16 or RGBA;16."""
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Metadata of this frame, as far as the file has it: icc_profile, exif (without orientation and
    resolution), xmp and comment (bytes), dpi (a pair), aspect (a pair: a resolution without unit),
    duration (ms), png (chunks of a PNG)."""

    def replace(self, values: np.ndarray, alpha: np.ndarray | None) -> "Frame":
        """The same frame with other pixels, which may be gray instead of RGB or the reverse.

        Raises:
          ImageError: the shapes or dtypes of `values` and `alpha` don't match.
        """
        kind = PIXEL_FORMATS[self.mode]
        gray = values.ndim == 2
        bits = 16 if values.dtype == np.uint16 else 8
        if kind.bits == 1 and gray and bits == 8 and alpha is None:
            bits = 1
        frame = dataclasses.replace(
            self,
            values=values,
            alpha=alpha,
            mode=MODES[PixelFormat(gray=gray, alpha=alpha is not None, bits=bits)],
        )
        check_frame(frame)
        return frame

    def restored(self, values: np.ndarray) -> "Frame":
        """The same frame with other pixels, which may be a whole number of times larger.

        Alpha is then enlarged by bicubic interpolation, and the resolution multiplied, so that the
        picture keeps its size on paper. So are height and width where EXIF says them.

        Raises:
          ImageError: as for `replace`.
        """
        scale = values.shape[0] // self.values.shape[0]
        if scale == 1:
            return self.replace(values, self.alpha)
        alpha = None if self.alpha is None else enlarged(self.alpha, scale)
        carried = dict(self.carried)
        if "dpi" in carried:
            carried["dpi"] = tuple(scale * number for number in carried["dpi"])
        if "exif" in carried:
            carried["exif"] = _exif_of_larger(carried["exif"], scale)
        return dataclasses.replace(self, carried=carried).replace(values, alpha)


def _exif_of_larger(data: bytes, scale: int) -> bytes:
    exif = Image.Exif()
    exif.load(data)
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for side in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
        # Some programs write text.
        if isinstance(details.get(side), int):
            details[side] *= scale
    return exif.tobytes()


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """`scale` times as large by bicubic interpolation.

    Args:
      pixels: `(H, W)` or `(H, W, C)` uint8, uint16, or float in [0, 1].
      scale: a whole number.
    """
    if pixels.ndim == 3:
        return np.dstack([enlarged(pixels[..., n], scale) for n in range(pixels.shape[2])])
    size = (scale * pixels.shape[1], scale * pixels.shape[0])
    # As floats, since Pillow doesn't interpolate between pixels of 16 bits.
    larger = Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    if pixels.dtype.kind == "f":
        return np.asarray(larger).clip(0, 1).astype(pixels.dtype)
    return np.rint(np.asarray(larger)).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


@dataclasses.dataclass(frozen=True)
class Picture:
    """The content of a picture file: one frame, or all of an animation, or the pages of a TIFF."""

    frames: tuple[Frame, ...]
    format: str
    """Pillow's name of the file format."""
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of an animation, loop: how often it is played, 0 for ever. Of WebP, lossless. Of JPEG, jpeg:
    qtables and subsampling, as Pillow's options."""
    notes: tuple[str, ...] = ()
    """What was changed in reading, each a few words."""


def to_pillow(frame: Frame) -> Image.Image:
    """A frame as a Pillow image of its mode, for users; mode 1 is rounded at half.

    Its `info` has the frame's icc_profile, exif, xmp and dpi, as it has after `Image.open`.

    Raises:
      ImageError: the frame has colour, or gray with alpha, of 16 bits, which Pillow does not know.
    """
    image = to_image(frame)
    for name in ("icc_profile", "exif", "xmp", "dpi"):
        if name in frame.carried:
            image.info[name] = frame.carried[name]
    return image


def to_image(frame: Frame) -> Image.Image:
    """The pixels of a frame as a Pillow image; raises as `to_pillow` does."""
    check_frame(frame)
    check_mode_of_pillow(frame.mode)
    if frame.mode == "1":
        return Image.fromarray(frame.values).point([0] * 128 + [255] * 128, "1")
    return Image.fromarray(interleaved(frame))


def check_mode_of_pillow(mode: str) -> None:
    """Refuses a mode of `PIXEL_FORMATS` that Pillow's images can't have."""
    if mode not in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
        raise ImageError(
            f"Pillow has no images of mode {mode}; restore the array "
            "aecore.media.images.read_picture(PATH).frames[0].values, or the file with the command "
            "aecore restore"
        )


def check_frame(frame: Frame) -> None:
    kind = PIXEL_FORMATS[frame.mode]
    dtype = np.uint16 if kind.bits == 16 else np.uint8
    shape = frame.values.shape[:2] + (() if kind.gray else (3,))
    if (
        frame.values.shape != shape
        or frame.values.dtype != dtype
        or frame.values.size == 0
        or (frame.alpha is not None) != kind.alpha
        or (frame.alpha is not None and frame.alpha.shape != shape[:2])
        or (frame.alpha is not None and frame.alpha.dtype != dtype)
    ):
        arrays = ", ".join(
            "none" if array is None else f"{array.dtype} {array.shape}"
            for array in (frame.values, frame.alpha)
        )
        raise ImageError(f"values and alpha ({arrays}) don't make a picture of mode {frame.mode}")


def interleaved(frame: Frame) -> np.ndarray:
    """Values and alpha in one array, `(H, W)` or `(H, W, C)`."""
    if frame.alpha is None:
        return np.ascontiguousarray(frame.values)
    return np.dstack([frame.values, frame.alpha])


def converted(frame: Frame, mode: str) -> Frame:
    """Converts a frame to another mode. RGB isn't converted to gray, which would go unnoticed."""
    old, new = PIXEL_FORMATS[frame.mode], PIXEL_FORMATS[mode]

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
