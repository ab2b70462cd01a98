"""How long a run has taken, and how fast its steps are."""

import time

from aecore.saved.descriptions import Description


class Clock:
    """Training time, including earlier processes of the same run, and speed of the steps.

    The speed excludes compilation, evaluation and saving.
    """

    def __init__(self, batch_size: int, description: Description):
        self._batch_size = batch_size
        self._earlier_seconds = description.seconds
        self._earlier_speed = description.images_per_second
        self._start = time.perf_counter()
        self._end = None
        self._last_tick = None
        self._steps = 0
        self._step_seconds = 0.0

    def tick(self, steps: int) -> None:
        """Counts finished steps. The first after a pause are not timed."""
        now = time.perf_counter()
        if self._last_tick is not None:
            self._steps += steps
            self._step_seconds += now - self._last_tick
        self._last_tick = now

    def pause(self) -> None:
        """Excludes the time until the next step from the speed."""
        self._last_tick = None

    def stop(self) -> None:
        self._end = time.perf_counter()

    @property
    def seconds_per_step(self) -> float | None:
        """Measured since this process started; None before the first measurement."""
        return self._step_seconds / self._steps if self._steps else None

    @property
    def images_per_second(self) -> float:
        if not self._steps:
            return self._earlier_speed
        return self._steps * self._batch_size / self._step_seconds

    def to_json(self) -> dict[str, float]:
        seconds = self._earlier_seconds + (self._end or time.perf_counter()) - self._start
        return {"seconds": seconds, "images_per_second": self.images_per_second}
