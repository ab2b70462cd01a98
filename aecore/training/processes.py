"""Several processes that train together: they meet, agree, and notice when one is gone.

JAX waits in silence for a process that doesn't come, trains on when settings differ, and ends with
a page of C++ when a process is lost. So each process first connects to the first one, at the
address that JAX will use, and keeps this connection as a sign of life. Messages are lines of JSON.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from etils import epath
from tqdm import tqdm

import aecore
from aecore import interrupts
from aecore.config import Experiment, Training, settings
from aecore.errors import AecoreError, ConfigError, Interrupted, ProcessError, SavingError
from aecore.saved.descriptions import changes, describe, experiment_from_json
from aecore.storage import reason
from aecore.training import claim

_log = logging.getLogger(__name__)

_REPORT_EVERY = 30.0
"""Seconds between lines that say who has come."""

_GRACE = 5.0
"""Seconds after the loss of a process until this one ends, if nothing else ended it before."""

_SEEN_WITHIN = 20.0
"""Seconds until what one host has written is seen by the others, with caches between them."""

_CAUSES = (
    "start the same command on every host, open the port in the firewall of the first one, and "
    "install the same JAX everywhere"
)

_group: "Group | None" = None


def join(training: Training) -> None:
    """Connects this process with the others of a training; must be called before JAX is used.

    Raises:
      ConfigError: no cluster is found; versions or counts differ.
      ProcessError: not all processes came in time.
    """
    global _group
    if training.distributed is None or jax.distributed.is_initialized():
        return
    place = _place(training)
    if place.count == 1:
        return
    links = _await_others(place) if place.index == 0 else {0: _reach_first(place)}
    _group = Group(place, links, training.loss_timeout)
    with _ending_together(_group):
        keeper = _start_coordinator(place, training) if place.index == 0 else None
        _group.gather("ready")
        try:
            jax.distributed.initialize(
                place.address,
                place.count,
                place.index,
                local_device_ids=place.local_devices,
                initialization_timeout=int(training.join_timeout) + 1,
                heartbeat_timeout_seconds=_heartbeat(training),
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


# ---- The connections


class _Link:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, host: str):
        connection.settimeout(None)
        self.host = host
        self.heard = time.monotonic()
        """When the last message came."""
        self.left = False
        """Whether the other process has said that it ends."""
        self.connection = connection
        self.lines = connection.makefile("r", encoding="utf-8")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        # If the other end is gone, whoever reads from it notices.
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall((json.dumps(message) + "\n").encode())


class Group:
    """The processes of a training, each of which knows at once when another is gone.

    Args:
      place: this process's.
      links: by the index of the process at the other end. The first process has one to each other,
        which have one to it.
      timeout: seconds without a sign of life after which a process counts as gone.
    """

    def __init__(self, place: "_Place", links: Mapping[int, _Link], timeout: float):
        self.index, self.count = place.index, place.count
        self._links = links
        self._timeout = timeout
        self._changed = threading.Condition()
        self._gathering: dict[int, dict[int, Any]] = {}
        self._gathered: dict[int, list[Any]] = {}
        self._rounds = itertools.count()
        self._loss: str | None = None
        self._leaving = False
        for peer in links:
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; all must call this equally often.

        Raises:
          ProcessError: a process is gone.
        """
        number = next(self._rounds)
        if self.index == 0:
            self._put(number, 0, value)
        else:
            self._links[0].send(round=number, value=value)
        with self._changed:
            self._changed.wait_for(lambda: number in self._gathered or self._has_ended())
            if number not in self._gathered:
                raise ProcessError(self._loss or "another process has ended")
            return self._gathered.pop(number)

    def wait_for_loss(self, seconds: float) -> str | None:
        """What is known of a lost process by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._loss is not None, seconds)
            return self._loss

    def leave(self, why: str | None) -> None:
        """Tells the others that this process ends.

        Args:
          why: what failed, which ends the others too; None: it is done.
        """
        with self._changed:
            self._leaving = True
        for link in self._links.values():
            link.send(left=why)

    def _has_ended(self) -> bool:
        return self._loss is not None or any(link.left for link in self._links.values())

    def _put(self, number: int, index: int, value: Any) -> None:
        with self._changed:
            values = self._gathering.setdefault(number, {})
            values[index] = value
            if len(values) < self.count:
                return
            del self._gathering[number]
            found = [values[index] for index in range(self.count)]
            self._gathered[number] = found
            self._changed.notify_all()
        for link in self._links.values():
            link.send(round=number, values=found)

    def _read(self, peer: int) -> None:
        link = self._links[peer]
        with contextlib.suppress(OSError, ValueError):
            for line in link.lines:
                link.heard = time.monotonic()
                self._receive(peer, json.loads(line))
        if not link.left:
            self._lose(peer, f"process {peer} (on {link.host}) is gone")

    def _receive(self, peer: int, message: Mapping[str, Any]) -> None:
        if "value" in message:
            self._put(message["round"], peer, message["value"])
        elif "values" in message:
            with self._changed:
                self._gathered[message["round"]] = message["values"]
                self._changed.notify_all()
        elif "lost" in message:
            self._lose(peer, message["lost"])
        elif "left" in message:
            self._links[peer].left = True
            if message["left"] is not None:
                self._lose(peer, f"process {peer} failed: {message['left']}")
            with self._changed:
                self._changed.notify_all()

    def _beat(self) -> None:
        """Sends signs of life, and misses those of others."""
        while not self._leaving:
            for peer, link in self._links.items():
                link.send()
                if time.monotonic() - link.heard > self._timeout and not link.left:
                    what = f"process {peer} (on {link.host})"
                    self._lose(peer, f"{what} has given no sign of life for {self._timeout:g} s")
            time.sleep(min(5.0, self._timeout / 6))

    def _lose(self, peer: int, what: str) -> None:
        with self._changed:
            if self._leaving or self._loss is not None:
                return
            self._loss = f"{what}; the same command on all hosts resumes from the last checkpoint"
            self._changed.notify_all()
        for other, link in self._links.items():
            if other != peer:
                link.send(lost=what)
        # The main thread may wait for the lost process forever.
        timer = threading.Timer(_GRACE, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if self._leaving:
            return
        tqdm.write(f"error: {self._loss}", file=sys.stderr)
        interrupts.end_at_once(ProcessError.exit_status)


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
        loss = None if is_own else group.wait_for_loss(_GRACE)
        group.leave(loss or reason(error))
        if loss is None or not isinstance(error, Exception):
            raise
        raise ProcessError(loss) from error


def _leave(group: Group, coordinator: subprocess.Popen | None) -> None:
    group.leave(None)
    if coordinator is not None and coordinator.stdin is not None:
        with contextlib.suppress(OSError):
            coordinator.stdin.write(b"leaving\n")
            coordinator.stdin.flush()


# ---- Meeting


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a process stands among the others."""

    host: str
    """Of the first process."""
    port: int
    count: int
    index: int
    timeout: float
    """Seconds to wait for the others."""
    local_devices: Sequence[int] | None = None
    """Which of the host's devices are this process's; None: JAX decides."""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def _place(training: Training) -> _Place:
    distributed, limit = training.distributed, training.join_timeout
    assert distributed is not None
    local = None
    if distributed != "auto":
        address, count, index = distributed.split(",")
    else:
        # JAX detects a cluster only while it connects, which it does in silence.
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        try:
            address, count, index, local = detect(None, None, None, None, None, int(limit))
        except Exception as error:  # Of a cluster's own services, any.
            raise ConfigError(
                f"training.distributed auto: the cluster can't be asked ({reason(error)}); "
                "use HOST:PORT,COUNT,INDEX"
            ) from error
        if address is None or count is None or index is None:
            raise ConfigError(
                "training.distributed auto: this is no cluster that JAX knows; "
                "use HOST:PORT,COUNT,INDEX"
            )
    host, _, port = address.rpartition(":")
    return _Place(host, int(port), int(count), int(index), limit, local)


