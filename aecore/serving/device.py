"""The device that all visitors share: images of one shape that wait at once share a call.

Images are `(H, W)` or `(H, W, C)`, uint8 or uint16.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from aecore.restoring.restorer import Restorer

_MOST_TOGETHER = 2**24
"""Most pixels that share a call, unless one image has more."""

_MOST_HELD = 2**27
"""Most pixels of restored pictures in memory, unless one picture has more."""

_LOOK_EVERY = 0.1
"""Seconds after which whoever waits looks again whether it still should."""


class AbandonedError(Exception):
    """Nobody waits for the picture any more."""


class Visit:
    """A picture that somebody waits for."""

    def __init__(self):
        self.share = 0.0
        """How much of it is restored, up to 1."""
        self.is_abandoned = False

    def check(self) -> None:
        """Raises AbandonedError if nobody waits any more."""
        if self.is_abandoned:
            raise AbandonedError


@dataclasses.dataclass(eq=False)
class _Waiting:
    """One image of a visit's picture."""

    visit: Visit
    restorer: Restorer
    image: np.ndarray
    share: float = 0.0
    result: concurrent.futures.Future[np.ndarray] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )

    def is_like(self, other: "_Waiting") -> bool:
        """Whether both can share a call."""
        return (self.restorer, self.image.shape, self.image.dtype) == (
            other.restorer,
            other.image.shape,
            other.image.dtype,
        )


class Device:
    """Restores images one call at a time, in a thread of its own; safe to use from threads."""

    def __init__(self):
        self._waiting: list[_Waiting] = []
        self._held = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    @contextlib.contextmanager
    def room_for(self, pixels: int, visit: Visit) -> Iterator[None]:
        """Waits until there is memory for a picture, and keeps it meanwhile.

        Raises:
          AbandonedError: nobody waits for it any more.
        """
        with self._changed:
            while self._held and self._held + pixels > _MOST_HELD:
                visit.check()
                self._changed.wait(_LOOK_EVERY)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()

    def restore(
        self, restorer: Restorer, images: Sequence[np.ndarray], visit: Visit
    ) -> list[np.ndarray]:
        """Restores the images of a picture, with others that wait, and waits for the result.

        Args:
          restorer: one of full strength.
          images: of the picture.
          visit: whose share grows meanwhile.

        Raises:
          AbandonedError: nobody waits for it any more.
          ImageError: as for calling a restorer.
        """
        waiting = [_Waiting(visit, restorer, image) for image in images]
        with self._changed:
            self._waiting += waiting
            self._changed.notify_all()
        while concurrent.futures.wait([w.result for w in waiting], _LOOK_EVERY).not_done:
            visit.check()
            visit.share = sum(one.share for one in waiting) / len(waiting)
        return [one.result.result() for one in waiting]

    def _work(self) -> None:
        while True:
            together = self._next()
            try:
                results = _restore(together)
            except Exception as error:  # The visitors' threads raise it.
                for one in together:
                    one.result.set_exception(error)
            else:
                for one, result in zip(together, results, strict=True):
                    one.result.set_result(result)

    def _next(self) -> list[_Waiting]:
        """Waits for images, and takes the oldest with others that can share its call."""
        with self._changed:
            while True:
                self._waiting = [one for one in self._waiting if not one.visit.is_abandoned]
                if self._waiting:
                    break
                self._changed.wait()
            first = self._waiting[0]
            most = max(1, _MOST_TOGETHER // math.prod(first.image.shape[:2]))
            together = [one for one in self._waiting if one.is_like(first)][:most]
            self._waiting = [one for one in self._waiting if one not in together]
            return together


def _restore(together: Sequence[_Waiting]) -> list[np.ndarray]:
    def progress(share):
        if all(one.visit.is_abandoned for one in together):
            raise AbandonedError
        for one in together:
            one.share = share

    images = np.stack([one.image for one in together])
    is_gray = images.ndim == 3
    restored = together[0].restorer(images[..., None] if is_gray else images, progress=progress)
    return list(restored[..., 0] if is_gray else restored)
