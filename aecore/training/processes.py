"""Several processes that train together: they meet, agree, and notice when one is gone.

JAX waits in silence for a process that doesn't come, trains on when settings differ, and ends with
a page of C++ when a process is lost. So they first meet without it (`meeting`), and keep their
connections as signs of life (`group`).
"""

import atexit
import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from aecore.config import Experiment, Training, settings
from aecore.errors import AecoreError, ConfigError, Interrupted, ProcessError, SavingError
from aecore.saved.descriptions import changes, describe, experiment_from_json
from aecore.storage import reason_with_path
from aecore.training import claim, meeting
from aecore.training.group import ADVICE, GRACE, Group

_SEEN_WITHIN = 20.0
"""Seconds until what one host has written is seen by the others, with caches between them."""

_group: Group | None = None


def join(training: Training) -> None:
    """Connects this process with the others of a training; must be called before JAX is used.

    Raises:
      ConfigError: no cluster is found, or a port can't be used.
      ProcessError: not all processes came in time, or their versions or counts differ.
    """
    global _group
    if training.distributed is None or jax.distributed.is_initialized():
        return
    place = meeting.place(training)
    if place.count == 1:
        return
    _group = Group(place.index, place.count, meeting.meet(place), training.loss_timeout)
    with _ending_together(_group):
        keeper = meeting.start_coordinator(place, training) if place.index == 0 else None
        _group.gather("ready")
        try:
            jax.distributed.initialize(
                place.address,
                place.count,
                place.index,
                local_device_ids=place.local_devices,
                initialization_timeout=int(training.join_timeout) + 1,
                heartbeat_timeout_seconds=meeting.heartbeat(training),
                # The service that JAX itself starts in the first process is not used.
                coordinator_bind_address="127.0.0.1:0",
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"training.distributed {training.distributed}: {error}") from error
    atexit.register(_leave, _group, keeper)


@contextlib.contextmanager
def together(experiment: Experiment) -> Iterator[None]:
    """Trains with the other processes, if there are any, or not at all.

    Raises:
      ConfigError: the processes don't all have this experiment.
      ProcessError: another process is gone, or failed.
    """
    join(experiment.training)
    if _group is None:
        yield
        return
    with _ending_together(_group):
        _check_experiments(_group.gather(describe(experiment)), experiment)
        yield


def check_data(fingerprint: str) -> None:
    """Raises ConfigError unless all processes have loaded the same images."""
    if _group is None:
        return
    for index, other in enumerate(found := _group.gather(fingerprint)):
        if other != found[0]:
            raise ConfigError(
                f"process {index} has other images than process 0 ({other} and {found[0]}); "
                "give all processes the same data"
            )


def check_sees(directory: epath.Path) -> None:
    """Raises ConfigError unless all processes see the first one's claim of the run directory."""
    if _group is None:
        return

    def seen() -> str | None:
        return (claim.read(directory) or {}).get("token")

    expected = _group.gather(seen())[0]
    end = time.monotonic() + _SEEN_WITHIN
    while seen() != expected and time.monotonic() < end:
        time.sleep(0.5)
    for index, sees in enumerate(_group.gather(seen() == expected)):
        if not sees:
            raise ConfigError(
                f"process {index} doesn't see what process 0 writes to {directory}; "
                "use a --run-dir that all hosts share, such as gs://bucket/run"
            )


@contextlib.contextmanager
def _ending_together(group: Group) -> Iterator[None]:
    """Tells the others when this process fails, and says whose loss made it fail."""
    try:
        yield
    except Interrupted:  # After the same step in all of them.
        raise
    except BaseException as error:
        # Only what the loss of another process can cause is explained by it.
        is_own = isinstance(error, AecoreError) and not isinstance(error, SavingError)
        is_own |= not isinstance(error, Exception)
        loss = None if is_own else group.wait_for_loss(GRACE)
        group.leave(f"failed: {loss}" if loss else _what_happened(error))
        if loss is None:
            raise
        raise ProcessError(loss) from error


def _what_happened(error: BaseException) -> str:
    """One line for the other processes; exceptions of aecore say themselves what to do."""
    if isinstance(error, AecoreError):
        return f"failed: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"was interrupted; {ADVICE}"
    return f"failed: {' '.join(reason_with_path(error).split())}; {ADVICE}"


def _leave(group: Group, coordinator: subprocess.Popen | None) -> None:
    group.leave(None)
    if coordinator is not None and coordinator.stdin is not None:
        with contextlib.suppress(OSError):
            coordinator.stdin.write(b"leaving\n")
            coordinator.stdin.flush()


def _check_experiments(described: Sequence[Mapping[str, Any]], experiment: Experiment) -> None:
    """Refuses experiments that differ in more than what each host may choose for itself."""
    experiments = [experiment_from_json(item, like=experiment.model) for item in described]
    for index, other in enumerate(experiments):
        differing = [
            f"{name} {theirs} (process 0: {first})"
            for name, field, first, theirs in changes(experiments[0], other)
            if not settings.is_of_host(field)
        ]
        if differing:
            raise ConfigError(
                f"process {index} has another experiment: {', '.join(differing)}; "
                "start all processes with the same settings"
            )