_SAME = ("aecore", "jax", "count")
"""What all processes must say alike."""


def _hello(place: _Place) -> dict[str, Any]:
    return {
        "aecore": aecore.__version__,
        "jax": jax.__version__,
        "count": place.count,
        "index": place.index,
        "host": socket.gethostname(),
    }


def _await_others(place: _Place) -> dict[int, _Link]:
    """The first process's links to all others, once they have come."""
    start = reported = time.monotonic()
    links: dict[int, _Link] = {}
    with _server(place.port) as server:
        while missing := [i for i in range(1, place.count) if i not in links]:
            waited = time.monotonic() - start
            names = ", ".join(map(str, missing))
            if waited > place.timeout:
                _refuse(
                    links,
                    f"of {place.count} processes, {names} did not come to {place.address} within "
                    f"{place.timeout:g} s; {_CAUSES}",
                )
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                line = (
                    f"{len(links) + 1} of {place.count} processes have come after "
                    f"{waited:.0f} s; waiting for {names}"
                )
                _log.warning(line)
                for link in links.values():
                    link.send(waiting=line)
            if select.select([server], [], [], 0.2)[0]:
                _welcome(server.accept()[0], place, links)
            # One that ended meanwhile may be started again.
            for index in [i for i, link in links.items() if _is_closed(link)]:
                del links[index]
    for link in links.values():
        link.send(welcome=True)
    return links


