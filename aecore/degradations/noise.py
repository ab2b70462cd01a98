"""Noise: a random change of each value on its own."""

import dataclasses
from typing import ClassVar

from aecore.degradations.base import Degradation, Range, clip, real, register


@register
@dataclasses.dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Adds independent Gaussian noise to each value, then clips to [0, 1]."""

    sigma: Range = real(0.4, at_least=0)
    """Standard deviation of the noise on the [0, 1] scale, 0 or more; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        noise = ops.normal(f"{self.label}.noise", images)
        return clip(images + self.draw("sigma", images, ops) * noise, ops)


@register
@dataclasses.dataclass(frozen=True)
class ShotNoise(Degradation):
    """The noise of counting photons: each value becomes a Poisson count, scaled back to [0, 1]."""

    peak: Range = real(30.0, above=0, at_most=1e6)
    """Photons on average where the image is 1; fewer are noisier. Above 0, at most 1e6; two
    numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        peak = self.draw("peak", images, ops)
        return clip(ops.poisson(f"{self.label}.counts", images * peak) / peak, ops)


@register
@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Degradation):
    """Sets random values to 0 or to 1, with equal probability."""

    amount: Range = real(0.1, at_least=0, at_most=1)
    """Probability that a value is replaced, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        amount = self.draw("amount", images, ops)
        drawn = ops.uniform_values(f"{self.label}.values", images)
        peppered = ops.xp.where(drawn < amount / 2, 0.0, images)
        return ops.xp.where(drawn >= 1 - amount / 2, 1.0, peppered)
