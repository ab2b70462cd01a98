"""Random changes of training images before they are degraded, written against the same `Ops`."""

from aecore.degradations.base import Array, Ops


def flip(images: Array, ops: Ops) -> Array:
    """Mirrors each of the `(B, H, W, C)` images left to right with probability 1/2."""
    return ops.xp.where(ops.uniform("flip", images, 0.0, 1.0) < 0.5, images[:, :, ::-1], images)
