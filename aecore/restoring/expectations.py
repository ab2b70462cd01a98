"""Says how a picture differs from the images that a network was trained on.

Only the middle of a picture is looked at, so that this costs little beside restoring it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from aecore.saved.descriptions import Description

_LARGER, _SMALLER = 4.0, 0.5
"""How many times the sides of the training images a picture's may be, before this is said."""

_NOISE_FACTOR, _NOISE_MARGIN = 1.5, 0.01
"""How far noise may lie beyond the range of the training images: times this, and this besides."""

_BLOCKINESS_FACTOR = 1.25
"""The same for blockiness."""

_BLOCKINESS_OF_NOISE = 1.1
"""The most that images with noise have, where a description doesn't say. Of 68 photographs with
noise, with σ from 0.02 to 0.2, none had more than 1.09; saved as JPEG of quality 50, 97 % had
more than 1.38."""

_MOST_UNPIXELATED = 0.013
"""The most by which pixelated images differ from blocks, in root mean square. Of 68 pixelated
photographs saved as JPEG of quality 85, none differed by more; as they were before they were
pixelated, all did."""

_NOISES = ("CameraNoise", "GaussianNoise", "ShotNoise")
"""Degradations that change each channel's values on their own. Not a set, in which a damaged
description's list or dictionary can't be looked for."""

_LOOKED_AT = 256
"""Pixels on a side of the middle of a picture that is looked at."""

_LEAST_FOR_BLOCKS = 32
"""Pixels on a side without which blocks of 8 can't be told from chance."""


def describe(degraded: np.ndarray) -> dict[str, Any]:
    """What a network's inputs are like: the range of each measure, as JSON values.

    Args:
      degraded: `(N, H, W, C)` float in [0, 1].
    """
    measures: dict[str, Callable[[np.ndarray], float]] = {"noise": estimate_noise}
    if min(degraded.shape[1:3]) >= _LEAST_FOR_BLOCKS:
        measures["blockiness"] = blockiness
    return {
        name: np.percentile([measure(middle(image)) for image in degraded], (1, 99)).tolist()
        for name, measure in measures.items()
    }


def differences(description: Description, image: np.ndarray, *, scale: int = 1) -> tuple[str, ...]:
    """What is unusual about an image, for a network with this description.

    Args:
      description: of the network; what it lacks is not looked at.
      image: `(H, W)` or `(H, W, C)`, uint8, uint16, or float in [0, 1].
      scale: how many times larger the network makes images.

    Returns:
      A sentence for each difference, the same for all images that differ in this way.
    """
    # Of floats that are refused afterwards, nothing is to be said here.
    with np.errstate(over="ignore", invalid="ignore"):
        return tuple(_differences(description, image, scale))


