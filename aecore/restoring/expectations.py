"""How a picture differs from the images that a network was trained on."""

from typing import Any

import numpy as np

from aecore.saved.descriptions import Description

_LARGER, _SMALLER = 4.0, 0.5
"""Sides that are so many times those of the training images are worth a word."""

_TOLERANCE = 1.5
"""And so is noise that is so many times more or less than theirs."""

_LOOKED_AT = 256
"""Pixels on a side of the middle of a picture, in which noise is estimated."""


def describe(degraded: np.ndarray) -> dict[str, Any]:
    """What inputs of a network are like, as JSON values.

    Args:
      degraded: `(N, H, W, C)` float in [0, 1].
    """
    noise = [estimate_noise(image) for image in degraded]
    return {"noise": [float(np.percentile(noise, share)) for share in (1, 99)]}


def differences(description: Description, values: np.ndarray) -> tuple[str, ...]:
    """What is unusual about a picture, for a network with this description; the words are the same
    for all such pictures.

    Args:
      description: of a checkpoint; what it lacks is not looked at.
      values: `(H, W)` or `(H, W, C)`, uint8 or uint16.
    """
    found = []
    if description.image_size:
        trained = np.array(description.image_size)
        ratios = values.shape[:2] / trained
        if ratios.max() > _LARGER or ratios.min() < _SMALLER:
            size = "larger" if ratios.max() > _LARGER else "smaller"
            found.append(
                f"much {size} than the {trained[0]}x{trained[1]} pixels that the network was "
                "trained on"
            )
    noise = (description.inputs or {}).get("noise")
    if noise and min(values.shape[:2]) >= 3:
        low, high = noise
        estimated = estimate_noise(_middle(values) / np.float32(np.iinfo(values.dtype).max))
        if not low / _TOLERANCE - 0.01 <= estimated <= high * _TOLERANCE + 0.01:
            which = "more" if estimated > high else "less"
            found.append(
                f"{which} noise or fine detail than the network was trained on, where its standard "
                f"deviation was {low:.2f} to {high:.2f}"
            )
    return tuple(found)


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


def _middle(values: np.ndarray) -> np.ndarray:
    top, left = (max(0, (side - _LOOKED_AT) // 2) for side in values.shape[:2])
    return values[top : top + _LOOKED_AT, left : left + _LOOKED_AT]
