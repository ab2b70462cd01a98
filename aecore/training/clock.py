"""Where the time of a run goes, and how fast its steps are."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax.monitoring

from aecore.saved.descriptions import Description
from aecore.steps.devices import COMPILED_AHEAD

Activity = Literal[
    "training", "waiting for input", "compiling", "evaluating", "saving", "starting", "lost"
]
"""What the main thread does. Training includes waiting for the devices; starting, imports and
loading the data; lost is the time of an earlier process after its last checkpoint."""


class Clock:
    """Divides a run's time, that of its earlier processes included, among what it was spent on.

    Each moment counts for one activity, so that they add up to the whole. Used as a context, it is
    told of compilations.

    Args:
      batch_size: images per step.
      started: when this process began to work on the run, as `time.time` counts.
    """

    def __init__(self, batch_size: int, *, started: float):
        self._batch_size = batch_size
        self._earlier_speed = 0.0
        self._seconds: dict[str, float] = {}
        self._add("starting", time.time() - started)
        self._activity: Activity = "starting"
        self._since = time.perf_counter()
        self._origin = self._since - sum(self._seconds.values())
        self._last_tick = None
        self._steps = 0
        self._step_seconds = 0.0
        self._thread = threading.get_ident()
        self._told: dict[str, float] = {}
        self._compilations: list[tuple[float, float]] = []

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def go_on(self, description: Description, until: float) -> None:
        """Adds the time of the run's earlier processes.

        Args:
          description: of the checkpoint that the run goes on from.
          until: seconds of the run when the last of them was killed, or 0.
        """
        self._earlier_speed = description.images_per_second
        before = dict(description.time or {})
        if not before:  # It was written before time was divided.
            before["training"] = description.seconds
        before["lost"] = before.get("lost", 0.0) + max(0.0, until - description.seconds)
        for name, seconds in before.items():
            self._add(name, seconds)
            self._origin -= seconds

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

    def begin(self, activity: Activity) -> None:
        """From now on, time counts for this activity."""
        self._count()
        self._activity = activity

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Time in this context counts for an activity, then again for the one before."""
        before = self._activity
        self.begin(activity)
        try:
            yield
        finally:
            self.begin(before)

    def move(self, seconds: float, activity: Activity) -> None:
        """Counts some of the present activity's time for another one."""
        self._count()
        self._add(self._activity, -seconds)
        self._add(activity, seconds)

    def total(self) -> float:
        """Seconds so far; other threads may ask too."""
        return time.perf_counter() - self._origin

    @property
    def seconds(self) -> dict[str, float]:
        """What the time so far was spent on."""
        self._count()
        return {name: max(self._seconds.get(name, 0.0), 0.0) for name in get_args(Activity)}

    def shares(self) -> dict[str, float]:
        """Shares of the time since this was last called, and `goodput`: of all time, training's."""
        now = self.seconds
        spent = {name: seconds - self._told.get(name, 0.0) for name, seconds in now.items()}
        whole = sum(spent.values()) or 1.0
        self._told = now
        names = ("waiting for input", "compiling", "evaluating", "saving")
        shares = {f"share_{name.replace(' ', '_')}": spent[name] / whole for name in names}
        return shares | {"goodput": now["training"] / (sum(now.values()) or 1.0)}

    @property
    def seconds_per_step(self) -> float | None:
        """Measured since this process started; None before the first measurement."""
        return self._step_seconds / self._steps if self._steps else None

    @property
    def images_per_second(self) -> float:
        if not self._steps:
            return self._earlier_speed
        return self._steps * self._batch_size / self._step_seconds

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds
        return {
            "seconds": sum(seconds.values()),
            "images_per_second": self.images_per_second,
            "time": seconds,
        }

    def _add(self, activity: str, seconds: float) -> None:
        self._seconds[activity] = self._seconds.get(activity, 0.0) + seconds

    def _count(self) -> None:
        now = time.perf_counter()
        self._add(self._activity, now - self._since)
        self._since = now

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Is told that something was compiled, read from the cache, or waited for."""
        is_compiling = event.startswith("/jax/core/compile/") or event == COMPILED_AHEAD
        if not is_compiling or threading.get_ident() != self._thread:
            return
        seconds = duration_secs
        end = time.perf_counter()
        start = end - seconds
        # A function's time includes that of those it calls, which were told of before.
        while self._compilations and self._compilations[-1][0] >= start:
            inner_start, inner_end = self._compilations.pop()
            seconds -= inner_end - inner_start
        self._compilations.append((start, end))
        self.move(max(seconds, 0.0), "compiling")


def table(seconds: Mapping[str, float]) -> str:
    """What a run's time was spent on, for people."""
    total = sum(seconds.values())
    rows = [(name, value) for name, value in seconds.items() if value > 0] + [("in all", total)]
    return "\n".join(
        f"{name:20}{value:10,.1f} s{100 * value / total:6.1f} %" for name, value in rows
    )
