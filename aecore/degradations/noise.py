"""Noise: a random change of each value on its own."""

import dataclasses
from typing import ClassVar

import numpy as np

from aecore.degradations.base import (
    Degradation,
    Range,
    check_range,
    check_share,
    clip,
    draw,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Adds independent Gaussian noise to each value, then clips to [0, 1]."""

    sigma: Range = 0.4
    """Standard deviation of the noise on the [0, 1] scale, 0 or more; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        check_range("GaussianNoise", "sigma", self.sigma, lambda s: 0 <= s < np.inf, "sigma >= 0")

    def apply(self, images, ops):
        return clip(images + draw(self.sigma, images, ops) * ops.normal(images), ops)


@register
@dataclasses.dataclass(frozen=True)
class ShotNoise(Degradation):
    """The noise of counting photons: each value becomes a Poisson count, scaled back to [0, 1]."""

    peak: Range = 30.0
    """Photons on average where the image is 1; fewer are noisier. Above 0, at most 1e6; two
    numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        check_range("ShotNoise", "peak", self.peak, lambda p: 0 < p <= 1e6, "0 < peak <= 1e6")

    def apply(self, images, ops):
        peak = draw(self.peak, images, ops)
        return clip(ops.poisson(images * peak) / peak, ops)


@register
@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Degradation):
    """Sets random values to 0 or to 1, with equal probability."""

    amount: Range = 0.1
    """Probability that a value is replaced, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        check_share("SaltAndPepper", "amount", self.amount)

    def apply(self, images, ops):
        amount = draw(self.amount, images, ops)
        drawn = ops.uniform_values(images)
        peppered = ops.xp.where(drawn < amount / 2, 0.0, images)
        return ops.xp.where(drawn >= 1 - amount / 2, 1.0, peppered)
