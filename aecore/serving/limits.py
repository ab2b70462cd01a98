"""What visitors may ask for."""

import dataclasses

from aecore.config import settings
from aecore.config.settings import setting


@dataclasses.dataclass(frozen=True)
class Limits:
    """What visitors may ask of a server. Whoever asks for more gets a sentence that says so."""

    megabytes: float = setting(64.0, above=0)
    """Most bytes of a picture's file, in millions."""
    megapixels: float = setting(64.0, above=0)
    """Most pixels of a restored picture, in millions: of all frames, after enlarging."""
    seconds: float = setting(300.0, above=0)
    """How long a picture may take, with its upload and the time it waits."""
    pictures: int = setting(100, above=0)
    """Most pictures of all visitors that are waiting or being restored."""

    def __post_init__(self):
        settings.check(self, "limits.")

    @property
    def bytes(self) -> int:
        return round(1e6 * self.megabytes)

    @property
    def pixels(self) -> int:
        return round(1e6 * self.megapixels)
