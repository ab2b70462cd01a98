"""JPEG compression."""

import dataclasses
from typing import Literal, get_args

import numpy as np

from aecore.degradations.base import (
    Array,
    Degradation,
    Ops,
    WholeRange,
    choice,
    clip,
    register,
    whole,
)
from aecore.degradations.separable import separable
from aecore.errors import ConfigError

# ITU-T T.81 (JPEG), Annex K: example tables for luminance and chrominance, which encoders scale.
_LUMINANCE = """
    16 11 10 16  24  40  51  61   12 12 14 19  26  58  60  55
    14 13 16 24  40  57  69  56   14 17 22 29  51  87  80  62
    18 22 37 56  68 109 103  77   24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99
"""
_CHROMINANCE = """
    17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99
    24 26 56 99 99 99 99 99   47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
"""
_TABLES = [
    np.array(table.split(), np.float32).reshape(8, 8) for table in (_LUMINANCE, _CHROMINANCE)
]

# RGB to luminance and two chrominances around 0, from JFIF (ITU-T T.871).
_TO_YCC = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ],
    np.float32,
)
_FROM_YCC = np.linalg.inv(_TO_YCC.astype(np.float64)).astype(np.float32)

# The orthonormal discrete cosine transform of 8 values.
_DCT = np.sqrt(0.25) * np.cos(np.pi / 8 * np.arange(8)[:, None] * (np.arange(8) + 0.5))
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)


Subsampling = Literal["4:2:0", "4:4:4"]


@register
@dataclasses.dataclass(frozen=True)
class JPEG(Degradation):
    """What an image loses when it is saved as JPEG, for gray and RGB images.

    Colour is kept at half the resolution, and the cosine coefficients of each 8×8 block are rounded
    to multiples of a step, as libjpeg does, except for rounding within its transforms.
    """

    quality: WholeRange = whole(50, at_least=1, at_most=100)
    """libjpeg's quality, 1 to 100; two numbers: a range, both ends included."""

    subsampling: Subsampling | tuple[Subsampling, ...] = choice(
        "4:2:0", options=get_args(Subsampling)
    )
    """4:2:0 keeps colour at half the resolution, 4:4:4 at all of it; several: each image draws."""

    @property
    def grid(self):
        # Where colour has half the resolution, its 8×8 blocks are 16×16 pixels.
        return 16 if "4:2:0" in self.subsampling else 8

    def apply(self, images, ops):
        height, width, channels = images.shape[1:]
        if channels not in (1, 3):
            raise ConfigError(f"JPEG takes 1 or 3 channels, not {channels}")
        if isinstance(self.quality, tuple):
            quality = self.draw("quality", images, ops)
            scale = ops.xp.where(quality < 50, ops.xp.floor(5000 / quality), 200 - 2 * quality)
            scale = scale[..., None, None]  # Broadcasts against blocks.
        else:
            scale = float(5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality)
        levels = ops.xp.round(clip(images, ops) * 255.0)
        if channels == 1:
            result = _through_blocks(levels - 128.0, _TABLES[0], scale, ops) + 128.0
            return clip(ops.xp.round(result) / 255.0, ops)
        ycc = ops.xp.round(ops.einsum("bhwc,kc->bhwk", levels, _TO_YCC))
        luminance = ycc[..., :1] - 128.0
        luminance = _through_blocks(luminance, _TABLES[0], scale, ops)

        def chrominances(subsampling):
            planes = ycc[..., 1:]
            if subsampling == "4:4:4":
                return _through_blocks(planes, _TABLES[1], scale, ops)
            small = separable(planes, _halving(height), _halving(width), ops)
            small = _through_blocks(ops.xp.round(small), _TABLES[1], scale, ops)
            return separable(small, _doubling(height), _doubling(width), ops)

        chrominance = self.choose("subsampling", images, ops, chrominances)
        result = 128.0 + ops.einsum("bhwc,kc->bhwk", luminance, _FROM_YCC[:, :1])
        result = result + ops.einsum("bhwc,kc->bhwk", chrominance, _FROM_YCC[:, 1:])
        return clip(ops.xp.round(result) / 255.0, ops)


def _through_blocks(planes: Array, table: np.ndarray, scale: Array, ops: Ops) -> Array:
    """Rounds the cosine coefficients of each 8×8 block, and goes back to whole levels."""
    height, width, channels = planes.shape[1:]
    # An incomplete last block repeats the last row and column, as libjpeg does.
    rows, columns = -(-height // 8), -(-width // 8)
    whole = _last_repeated(height, 8 * rows), _last_repeated(width, 8 * columns)
    planes = separable(planes, whole[0], whole[1], ops)
    blocks = ops.xp.reshape(planes, (-1, rows, 8, columns, 8, channels))
    xp = np if isinstance(scale, float) else ops.xp  # One table for all images is a constant.
    steps = xp.floor((table[:, None, :, None] * scale + 50.0) / 100.0)
    steps = xp.minimum(xp.maximum(steps, 1.0), 255.0)
    coefficients = ops.einsum("ui,vj,bricjk->brucvk", _DCT, _DCT, blocks)
    coefficients = ops.xp.round(coefficients / steps) * steps
    blocks = ops.einsum("ui,vj,brucvk->bricjk", _DCT, _DCT, coefficients)
    planes = ops.xp.reshape(blocks, (-1, 8 * rows, 8 * columns, channels))
    planes = ops.xp.round(planes[:, :height, :width])
    return ops.xp.minimum(ops.xp.maximum(planes, -128.0), 127.0)


def _last_repeated(size: int, padded: int) -> np.ndarray:
    """`(padded, size)`: the identity, its last row repeated."""
    return np.eye(size, dtype=np.float32)[np.minimum(np.arange(padded), size - 1)]


def _halving(size: int) -> np.ndarray:
    """`(size / 2 rounded up, size)`: means of pairs; an odd last one is paired with itself."""
    half = -(-size // 2)
    return _last_repeated(size, 2 * half).reshape(half, 2, size).mean(1)


def _doubling(size: int) -> np.ndarray:
    """`(size, size / 2 rounded up)`: linear interpolation between the pairs' centres."""
    half = -(-size // 2)
    near = np.arange(size) // 2
    far = np.clip(near + np.where(np.arange(size) % 2, 1, -1), 0, half - 1)
    eye = np.eye(half, dtype=np.float32)
    return 0.75 * eye[near] + 0.25 * eye[far]
