"""Blurs: each pixel becomes a weighted mean of those around it."""

import dataclasses

import numpy as np

from aecore.degradations.base import Array, Degradation, Ops, Range, clip, real, register
from aecore.degradations.separable import as_matrices, namespace, separable


@register
@dataclasses.dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Convolves with a Gaussian. Beyond its edges the image is mirrored, edge pixels repeated."""

    sigma: Range = real(1.0, at_least=0)
    """Standard deviation of the Gaussian in pixels, 0 or more; two numbers: a range."""

    def apply(self, images, ops):
        sigma = self.draw("sigma", images, ops)
        rows, columns = (_gaussian(size, sigma, ops) for size in images.shape[1:3])
        # The weights of a mean only add up to 1 up to rounding.
        return clip(separable(images, rows, columns, ops), ops)


def _gaussian(size: int, sigma: Array, ops: Ops) -> Array:
    """`([B,] size, size)`: the blur along one side."""
    xp, einsum = namespace(sigma, ops)
    # At 1e-3 the neighbours' weights underflow to 0: sigma 0 is the identity.
    sigma = xp.maximum(as_matrices(sigma), 1e-3)
    i = np.arange(size, dtype=np.float32)[:, None]
    j = np.arange(size, dtype=np.float32)[None, :]
    weights = 0.0
    for period in range(-2, 3):
        for mirrored in (j + 2 * size * period, 2 * size * period - 1 - j):
            weights = weights + xp.exp(-0.5 * ((i - mirrored) / sigma) ** 2)
    return weights / einsum("...ij,jk->...ik", weights, np.ones((size, 1), np.float32))
