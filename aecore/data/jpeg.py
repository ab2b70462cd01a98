"""JPEG pictures and parts of them, bit for bit as Pillow decodes them, but several times faster.

TensorFlow and Pillow decode with the same library, libjpeg-turbo. Told to, TensorFlow decodes a
part of a picture without transforming the rest, and hands the pixels over without a copy.
"""

import functools
import re
from typing import Any

import numpy as np

from aecore.data.tensorflow import import_tensorflow
from aecore.errors import DataError

_MARGIN = 16
"""Pixels around a part, without which its edges would lack the neighbours that colour is
interpolated from."""

# The entry of EXIF that says how a picture lies, in either order of bytes.
_ORIENTATION = re.compile(rb"\x01\x12\0\x03\0\0\0\x01(..)|\x12\x01\x03\0\x01\0\0\0(..)", re.DOTALL)


def decode(
    content: bytes, channels: int, window: tuple[int, int, int, int] | None = None
) -> np.ndarray | None:
    """Decodes a file's content, if Pillow would give the same.

    Args:
      content: the file.
      channels: 1 or 3.
      window: top, left, height and width of the part to decode, which must lie within the picture;
        None: all of it.

    Returns:
      `(H, W, C)` uint8; None if it is no JPEG of so many channels, it is to be turned, it is
      damaged, or TensorFlow is missing.
    """
    if not (
        content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9") and _is_upright(content)
    ):
        return None
    if (tf := _tensorflow()) is None:
        return None
    options = dict(channels=channels, dct_method="INTEGER_ACCURATE", fancy_upscaling=True)
    try:
        height, width, stored = tf.io.extract_jpeg_shape(content).numpy().tolist()
        if stored != channels:
            return None
        if window is None:
            return tf.io.decode_jpeg(content, **options).numpy()
        top, left = (max(0, first - _MARGIN) for first in window[:2])
        bottom = min(height, window[0] + window[2] + _MARGIN)
        right = min(width, window[1] + window[3] + _MARGIN)
        box = [top, left, bottom - top, right - left]
        part = tf.image.decode_and_crop_jpeg(content, box, **options).numpy()
    except tf.errors.OpError:
        return None
    top, left = window[0] - top, window[1] - left
    return part[top : top + window[2], left : left + window[3]]


@functools.cache
def _tensorflow() -> Any:
    """TensorFlow, or None where it is missing: what it does here, Pillow can do."""
    try:
        return import_tensorflow()
    except DataError:
        return None


def _is_upright(content: bytes) -> bool:
    """Whether a file says that its picture lies as it is stored, or has nothing to say so with."""
    header = content[: content.rfind(b"\xff\xda", 0, 1 << 18)]
    if b"tiff:Orientation" in header:
        return False
    entries = [big or little[::-1] for big, little in _ORIENTATION.findall(header)]
    return all(entry == b"\0\x01" for entry in entries) and (bool(entries) or b"Exif" not in header)
