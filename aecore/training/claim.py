"""A file in the run directory that says which process trains there, so that no second one does."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from aecore.errors import ConfigError
from aecore.saved.checks import is_number
from aecore.storage import exists, is_remote, naming, write_whole

_log = logging.getLogger(__name__)

FILE = "running.json"

_BEAT = 2.0
_REMOTE_BEAT = 20.0
"""Seconds between signs of life; each is two requests where the file is remote."""


def read(directory: epath.Path) -> dict[str, Any] | None:
    """What the claim in a run directory says; None without a claim."""
    try:
        claim = json.loads((directory / FILE).read_text())
    except (OSError, ValueError):
        return None
    return claim if isinstance(claim, dict) else None


@contextlib.contextmanager
def claimed(
    directory: epath.Path,
    seconds: Callable[[], float] = lambda: 0.0,
    stop: Callable[[str], None] = lambda why: None,
) -> Iterator[float]:
    """Trains in a run directory alone.

    A claim that a process left when it was killed doesn't count: on this host one sees that the
    process is gone, of another host's or container's that its signs of life have ended.

    Args:
      directory: the run directory, which exists.
      seconds: gives the time that the run has taken so far, to note with each sign of life.
      stop: called from another thread, with why, if another process has claimed the directory after
        all, as where files are seen late or this process was suspended; that one goes on.

    Yields:
      The time that the run had taken when an earlier process of it was killed or failed, or 0.

    Raises:
      ConfigError: another process trains here.
    """
    remote = is_remote(directory)
    beat = _REMOTE_BEAT if remote else _BEAT
    earlier = _left(directory, beat)
    # Of a damaged claim, it isn't known.
    taken = float(earlier["seconds"]) if is_number(earlier.get("seconds")) else 0.0
    token = uuid.uuid4().hex
    said = {
        "token": token,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "namespace": _namespace(),
        "beats": 0,
    }

    def write() -> None:
        # Until the run's own time is known, it is at least what the earlier process had noted.
        text = json.dumps({**said, "seconds": max(seconds(), taken)}) + "\n"
        write_whole(directory / FILE, text.encode())

    def others() -> dict[str, Any] | None:
        found = read(directory)
        return None if found is None or found.get("token") == token else found

    write()
    # Of several that found no claim at the same moment, the last to write has it.
    time.sleep(3.0 if remote else 0.1)
    if (other := others()) is not None:
        raise ConfigError(_refusal(directory, other))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(beat):
            # A sign of life may fail, such as on a full disk or without a network.
            with contextlib.suppress(OSError), naming(directory):
                if (other := others()) is not None:
                    stop(_refusal(directory, other))
                    return
                said["beats"] += 1
                write()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    failed = False
    try:
        yield taken
    except Exception:
        failed = True
        raise
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError), naming(directory):
            is_own = others() is None
            if is_own and failed:  # What was not saved is lost, which is noted for whoever goes on.
                said["process"] = None
                write()
            elif is_own:
                (directory / FILE).unlink(missing_ok=True)


def _left(directory: epath.Path, beat: float) -> dict[str, Any]:
    """What a process that is gone has left; refuses the claim of one that is alive."""
    other = read(directory)
    if other is None or other.get("process") is None:
        return other or {}
    # Claims by earlier versions don't say the namespace.
    namespace = other.get("namespace", _namespace())
    if (other.get("host"), namespace) == (socket.gethostname(), _namespace()):
        if _is_alive(other):
            raise ConfigError(_refusal(directory, other))
        return other
    _log.warning(
        "process %s on %s trained in %s; waiting up to %.0f s for signs that it still does",
        other.get("process"),
        other.get("host"),
        directory,
        3 * beat,
    )
    end = time.monotonic() + 3 * beat
    while time.monotonic() < end:
        time.sleep(min(1.0, beat / 2))
        now = read(directory)
        if now is None and not exists(directory / FILE):
            return other
        if now is not None and now != other:
            raise ConfigError(_refusal(directory, now))
    return other


def _refusal(directory: epath.Path, other: dict[str, Any]) -> str:
    return (
        f"process {other.get('process')} on {other.get('host')} is training in {directory}; "
        "wait until it has ended, or use another --run-dir"
    )


def _is_alive(claim: dict[str, Any]) -> bool:
    """Whether a process of this host is still there, and no other one has its number."""
    process = claim.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # It is another user's.
        pass
    return _started(process) == claim.get("started")


def _namespace() -> str | None:
    """Where this process's number is valid; containers on one host may share its name alone."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _started(process: int) -> int | None:
    """When a process started, in the kernel's ticks; None where the system doesn't say."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold spaces.
    return int(text.rpartition(")")[2].split()[19])
