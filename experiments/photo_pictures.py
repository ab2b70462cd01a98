"""Draws what the weights for photographs do, on photographs that they have not seen.

    python experiments/photo_pictures.py

It writes experiments/photo_NAME.png for each of the weights: degraded, restored and original parts
of photographs that come with scikit-image (`pip install ".[classical]" pooch` is needed for them):
Eileen Collins (NASA, public domain), Chelsea the cat (Stéfan van der Walt, CC0), a cup of coffee
(Rachel Michetti, public domain) and a rocket (SpaceX, CC0). The last column shows where it fails.
"""

from pathlib import Path

import numpy as np
import skimage.data

import aecore
from aecore.degradations import JPEG, Degradation, Downscale, GaussianNoise
from aecore.networks import layers
from aecore.scoring import evaluation, reports

_HERE = Path(__file__).parent
_SIDE = 144

PARTS = {
    "astronaut": (40, 160),
    "chelsea": (70, 150),
    "coffee": (120, 180),
    "rocket": (180, 250),
}
"""Photographs, and the top left corners of the parts that are shown."""

DEGRADATIONS: dict[str, Degradation] = {
    "photo-denoise": GaussianNoise(25 / 255),
    "photo-dejpeg": JPEG(15),
    "photo-upscale-2x": Downscale(2),
    "photo-upscale-4x": Downscale(4),
}


def main() -> None:
    originals = np.stack(
        [
            getattr(skimage.data, name)()[top : top + _SIDE, left : left + _SIDE]
            for name, (top, left) in PARTS.items()
        ]
    )
    for name, degradation in DEGRADATIONS.items():
        degraded = np.rint(evaluation.degraded(degradation, originals) * 255).astype(np.uint8)
        restored = aecore.restore(degraded, name)
        plain = np.asarray(layers.enlarged(degraded / np.float32(255), degradation.reduction))
        rows = {
            "degraded" if degradation.reduction == 1 else "bicubic": plain.clip(0, 1),
            "restored": restored / 255,
            "original": originals / 255,
        }
        path = _HERE / f"{name.replace('-', '_')}.png"
        reports.save_samples(rows, path, side=2.2)
        print(path)


if __name__ == "__main__":
    main()
