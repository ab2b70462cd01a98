"""How the processes of a training find each other.

JAX waits in silence for a process that doesn't come. So each process first connects to the first
one, at the address that JAX will use, and keeps this connection.
"""

import contextlib
import dataclasses
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax

import aecore
from aecore.config import Training
from aecore.errors import ConfigError, ProcessError
from aecore.storage import reason
from aecore.training.group import Link

_log = logging.getLogger(__name__)

_REPORT_EVERY = 30.0
"""Seconds between lines that say who has come."""

_CAUSES = (
    "start the same command on every host, open the port in the firewall of the first one, and "
    "install the same JAX everywhere"
)


@dataclasses.dataclass(frozen=True)
class Place:
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


def place(training: Training) -> Place:
    """Where `training.distributed` puts this process.

    Raises:
      ConfigError: no cluster is found.
    """
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
    return Place(host, int(port), int(count), int(index), limit, local)


def meet(place: Place) -> dict[int, Link]:
    """This process's links, once all have come: of the first to all others, of those to it.

    Raises:
      ConfigError: the port can't be used.
      ProcessError: not all came in time; versions or counts differ.
    """
    return _await_others(place) if place.index == 0 else {0: _reach_first(place)}


_SAME = ("aecore", "jax", "count")
"""What all processes must say alike."""


def _hello(place: Place) -> dict[str, Any]:
    return {
        "aecore": aecore.__version__,
        "jax": jax.__version__,
        "count": place.count,
        "index": place.index,
        "host": socket.gethostname(),
    }


def _await_others(place: Place) -> dict[int, Link]:
    """The first process's links to all others, once they have come."""
    start = reported = time.monotonic()
    links: dict[int, Link] = {}
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
        # Python's own words repeat themselves.
        why = os.strerror(error.errno) if error.errno else reason(error)
        raise ConfigError(
            f"port {port} can't be used ({why}); if another training uses it, "
            "choose another one in --training.distributed, in all processes"
        ) from error


def _welcome(connection: socket.socket, place: Place, links: dict[int, Link]) -> None:
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
    link = Link(connection, host)
    if differing:
        _refuse({**links, -1: link}, f"process {index} on {host} has {', '.join(differing)}")
    if index in links or not 0 < index < place.count:
        what = f"two processes have the index {index}, on {host} and "
        other = links[index].host if index in links else own["host"]
        _refuse({**links, -1: link}, f"{what}{other}; give each its own, from 0")
    links[index] = link


def _is_closed(link: Link) -> bool:
    readable = select.select([link.connection], [], [], 0)[0]
    with contextlib.suppress(OSError):
        return bool(readable) and not link.connection.recv(1, socket.MSG_PEEK)
    return True


def _refuse(links: Mapping[int, Link], why: str) -> NoReturn:
    for link in links.values():
        link.send(refused=why)
    raise ProcessError(why)


def _reach_first(place: Place) -> Link:
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
        link = Link(connection, place.host)
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


def start_coordinator(place: Place, training: Training) -> subprocess.Popen:
    """Starts JAX's coordination service on this host."""
    module = "aecore.training.coordinator"
    words = [sys.executable, "-m", module, f"[::]:{place.port}", str(place.count)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [*words, str(heartbeat(training))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            # Ctrl-C in a terminal is for the training.
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            process.kill()
            process.wait()
            said.seek(0)
            why = (said.read().strip().splitlines() or ["it says nothing"])[-1]
            raise ConfigError(
                f"JAX's coordination service can't start at port {place.port} ({why}); if another "
                "program uses the port, choose another one in --training.distributed, in all "
                "processes"
            )
    return process


def heartbeat(training: Training) -> int:
    """Seconds after which JAX itself gives a process up: later than `group` does."""
    return int(2 * training.loss_timeout + 60)