def _server(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"port {port} can't be used ({reason(error)}); if another training uses it, "
            "choose another one in --training.distributed, in all processes"
        ) from error


def _welcome(connection: socket.socket, place: _Place, links: dict[int, _Link]) -> None:
    """Adds the link of a process that has come; connections that aren't ours are closed."""
    connection.settimeout(5.0)
    own = _hello(place)
    try:
        with connection.makefile("r", encoding="utf-8") as lines:
            hello = json.loads(lines.readline(4096))
        index, host = hello["index"], str(hello["host"])
        differing = [f"{k} {hello[k]} (process 0: {own[k]})" for k in _SAME if hello[k] != own[k]]
    except (OSError, ValueError, LookupError, TypeError):
        connection.close()
        return
    link = _Link(connection, host)
    if differing:
        _refuse({**links, -1: link}, f"process {index} on {host} has {', '.join(differing)}")
    if index in links or not 0 < index < place.count:
        what = f"two processes have the index {index}, on {host} and "
        other = links[index].host if index in links else own["host"]
        _refuse({**links, -1: link}, f"{what}{other}; give each its own, from 0")
    links[index] = link


def _is_closed(link: _Link) -> bool:
    readable = select.select([link.connection], [], [], 0)[0]
    with contextlib.suppress(OSError):
        return bool(readable) and not link.connection.recv(1, socket.MSG_PEEK)
    return True


def _refuse(links: Mapping[int, _Link], why: str) -> NoReturn:
    for link in links.values():
        link.send(refused=why)
    raise ProcessError(why)


def _reach_first(place: _Place) -> _Link:
    """Another process's link to the first, once all have come."""
    start = reported = time.monotonic()
    problem = "no answer"
    while (waited := time.monotonic() - start) < place.timeout:
        if time.monotonic() - reported > _REPORT_EVERY:
            reported = time.monotonic()
            _log.warning(
                "process %d can't reach process 0 at %s after %.0f s (%s)",
                place.index,
                place.address,
                waited,
                problem,
            )
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5.0)
        except OSError as error:
            problem = reason(error)
            time.sleep(0.2)
            continue
        link = _Link(connection, place.host)
        connection.settimeout(3 * _REPORT_EVERY)
        link.send(**_hello(place))
        with contextlib.suppress(OSError, ValueError):
            while message := json.loads(link.lines.readline() or "null"):
                reported = time.monotonic()
                if "welcome" in message:
                    connection.settimeout(None)
                    return link
                if "refused" in message:
                    raise ProcessError(message["refused"])
                _log.warning(message["waiting"])
        problem = "it ended while it waited for others"
        time.sleep(0.2)
    raise ProcessError(
        f"process {place.index} could not reach process 0 at {place.address} within "
        f"{place.timeout:g} s ({problem}); {_CAUSES}"
    )


def _start_coordinator(place: _Place, training: Training) -> subprocess.Popen:
    """Starts JAX's coordination service on this host."""
    module = "aecore.training.coordinator"
    words = [sys.executable, "-m", module, f"[::]:{place.port}", str(place.count)]
    process = subprocess.Popen(
        [*words, str(_heartbeat(training))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in a terminal is for the training.
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != b"ready":
        raise ConfigError(
            f"JAX's coordination service can't use port {place.port}; choose another one in "
            "--training.distributed, in all processes"
        )
    return process


def _heartbeat(training: Training) -> int:
    """Seconds after which JAX itself gives a process up: later than this module does."""
    return int(2 * training.loss_timeout + 60)


# ---- Agreeing


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
