"""Noise: a random change of each value on its own."""

import dataclasses
from typing import ClassVar

from aecore.degradations.base import (
    Degradation,
    Range,
    clip,
    on_scale_of_values,
    probability,
    real,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Adds independent Gaussian noise to each value."""

    sigma: Range = on_scale_of_values(0.4)
    """Standard deviation of the noise on the [0, 1] scale, at most 1; two numbers: a range."""
    clip: bool = True
    """Whether the result is clipped to [0, 1]. Benchmarks of denoising mostly don't. Degradations
    that come after may clip it."""
    gray: float = probability(0.0)
    """Probability that an image's noise is the same in all channels, in [0, 1]."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        noise = ops.normal(f"{self.label}.noise", images)
        if self.gray:
            is_gray = ops.uniform(f"{self.label}.is gray", images, 0.0, 1.0) < self.gray
            gray_noise = ops.normal(f"{self.label}.gray noise", images[..., :1])
            noise = ops.xp.where(is_gray, gray_noise, noise)
        noisy = images + self.draw("sigma", images, ops) * noise
        return clip(noisy, ops) if self.clip else noisy


@register
@dataclasses.dataclass(frozen=True)
class CameraNoise(Degradation):
    """The noise of a camera's sensor, which grows with brightness, then clips to [0, 1].

    Gaussian noise of variance `shot * value + read**2`: the Gaussian approximation of a Poisson
    count of photons with Gaussian noise of the electronics (Foi et al., "Practical
    Poissonian-Gaussian noise modeling and fitting for single-image raw-data", 2008).
    """

    shot: Range = on_scale_of_values(0.01)
    """Variance from counting photons where the image is 1, from 0 to 1; two numbers: a range."""
    read: Range = on_scale_of_values(0.01)
    """Standard deviation from reading the sensor, from 0 to 1; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        shot, read = self.draw("shot", images, ops), self.draw("read", images, ops)
        sigma = ops.xp.sqrt(shot * ops.xp.maximum(images, 0.0) + read * read)
        return clip(images + sigma * ops.normal(f"{self.label}.noise", images), ops)


@register
@dataclasses.dataclass(frozen=True)
class ShotNoise(Degradation):
    """The noise of counting photons: each value becomes a Poisson count, scaled back to [0, 1].

    The standard deviation of JAX's counts is right to 0.5 % up to a peak of 2e5, beyond to 3 %.
    """

    peak: Range = real(30.0, above=0, at_most=1e6)
    """Photons on average where the image is 1; fewer are noisier. Above 0, at most 1e6; two
    numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        peak = self.draw("peak", images, ops)
        return clip(
            ops.poisson(f"{self.label}.counts", ops.xp.maximum(images, 0.0) * peak) / peak, ops
        )


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
