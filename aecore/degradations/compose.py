"""Degradations made of others."""

import dataclasses

from aecore.degradations.base import Degradation, register
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
        for part in self.parts:
            images = part.apply(images, ops)
        return images
