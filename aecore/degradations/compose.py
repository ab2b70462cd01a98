"""Degradations made of others."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

from aecore.degradations.base import Degradation, Ops, register
from aecore.errors import ConfigError


@register
@dataclasses.dataclass(frozen=True)
class Compose(Degradation):
    """Applies degradations in order."""

    parts: tuple[Degradation, ...] = ()
    """The degradations, first to last."""

    def __post_init__(self):
        if not (
            isinstance(self.parts, tuple)
            and all(isinstance(part, Degradation) for part in self.parts)
        ):
            raise ConfigError(f"Compose: {self.parts!r} is not a tuple of degradations")

    @property
    def is_random(self):
        return any(part.is_random for part in self.parts)

    def apply(self, images, ops):
        for part, own in _with_ops(_flat(self.parts), ops):
            images = part.apply(images, own)
        return images


def _flat(parts: Iterable[Degradation]) -> Iterator[Degradation]:
    """The parts, with those of a `Compose` in its place."""
    for part in parts:
        if isinstance(part, Compose):
            yield from _flat(part.parts)
        else:
            yield part


def _with_ops(parts: Iterable[Degradation], ops: Ops) -> Iterator[tuple[Degradation, Ops]]:
    """Each part with operations whose random streams are its own.

    They are told apart by class, and within a class by number, so that adding a part leaves what
    is drawn for parts of other classes, and for those before it, as it was. The first of a class
    draws what it would draw alone.
    """
    seen = collections.Counter()
    for part in parts:
        seen[part.label] += 1
        # A Compose has no streams but those of its parts, which others here may have too.
        alone = seen[part.label] == 1 and not isinstance(part, Compose)
        yield part, ops if alone else ops.within(f"{part.label} {seen[part.label]}")
