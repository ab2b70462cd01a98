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
    PlacedJaxOps,
    Range,
    WholeRange,
    choice,
    probability,
    real,
    register,
    whole,
)
from aecore.degradations.blurs import Blur, Convolution, GaussianBlur, MotionBlur, Sinc
from aecore.degradations.compose import Compose, OneOf, Shuffled, Sometimes
from aecore.degradations.jpeg import JPEG
from aecore.degradations.masks import Mask
from aecore.degradations.noise import CameraNoise, GaussianNoise, SaltAndPepper, ShotNoise
from aecore.degradations.resampling import Downscale, Pixelate, Resize, enlarging, reducing
from aecore.degradations.text import parse

__all__ = [
    "JPEG",
    "REGISTRY",
    "Array",
    "Blur",
    "CameraNoise",
    "Compose",
    "Convolution",
    "Degradation",
    "Downscale",
    "GaussianBlur",
    "GaussianNoise",
    "JaxOps",
    "Mask",
    "MotionBlur",
    "OneOf",
    "Ops",
    "Pixelate",
    "PlacedJaxOps",
    "Range",
    "Resize",
    "SaltAndPepper",
    "ShotNoise",
    "Shuffled",
    "Sinc",
    "Sometimes",
    "WholeRange",
    "choice",
    "enlarging",
    "parse",
    "probability",
    "real",
    "reducing",
    "register",
    "whole",
]
