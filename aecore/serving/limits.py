"""What visitors may ask for."""

import dataclasses

from aecore.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What visitors may ask of a server. Whoever asks for more gets a sentence that says so."""

    megabytes: float = 64.0
    """Most bytes of a picture's file, in millions."""
    megapixels: float = 64.0
    """Most pixels of a restored picture, in millions: of all frames, after enlarging."""
    seconds: float = 300.0
    """How long a picture may take, with its upload and the time it waits."""
    pictures: int = 100
    """Most pictures of all visitors that are waiting or being restored."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"limits.{field.name} {value} is out of bounds; use more than 0")

    @property
    def bytes(self) -> int:
        return round(1e6 * self.megabytes)

    @property
    def pixels(self) -> int:
        return round(1e6 * self.megapixels)
