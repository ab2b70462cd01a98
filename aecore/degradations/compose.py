"""Degradations made of others."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

from aecore.degradations.base import (
    PROBABILITY,
    Degradation,
    Ops,
    clip,
    make_plain,
    pick,
    register,
)
from aecore.degradations.blurs import Convolution
from aecore.errors import ConfigError


class _OfParts(Degradation):
    """Base of degradations whose field `parts` holds others."""

    parts: tuple[Degradation, ...]

    def __post_init__(self):
        super().__post_init__()
        make_plain(self, "parts")
        if not (
            isinstance(self.parts, tuple)
            and all(isinstance(part, Degradation) for part in self.parts)
        ):
            raise ConfigError(f"{self.label}: {self.parts!r} is not a tuple of degradations")


@register
@dataclasses.dataclass(frozen=True)
class Compose(_OfParts):
    """Applies degradations in order."""

    parts: tuple[Degradation, ...] = ()
    """The degradations, first to last."""

    @property
    def is_random(self):
        return any(part.is_random for part in self.parts)

    @property
    def reduction(self):
        return math.prod(part.reduction for part in self.parts)

    @property
    def grid(self):
        reduced, grids = 1, [1]
        for part in self.parts:
            if part.grid > 1:
                grids.append(reduced * part.grid)
            reduced *= part.reduction
        return math.lcm(*grids)

    def apply(self, images, ops):
        for _, part, own in _with_ops(_flat(self.parts), ops):
            images = part.apply(images, own)
        return images


@register
@dataclasses.dataclass(frozen=True)
class Sometimes(Degradation):
    """Applies a degradation to some of the images."""

    p: float
    """Probability that an image is degraded, in [0, 1]."""
    part: Degradation
    """What is then done to it; it must keep the image's size. It is computed for all images."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        PROBABILITY.check("Sometimes", "p", self.p)
        if not isinstance(self.part, Degradation):
            raise ConfigError(f"Sometimes: {self.part!r} is not a degradation")
        _check_size_kept("Sometimes", (self.part,))

    @property
    def label(self):
        return f"Sometimes {self.part.label}"

    @property
    def grid(self):
        return self.part.grid

    def apply(self, images, ops):
        drawn = ops.uniform(f"{self.label}.chosen", images, 0.0, 1.0)
        degraded = self.part.apply(images, ops.within(self.label))
        return ops.xp.where(drawn < self.p, degraded, images)


@register
@dataclasses.dataclass(frozen=True)
class OneOf(_OfParts):
    """Applies one of several degradations to each image.

    All are computed for all images, but of `Blur`, `MotionBlur` and `Sinc` only the kernels, if
    there is nothing else among the parts.
    """

    parts: tuple[Degradation, ...]
    """The degradations, which must all make images smaller by the same factor."""
    weights: tuple[float, ...] | None = None
    """How often each is chosen, in proportion; None: all equally often."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        make_plain(self, "weights")
        if not self.parts:
            raise ConfigError("OneOf: there are no parts; use one or more")
        if len({part.reduction for part in self.parts}) != 1:
            factors = ", ".join(str(part.reduction) for part in self.parts)
            raise ConfigError(f"OneOf: parts reduce by {factors}; use parts that reduce alike")
        if self.weights is None:
            return
        if not (
            isinstance(self.weights, tuple)
            and len(self.weights) == len(self.parts)
            and all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in self.weights)
            and sum(self.weights) > 0
        ):
            count = len(self.parts)
            raise ConfigError(
                f"OneOf: weights {self.weights!r} don't fit {count} part{'s' * (count != 1)}; use "
                "a number for each that is 0 or more, and not all 0"
            )

    @property
    def reduction(self):
        return self.parts[0].reduction

    @property
    def grid(self):
        return math.lcm(*(part.grid for part in self.parts))

    def apply(self, images, ops):
        drawn = ops.uniform(f"{self.label}.choice", images, 0.0, 1.0)
        weights = self.weights or [1.0] * len(self.parts)
        own = [scope for _, _, scope in _with_ops(self.parts, ops.within(self.label))]
        blurs = [part for part in self.parts if isinstance(part, Convolution)]
        if len(blurs) < len(self.parts):
            results = [part.apply(images, o) for part, o in zip(self.parts, own, strict=True)]
            return pick(drawn, weights, results, ops)
        reach = max(blur.reach for blur in blurs)
        kernels = [blur.kernels(images, o, reach) for blur, o in zip(blurs, own, strict=True)]
        return clip(ops.convolve(images, pick(drawn, weights, kernels, ops)), ops)


@register
@dataclasses.dataclass(frozen=True)
class Shuffled(_OfParts):
    """Applies degradations in an order that each image draws, all orders being equally probable.

    Every part is computed at every place: n parts cost n**2, so at most 4 are allowed. Parts that
    may share an order can be put into a `Compose` first.
    """

    parts: tuple[Degradation, ...]
    """The degradations, at most 4, which must keep the image's size."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.parts) <= 4:
            raise ConfigError(f"Shuffled: {len(self.parts)} parts are not possible; use 1 to 4")
        _check_size_kept("Shuffled", self.parts)

    @property
    def grid(self):
        return math.lcm(*(part.grid for part in self.parts))

    def apply(self, images, ops):
        xp = ops.xp
        parts = list(_with_ops(self.parts, ops.within(self.label)))
        drawn = [
            ops.uniform(f"{self.label}.place of {name}", images, 0.0, 1.0) for name, _, _ in parts
        ]
        # The place of a part is how many others drew less; of two that drew the same, the first.
        places = [
            sum(
                xp.where(other <= value if i < index else other < value, 1.0, 0.0)
                for i, other in enumerate(drawn)
            )
            for index, value in enumerate(drawn)
        ]
        for place in range(len(parts)):
            before = images
            for (_, part, own), its_place in zip(parts, places, strict=True):
                images = xp.where(its_place == place, part.apply(before, own), images)
        return images


def _check_size_kept(owner: str, parts: Iterable[Degradation]) -> None:
    for part in parts:
        if part.reduction != 1:
            raise ConfigError(f"{owner}: {part} makes images smaller; put it after, in a Compose")


def _flat(parts: Iterable[Degradation]) -> Iterator[Degradation]:
    """The parts, with those of a `Compose` in its place."""
    for part in parts:
        if isinstance(part, Compose):
            yield from _flat(part.parts)
        else:
            yield part


def _with_ops(parts: Iterable[Degradation], ops: Ops) -> Iterator[tuple[str, Degradation, Ops]]:
    """Each part with a name, and with operations whose random streams are its own.

    Parts are told apart by class, and within a class by number, so that adding a part leaves what
    is drawn for parts of other classes, and for those before it, as it was. The first of a class
    draws what it would draw alone.
    """
    seen = collections.Counter()
    for part in parts:
        seen[part.label] += 1
        name = f"{part.label} {seen[part.label]}"
        # A Compose has no streams but those of its parts, which others here may have too.
        alone = seen[part.label] == 1 and not isinstance(part, Compose)
        yield name, part, ops if alone else ops.within(name)
