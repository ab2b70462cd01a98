"""Photographs that went through a lot: two rounds of blur, resizing, noise and JPEG.

    python experiments/photo_real_esrgan.py --data.data-dir PHOTOS

The degradations are those of Real-ESRGAN (Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", 2021) with the authors' settings, at full size: each
resizing is undone at once, and noise is added after it. It has not been trained yet.
"""

import math

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import (
    JPEG,
    Blur,
    CameraNoise,
    Compose,
    Degradation,
    GaussianNoise,
    OneOf,
    Resize,
    Shuffled,
    Sinc,
    Sometimes,
)
from aecore.models import UNet

TURN, SIZE, INTERPOLATIONS = (-180.0, 180.0), (3, 10), ("area", "bilinear", "bicubic")
JPEGS, SINC = JPEG((30, 95)), Sinc((math.pi / 3, math.pi), SIZE)
KEPT = Compose()


def blurs(sigma: tuple[float, float]) -> Degradation:
    """One of six kinds of kernel, or ringing."""
    kinds = [
        Blur(sigma, y, TURN, beta, flat, SIZE)
        for beta, flat in ((1.0, False), ((0.5, 4.0), False), ((1.0, 2.0), True))
        for y in (None, sigma)
    ]
    return OneOf((*kinds, SINC), (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1))


def resizes(low: float, high: float, weights: tuple[float, float, float]) -> Degradation:
    """Larger, smaller or as it is."""
    larger, smaller = (Resize(factor, INTERPOLATIONS) for factor in ((1.0, high), (low, 1.0)))
    return OneOf((larger, smaller, KEPT), weights)


def noises(sigma: float, poisson: float) -> Degradation:
    """Gaussian noise, up to so many of 255 levels, or as from counting photons."""
    photons = CameraNoise((0.05**2 / 256, poisson**2 / 256), 0.0)
    return OneOf((GaussianNoise((1 / 255, sigma / 255), gray=0.4), photons))


FIRST = (blurs((0.2, 3.0)), resizes(0.15, 1.5, (0.2, 0.7, 0.1)), noises(30.0, 3.0), JPEGS)
SECOND = (
    Sometimes(0.8, blurs((0.2, 1.5))),
    resizes(0.3, 1.2, (0.3, 0.4, 0.3)),
    noises(25.0, 2.5),
    Shuffled((Sometimes(0.8, SINC), JPEGS)),
)

experiment = Experiment(
    name="photo_real_esrgan",
    model=UNet(features=(32, 64, 96), channels=3, patch=2),
    degradation=Compose(FIRST + SECOND),
    data=Data(dataset="folder", crop=96, turn=True, channels=3),
    optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=16, epochs=8, degrade_on="device"),
)

if __name__ == "__main__":
    main(experiment)
