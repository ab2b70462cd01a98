"""How far a result is from explaining the image that it was made of.

The result is degraded as the network was trained to undo, and compared with what came in. That
shows details that contradict the image. It can't show those that the degradation removes anyway: of
two results that become the same when they are degraded, neither is more consistent.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from aecore.degradations import (
    JPEG,
    CameraNoise,
    Degradation,
    GaussianNoise,
    Mask,
    ShotNoise,
)
from aecore.errors import ConfigError, ImageError
from aecore.restoring.projection import known_pixels, unwrapped

_BLOCK = 8
"""Side of the blocks in which removed noise is averaged."""

_DRAWS = 8
"""Degradations whose mean stands for the expected one; clipping makes it differ from the result."""

_LOOKED_AT = 128
"""Pixels on a side of the part by which JPEG's quality is found."""

_BRIGHTER = 8
"""How many times brighter the picture shows differences."""


@dataclasses.dataclass(frozen=True, eq=False)
class Consistency:
    """How far a result, degraded, is from what came in."""

    distance: float
    """0 if nothing contradicts; a root mean square on the scale on which images lie in [0, 1]."""
    difference: np.ndarray
    """`(N, H, W, C)` float32, what came in minus what was expected. Its root mean square is
    `distance`, but for noise."""
    meaning: str
    """What was compared, in a sentence."""

    @property
    def picture(self) -> np.ndarray:
        """`(N, H, W, C)` uint8: black where the result agrees, brighter where it doesn't."""
        return np.rint(np.clip(np.abs(self.difference) * _BRIGHTER, 0, 1) * 255).astype(np.uint8)


def measure(degradation: Degradation, restored: np.ndarray, image: np.ndarray) -> Consistency:
    """Compares `(N, H, W, C)` float32 pictures; they lie in [0, 1], but for unclipped noise.

    Args:
      degradation: what the network was trained to undo.
      restored: results.
      image: what they were made of.

    Raises:
      ConfigError: it isn't known what exactly degraded the image.
      ImageError: the sizes don't fit.
    """
    degradation = unwrapped(degradation)
    factor = degradation.reduction
    count, height, width, channels = image.shape
    if restored.shape != (count, factor * height, factor * width, channels):
        raise ImageError(
            f"a result of shape {restored.shape} can't have come from {image.shape}, which is to "
            f"be {factor} times as large; pass the result first, then the image that came in"
        )
    match degradation:
        case Mask(value=float(value) | int(value)):
            known = np.stack([known_pixels(each, value) for each in image])
            return _exact(np.where(known, restored, image), image, "the pixels that aren't blanked")
        case GaussianNoise() | CameraNoise() | ShotNoise():
            return _noise(degradation, restored, image)
        case JPEG() if degradation.is_random:
            pairs = list(zip(restored[:, None], image[:, None], strict=True))
            found = [_likeliest(degradation, *pair) for pair in pairs]
            expected = [one(after) for one, (after, _) in zip(found, pairs, strict=True)]
            names = " or ".join(dict.fromkeys(map(str, found)))
            return _exact(np.concatenate(expected), image, f"the result after {names}")
    if degradation.is_random:
        raise ConfigError(
            f"{degradation} is random, so that it isn't known what it did to an image; consistency "
            "can be measured for noise, masks, JPEG, and whatever has no range"
        )
    return _exact(np.asarray(degradation(restored)), image, f"the result after {degradation}")


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def _exact(expected: np.ndarray, image: np.ndarray, what: str) -> Consistency:
    difference = (image - expected).astype(np.float32)
    meaning = f"root mean square difference between the image and {what}"
    return Consistency(_rms(difference), difference, meaning)


def _likeliest(jpeg: JPEG, restored: np.ndarray, image: np.ndarray) -> JPEG:
    """With which of its qualities one result, `(1, H, W, C)`, comes closest to the image."""
    after, before = (array[:, :_LOOKED_AT, :_LOOKED_AT] for array in (restored, image))
    return min(_choices(jpeg), key=lambda one: _rms(before - np.asarray(one(after))))


def _choices(jpeg: JPEG) -> Iterator[JPEG]:
    """Every JPEG that an image may have got."""
    low, high = jpeg.quality if isinstance(jpeg.quality, tuple) else (jpeg.quality, jpeg.quality)
    kinds = jpeg.subsampling if isinstance(jpeg.subsampling, tuple) else (jpeg.subsampling,)
    for quality, kind in itertools.product(range(int(low), int(high) + 1), kinds):
        yield JPEG(quality, kind)


def _noise(degradation: Degradation, restored: np.ndarray, image: np.ndarray) -> Consistency:
    """What was removed should be noise, which averages out over blocks; what remains is structure.

    Of white noise with a standard deviation of s, means over n values have s / sqrt(n).
    """
    pairs = zip(restored[:, None], image[:, None], strict=True)
    residual = np.concatenate(
        [before - _expected(degradation, after, before) for after, before in pairs]
    )
    sides = [min(_BLOCK, side) for side in image.shape[1:3]]
    rows, columns = (side // block for side, block in zip(image.shape[1:3], sides, strict=True))
    inside = residual[:, : rows * sides[0], : columns * sides[1]]
    blocks = inside.reshape(len(image), rows, sides[0], columns, sides[1], -1)
    means = blocks.mean(axis=(2, 4))
    structure = np.mean(means**2) - np.mean(inside**2) / (sides[0] * sides[1])
    shown = means.repeat(sides[0], axis=1).repeat(sides[1], axis=2)
    missing = [
        (0, 0),
        *((0, n - m) for n, m in zip(image.shape[1:3], shown.shape[1:3], strict=True)),
    ]
    return Consistency(
        float(np.sqrt(max(0.0, structure))),
        np.pad(shown, [*missing, (0, 0)], mode="edge").astype(np.float32),
        f"what was removed, averaged over blocks of {sides[0]}x{sides[1]} pixels, beyond what "
        "noise leaves there: detail that was lost or invented",
    )


def _expected(degradation: Degradation, restored: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The mean of what noise makes of one result, `(1, H, W, C)`."""
    if isinstance(degradation, GaussianNoise):
        # As strong as what was removed, and clipped as files are, unless it is seen not to be.
        sigma = degradation.sigma
        if isinstance(sigma, tuple):
            sigma = float(np.clip(_rms(image - restored), *sigma))
        is_clipped = bool(image.min() >= 0 and image.max() <= 1)
        degradation = dataclasses.replace(degradation, sigma=sigma, clip=is_clipped)
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    # One after another: photographs are large.
    total = np.zeros(image.shape, np.float32)
    for key in keys:
        total += np.asarray(degradation(restored, key))
    return total / _DRAWS
