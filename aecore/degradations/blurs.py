"""Blurs: each pixel becomes a weighted mean of those around it."""

import dataclasses
import math
from typing import Any

import numpy as np

from aecore.degradations.base import (
    Array,
    Degradation,
    Ops,
    Range,
    WholeRange,
    clip,
    real,
    register,
    whole,
)
from aecore.degradations.separable import as_matrices, namespace, separable

_MOST = 10
"""Pixels that a kernel may reach from its centre; its side is twice that and one."""


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


class Convolution(Degradation):
    """Base of the blurs whose kernels are not separable. Edges are mirrored, as in `GaussianBlur`.

    Several of them in a `OneOf` cost one convolution.
    """

    @property
    def reach(self) -> int:
        """Pixels that the largest kernel reaches from its centre."""
        raise NotImplementedError

    def kernels(self, images: Array, ops: Ops, reach: int) -> Array:
        """`(B, K, K)` or `(1, K, K)` weights that add up to 1, where K is 2 `reach` + 1."""
        raise NotImplementedError

    def apply(self, images, ops):
        return clip(ops.convolve(images, self.kernels(images, ops, self.reach)), ops)


@register
@dataclasses.dataclass(frozen=True)
class Blur(Convolution):
    """A Gaussian blur of any direction and shape, as lenses make them.

    The weight of a pixel is exp(-q**beta / 2), or 1 / (1 + q**beta) for a plateau, where q is the
    squared distance in standard deviations. Kernels as in Real-ESRGAN (Wang et al., "Real-ESRGAN:
    Training Real-World Blind Super-Resolution with Pure Synthetic Data", 2021, section 3.2).
    """

    sigma: Range = real(1.0, at_least=0)
    """Standard deviation in pixels, along `angle` if there is a `sigma_y`, 0 or more; two numbers:
    a range."""
    sigma_y: Range | None = real(None, at_least=0)
    """Standard deviation at a right angle to that; two numbers: a range; None: sigma, the same in
    all directions."""
    angle: Range = real(0.0, at_least=-360, at_most=360)
    """Direction in which sigma is measured, in degrees clockwise from the rows; two numbers: a
    range."""
    beta: Range = real(1.0, above=0, at_most=8)
    """1 is a Gaussian; lower ones have a sharper peak, higher ones a flatter top and steeper sides.
    Above 0, at most 8; two numbers: a range."""
    plateau: bool = False
    """Whether weights are 1 / (1 + q**beta)."""
    radius: WholeRange = whole(_MOST, at_least=1, at_most=_MOST)
    """Pixels that the kernel reaches from its centre, 1 to 10; two numbers: a range, both ends
    included."""

    @property
    def reach(self):
        return _most(self.radius)

    def kernels(self, images, ops, reach):
        # Below 1e-3 the squared distances would overflow.
        sigma_x = ops.xp.maximum(as_matrices(self.draw("sigma", images, ops)), 1e-3)
        sigma_y = sigma_x
        if self.sigma_y is not None:
            sigma_y = ops.xp.maximum(as_matrices(self.draw("sigma_y", images, ops)), 1e-3)
        cos, sin = _direction(self.draw("angle", images, ops), ops)
        x, y = _grid(reach)
        squared = ((x * cos + y * sin) / sigma_x) ** 2 + ((y * cos - x * sin) / sigma_y) ** 2
        power = squared ** as_matrices(self.draw("beta", images, ops))
        weights = 1.0 / (1.0 + power) if self.plateau else ops.xp.exp(-0.5 * power)
        return _cut(weights, self.draw("radius", images, ops), ops)


@register
@dataclasses.dataclass(frozen=True)
class MotionBlur(Convolution):
    """The camera moved in a straight line, at constant speed, while the shutter was open."""

    length: Range = real(5.0, at_least=0, at_most=2 * _MOST)
    """Pixels that it moved, 0 to 20; two numbers: a range."""
    angle: Range = real((0.0, 180.0), at_least=-360, at_most=360)
    """Direction in degrees clockwise from the rows; two numbers: a range."""

    @property
    def reach(self):
        return max(1, math.ceil(_most(self.length) / 2))

    def kernels(self, images, ops, reach):
        # The mean over moments of the image shifted by linear interpolation.
        moments = ((np.arange(64, dtype=np.float32) + 0.5) / 64 - 0.5)[None, :, None]
        place = moments * as_matrices(self.draw("length", images, ops))
        cos, sin = _direction(self.draw("angle", images, ops), ops)
        pixels = np.arange(-reach, reach + 1, dtype=np.float32)[None, None, :]
        rows = ops.xp.maximum(1.0 - ops.xp.abs(pixels - place * sin), 0.0)
        columns = ops.xp.maximum(1.0 - ops.xp.abs(pixels - place * cos), 0.0)
        return ops.einsum("bti,btj->bij", rows, columns) / 64


@register
@dataclasses.dataclass(frozen=True)
class Sinc(Convolution):
    """Rings and overshoot at edges: frequencies above a cutoff are removed in all directions.

    The kernel at distance r is cutoff J1(cutoff r) / (2 pi r), cut off at `radius` (Real-ESRGAN,
    section 3.3), scaled so that it adds up to 1.
    """

    cutoff: Range = real((math.pi / 3, math.pi), above=0, at_most=math.pi)
    """Highest frequency that is kept, in radians per pixel, above 0, at most pi; two numbers: a
    range."""
    radius: WholeRange = whole(_MOST, at_least=1, at_most=_MOST)
    """Pixels that the kernel reaches from its centre, 1 to 10; two numbers: a range, both ends
    included."""

    @property
    def reach(self):
        return _most(self.radius)

    def kernels(self, images, ops, reach):
        # Poisson's integral, J1(z) / z = mean over t in (0, pi) of cos(z cos t) sin(t)**2. With 48
        # points it is exact to 1e-6 for z up to 45, which is the highest here (DLMF 10.9.4).
        t = (np.arange(48) + 0.5) * np.pi / 48
        x, y = _grid(reach)
        phases = (np.sqrt(x**2 + y**2)[..., None] * np.cos(t)).astype(np.float32)
        cutoff = as_matrices(self.draw("cutoff", images, ops))[..., None]
        waves = ops.xp.cos(cutoff * phases)
        weights = ops.einsum("bijt,t->bij", waves, np.sin(t).astype(np.float32) ** 2)
        return _cut(weights, self.draw("radius", images, ops), ops)


def _most(parameter: Any) -> Any:
    """The highest value of a number or a range."""
    return parameter[1] if isinstance(parameter, tuple) else parameter


def _grid(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of a kernel's pixels from its centre, each `(1, K, K)`."""
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    return x[None], y[None]


def _direction(degrees: Array, ops: Ops) -> tuple[Array, Array]:
    """Cosine and sine, which broadcast against kernels."""
    radians = as_matrices(degrees) * np.float32(np.pi / 180)
    return ops.xp.cos(radians), ops.xp.sin(radians)


def _cut(weights: Array, radius: Array, ops: Ops) -> Array:
    """Kernels that are 0 further than `radius` from the centre, and add up to 1."""
    x, y = _grid(weights.shape[1] // 2)
    inside = np.maximum(np.abs(x), np.abs(y)) <= as_matrices(radius)
    weights = ops.xp.where(inside, weights, 0.0)
    return weights / ops.einsum("bij->b", weights)[:, None, None]
