"""Masks: parts of the image are missing."""

import dataclasses
from typing import ClassVar

import numpy as np

from aecore.degradations.base import (
    Degradation,
    Range,
    WholeRange,
    real,
    register,
    whole,
)
from aecore.degradations.separable import namespace


@register
@dataclasses.dataclass(frozen=True)
class Mask(Degradation):
    """Blanks random pixels and random boxes, in all channels at once."""

    pixels: Range = real(0.0, at_least=0, at_most=1)
    """Probability that a pixel is blanked, in [0, 1]; two numbers: a range."""
    boxes: WholeRange = whole(1, at_least=0)
    """Boxes per image, which may overlap; two numbers: a range, both ends included."""
    size: Range = real(0.25, at_least=0, at_most=1)
    """Sides of a box as a share of the image's sides, in [0, 1], rounded to whole pixels; two
    numbers: a range, from which each image draws one size for all its boxes."""
    value: Range = real(0.0, at_least=0, at_most=1)
    """What blanked pixels become, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def apply(self, images, ops):
        xp = ops.xp
        height, width = images.shape[1:3]
        rows = np.arange(height, dtype=np.float32)[:, None, None]
        columns = np.arange(width, dtype=np.float32)[None, :, None]
        drawn = ops.uniform_values(f"{self.label}.blanked pixels", images[..., :1])
        blank = drawn < self.draw("pixels", images, ops)
        size = self.draw("size", images, ops)
        box = [namespace(self.size, ops)[0].round(side * size) for side in (height, width)]
        most = self.boxes[1] if isinstance(self.boxes, tuple) else self.boxes
        count = self.draw("boxes", images, ops)
        for index in range(int(most)):
            top, left = (
                xp.floor(ops.uniform(f"{self.label}.{edge} {index}", images, 0.0, 1.0) * places)
                for edge, places in (("top", height - box[0] + 1), ("left", width - box[1] + 1))
            )
            inside = (rows >= top) & (rows < top + box[0])
            inside = inside & (columns >= left) & (columns < left + box[1])
            blank = blank | (inside & (index < count))
        return xp.where(blank, self.draw("value", images, ops), images)
