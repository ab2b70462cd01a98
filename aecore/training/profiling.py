"""A trace of some steps, for XProf and Perfetto."""

from collections.abc import Iterator

import jax
from etils import epath

from aecore.config import Training


class Profile:
    """Traces the steps that `training.profile` names, into the run's folder `profile`.

    Used as a context, it writes what it has traced of a run that ends before the last of them.
    """

    def __init__(self, training: Training, directory: epath.Path):
        self._folder = str(directory / "profile")
        self._running = False
        self._first = self._last = 0
        if training.profile is not None:
            first, count, *hosts = training.profile.split(",")
            if hosts or jax.process_index() == 0:
                self._first, self._last = int(first), int(first) + int(count) - 1

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def edges(self) -> Iterator[int]:
        """The steps after which tracing begins or ends, which a call should not go beyond."""
        if self._last:
            yield from (self._first - 1, self._last)

    def begins_after(self, step: int) -> bool:
        return bool(self._last) and step == self._first - 1

    def ends_after(self, step: int) -> bool:
        return self._running and step >= self._last

    def begin(self) -> None:
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._running = True

    def end(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
