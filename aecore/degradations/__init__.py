"""What happens to an image before it is restored.

Degradations are frozen dataclasses that map `(B, H, W, C)` float32 images in [0, 1] to degraded
ones. Each parameter is a number, or a range from which each image draws its own: a real number from
[low, high), or a whole number from low to high, both included.
"""

from aecore.degradations.base import (
    REGISTRY,
    Array,
    Degradation,
    JaxOps,
    Ops,
    Range,
    WholeRange,
    real,
    register,
    whole,
)
from aecore.degradations.blurs import GaussianBlur
from aecore.degradations.compose import Compose
from aecore.degradations.jpeg import JPEG
from aecore.degradations.masks import Mask
from aecore.degradations.noise import GaussianNoise, SaltAndPepper, ShotNoise
from aecore.degradations.resampling import Pixelate, enlarging

__all__ = [
    "JPEG",
    "REGISTRY",
    "Array",
    "Compose",
    "Degradation",
    "GaussianBlur",
    "GaussianNoise",
    "JaxOps",
    "Mask",
    "Ops",
    "Pixelate",
    "Range",
    "SaltAndPepper",
    "ShotNoise",
    "WholeRange",
    "enlarging",
    "real",
    "register",
    "whole",
]
