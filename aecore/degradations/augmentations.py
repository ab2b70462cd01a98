"""Random changes of training images before they are degraded, written against the same `Ops`."""

from aecore.degradations.base import Array, Ops
from aecore.errors import ConfigError


def flip(images: Array, ops: Ops) -> Array:
    """Mirrors each of the `(B, H, W, C)` images left to right with probability 1/2."""
    return ops.xp.where(ops.uniform("flip", images, 0.0, 1.0) < 0.5, images[:, :, ::-1], images)


def turn(images: Array, ops: Ops) -> Array:
    """Turns and mirrors each of the `(B, S, S, C)` images, all eight ways equally often.

    Raises:
      ConfigError: the images are not square.
    """
    height, width = images.shape[1:3]
    if height != width:
        raise ConfigError(f"images of {height}x{width} can't be turned; use square ones or flip")
    for name, change in (
        ("transpose", lambda x: ops.xp.transpose(x, (0, 2, 1, 3))),
        ("top to bottom", lambda x: x[:, ::-1]),
        ("left to right", lambda x: x[:, :, ::-1]),
    ):
        drawn = ops.uniform(f"turn.{name}", images, 0.0, 1.0)
        images = ops.xp.where(drawn < 0.5, change(images), images)
    return images
