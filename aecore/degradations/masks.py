"""Masks: parts of the image are missing."""

import dataclasses
from typing import ClassVar

import numpy as np

from aecore.degradations.base import Degradation, Range, check_range, check_share, draw, register
from aecore.degradations.separable import namespace


@register
@dataclasses.dataclass(frozen=True)
class Mask(Degradation):
    """Blanks random pixels and random boxes, in all channels at once."""

    pixels: Range = 0.0
    """Probability that a pixel is blanked, in [0, 1]; two numbers: a range."""
    boxes: int | tuple[int, int] = 1
    """Boxes per image, which may overlap; two numbers: a range, both ends included."""
    size: Range = 0.25
    """Sides of a box as a share of the image's sides, in [0, 1], rounded to whole pixels; two
    numbers: a range, from which each image draws one size for all its boxes."""
    value: Range = 0.0
    """What blanked pixels become, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("pixels", "size", "value"):
            check_share("Mask", name, getattr(self, name))
        check_range(
            "Mask",
            "boxes",
            self.boxes,
            lambda n: isinstance(n, int) and n >= 0,
            "whole numbers >= 0",
        )

    def apply(self, images, ops):
        xp = ops.xp
        height, width = images.shape[1:3]
        rows = np.arange(height, dtype=np.float32)[:, None, None]
        columns = np.arange(width, dtype=np.float32)[None, :, None]
        blank = ops.uniform_values(images[..., :1]) < draw(self.pixels, images, ops)
        size = draw(self.size, images, ops)
        box = [namespace(self.size, ops)[0].round(side * size) for side in (height, width)]
        few, most = self.boxes if isinstance(self.boxes, tuple) else (self.boxes, self.boxes)
        count = xp.floor(ops.uniform(images, few, most + 1))
        for index in range(most):
            top, left = (
                xp.floor(ops.uniform(images, 0.0, 1.0) * (side - extent + 1))
                for side, extent in zip((height, width), box, strict=True)
            )
            inside = (rows >= top) & (rows < top + box[0])
            inside = inside & (columns >= left) & (columns < left + box[1])
            blank = blank | (inside & (index < count))
        return xp.where(blank, draw(self.value, images, ops), images)
