"""Photographs blurred, resized, made noisy and compressed in an order that each of them draws.

    python experiments/photo_bsrgan.py --data.data-dir PHOTOS

The degradations are those of BSRGAN (Zhang et al., "Designing a Practical Degradation Model for
Deep Blind Image Super-Resolution", 2021) at full size: each resizing is undone at once. The
camera's noise comes after the shuffled ones, as more than four can't be shuffled. It has not been
trained yet.
"""

from aecore.cli import main
from aecore import Data, Experiment, Optimizer, Training
from aecore.degradations import (
    JPEG,
    Blur,
    CameraNoise,
    Compose,
    GaussianNoise,
    Resize,
    Shuffled,
    Sometimes,
)
from aecore.models import UNet

ISOTROPIC = Blur((0.1, 2.4), radius=(3, 10))
ANISOTROPIC = Blur((0.5, 6.0), (0.5, 6.0), angle=(0.0, 180.0), radius=(3, 10))
RESIZE = Resize((0.5, 1.5), ("area", "bilinear", "bicubic"))
NOISE = GaussianNoise((1 / 255, 25 / 255), gray=0.4)
CAMERA = CameraNoise((0.0, 0.01), (0.0, 0.02))
COMPRESSION = JPEG((30, 95))

DEGRADATION = Compose(
    (
        Shuffled((Compose((ISOTROPIC, RESIZE)), ANISOTROPIC, NOISE, Sometimes(0.75, COMPRESSION))),
        Sometimes(0.25, CAMERA),
        COMPRESSION,
    )
)

experiment = Experiment(
    name="photo_bsrgan",
    model=UNet(features=(32, 64, 96), channels=3, patch=2),
    degradation=DEGRADATION,
    data=Data(dataset="folder", crop=96, turn=True, channels=3),
    optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema=0.999),
    training=Training(batch_size=16, epochs=8, degrade_on="device"),
)

if __name__ == "__main__":
    main(experiment)