def _differences(description: Description, image: np.ndarray, enlarging: int) -> Iterator[str]:
    # Crops are small however large the pictures were.
    if description.image_size and not (description.data or {}).get("crop"):
        # The size of the originals.
        height, width = (max(1, side // enlarging) for side in description.image_size)
        ratios = image.shape[0] / height, image.shape[1] / width
        if max(ratios) > _LARGER or min(ratios) < _SMALLER:
            size = "larger" if max(ratios) > _LARGER else "smaller"
            yield f"much {size} than the {height}x{width} pixels that the network was trained on"
    if min(image.shape[:2]) < 3:
        return
    part = middle(image).astype(np.float32)
    if not np.isfinite(part).all():
        return
    if image.dtype.kind == "u":
        part /= np.iinfo(image.dtype).max
    inputs = description.inputs or {}
    if "noise" in inputs:
        low, high = inputs["noise"]
        noise = estimate_noise(part)
        least, most = low / _NOISE_FACTOR - _NOISE_MARGIN, high * _NOISE_FACTOR + _NOISE_MARGIN
        if not least <= noise <= most:
            which = "more" if noise > high else "less"
            yield (
                f"{which} noise or fine detail than the network was trained on (a standard "
                f"deviation of {low:.2f} to {high:.2f}, where white is 1)"
            )
    degradation = description.degradation or {}
    most_blocky = None
    if "blockiness" in inputs:
        most_blocky = inputs["blockiness"][1]
    elif degradation.get("type") == "GaussianNoise":
        most_blocky = _BLOCKINESS_OF_NOISE
    if (
        most_blocky is not None
        and min(part.shape[:2]) >= _LEAST_FOR_BLOCKS
        and blockiness(part) > most_blocky * _BLOCKINESS_FACTOR
    ):
        yield "blocks of 8x8 pixels, as of JPEG, which the network was not trained to remove"
    if degradation.get("type") == "Pixelate" and isinstance(degradation.get("scale"), (int, float)):
        scale = degradation["scale"]
        if unpixelated(part, image.shape[:2], scale) > _MOST_UNPIXELATED:
            yield f"not pixelated to {scale:.0%} of its size, as the network's training images were"


def of_gray(description: Description) -> str:
    """What to expect of a network for colour, with this description, when a picture is gray."""
    note = "gray pictures are restored as if in colour: the network is for colour"
    noises = list(_noises(description.degradation))
    if not noises or any(noise.get("gray") for noise in noises):
        return note
    return f"{note}, and may remove little of the noise of gray ones; photo-denoise-gray removes it"


def _noises(degradation: Any) -> Iterator[Mapping[str, Any]]:
    """What a degradation, as JSON values, has of noise, in its parts too."""
    if isinstance(degradation, Mapping):
        if degradation.get("type") in _NOISES:
            yield degradation
        degradation = list(degradation.values())
    if isinstance(degradation, (list, tuple)):
        for part in degradation:
            yield from _noises(part)


def middle(image: np.ndarray) -> np.ndarray:
    """The part of an image that is looked at."""
    top, left = (max(0, (side - _LOOKED_AT) // 2) for side in image.shape[:2])
    return image[top : top + _LOOKED_AT, left : left + _LOOKED_AT]


def estimate_noise(image: np.ndarray) -> float:
    """The standard deviation of the noise in an image of at least 3×3 pixels.

    From the mean absolute response to a mask that structure of constant gradient doesn't excite
    (Immerkær, "Fast Noise Variance Estimation", 1996).

    Args:
      image: `(H, W)` or `(H, W, C)` floats.
    """
    by_rows = image[:-2] - 2 * image[1:-1] + image[2:]
    response = by_rows[:, :-2] - 2 * by_rows[:, 1:-1] + by_rows[:, 2:]
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(response).mean())


def blockiness(image: np.ndarray) -> float:
    """How much an image jumps every 8 pixels, as after JPEG compression; about 1 if it doesn't.

    Jumps are third differences between neighbours, in absolute value. Their mean at one of the 8
    places within a block, where it is largest, is divided by their median over the places.

    Args:
      image: `(H, W)` or `(H, W, C)` floats, of at least 32×32 pixels.
    """
    ratios, gray = [], _gray(image)
    for lines in (gray, gray.T):
        jumps = np.abs(np.diff(lines, 3)).mean(axis=0)
        by_place = [jumps[place::8].mean() for place in range(8)]
        # So small that rounding to 8 bits makes it, the median says nothing.
        ratios.append(max(by_place) / max(float(np.median(by_place)), 1e-3))
    return float(np.mean(ratios))


def unpixelated(part: np.ndarray, size: tuple[int, int], scale: float) -> float:
    """How far an image is from any that `Pixelate(scale)` gives, in root mean square.

    Pixelated rows and columns are combinations of a few blocks. What remains of an image when the
    best such combination is taken away is 0 for a pixelated one, but for rounding.

    Args:
      part: the middle of the image, `(H, W)` or `(H, W, C)` floats.
      size: height and width of the whole image.
      scale: what `Pixelate` kept of them.
    """
    image = _gray(part)
    rows, columns = (
        _basis(whole, shown, scale) for whole, shown in zip(size, image.shape, strict=True)
    )
    blocks = rows @ (rows.T @ image @ columns) @ columns.T
    return float(np.sqrt(np.mean((image - blocks) ** 2)))


@functools.lru_cache(maxsize=16)
def _basis(size: int, shown: int, scale: float) -> np.ndarray:
    return np.linalg.qr(_blocks(size, shown, scale))[0].astype(np.float32)


def _blocks(size: int, shown: int, scale: float) -> np.ndarray:
    """`(shown, blocks)`: how much of each middle pixel's area lies in each block.

    These are the middle rows of `degradations.enlarging(size, scale)`.
    """
    pixels = max(int(size * scale + 1e-4), 1) / size  # In blocks.
    start = ((size - shown) // 2 + np.arange(shown))[:, None] * pixels
    end = start + pixels
    block = np.arange(np.floor(start[0, 0]), np.ceil(end[-1, 0] - 1e-9))
    return np.clip(np.minimum(end, block + 1) - np.maximum(start, block), 0, None) / pixels


def _gray(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return image
    # NumPy's mean of so few numbers takes 40 times as long.
    channels = image.shape[2]
    return image @ np.full(channels, 1 / channels, image.dtype)
