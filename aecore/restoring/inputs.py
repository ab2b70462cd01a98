"""What comes in to be restored, as NumPy arrays: refused where it can't be, and as floats."""

from typing import Any

import numpy as np

from aecore.errors import ImageError
from aecore.media import images
from aecore.restoring.tensors import FLOATS, to_numpy

_ROUNDING = 1e-5
"""How far floats may lie outside [0, 1]."""


def checked(image: Any) -> np.ndarray:
    """An array; refuses what is not one image or several."""
    array = to_numpy(image)
    if array.dtype.kind in "US":
        raise ImageError(
            f"{type(image).__name__} of text is not an image; use an array of numbers, or call the "
            "restorer with one path"
        )
    if array.size == 0:
        raise ImageError(f"an array of shape {array.shape} is empty; use images with pixels")
    if array.ndim not in (2, 3, 4):
        raise ImageError(
            f"an array of shape {array.shape} is no image; use (H, W), (H, W, C), (N, H, W, C)"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ImageError(f"dtype {array.dtype} is not supported; use uint8, uint16, {FLOATS}")
    return array


def checked_one(image: Any) -> np.ndarray:
    """An array; refuses what is not one image."""
    if images.is_picture(image):
        raise ImageError(
            "a Pillow image is not an array; call the restorer with it, or use np.asarray"
        )
    array = checked(image)
    if array.ndim == 4:
        raise ImageError(f"an array of shape {array.shape} is several images; pass them one by one")
    return array


def as_batch(array: np.ndarray) -> np.ndarray:
    """One checked image or several as `(N, H, W, C)`."""
    array = array[..., None] if array.ndim == 2 else array
    return array if array.ndim == 4 else array[None]


def to_float(array: np.ndarray, in_range: bool) -> np.ndarray:
    """As float32, 1 being white; refuses floats outside [0, 1] if they must be in this range."""
    if array.dtype.kind == "u":
        return array.astype(np.float32) / np.iinfo(array.dtype).max
    lowest, highest = array.min(), array.max()
    if np.isnan(lowest):  # Where there is one, it is the minimum.
        raise ImageError("the image has values that are NaN; replace them")
    if not in_range:
        if max(-lowest, highest) > np.finfo(np.float32).max:
            raise ImageError("the image has values that are infinite in float32; replace them")
        return array.astype(np.float32)
    if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):
        raise ImageError(
            f"float images must lie in [0, 1], these in [{lowest:g}, {highest:g}]; "
            "scale or clip them, or pass uint8"
        )
    return np.clip(array, 0, 1).astype(np.float32)
