"""The processes of a training, each of which knows at once when another is gone."""

import contextlib
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from aecore import interrupts
from aecore.errors import ProcessError

GRACE = 5.0
"""Seconds after the loss of a process until this one ends, if nothing else ended it before."""

ADVICE = "the same command on all hosts resumes from the last checkpoint"
"""What to do where a process is lost."""


class Link:
    """A connection to another process; messages are lines of JSON."""

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
    """This process's links to the others, which are also their signs of life.

    Args:
      index: this process's.
      count: of the processes.
      links: by the index of the process at the other end. The first process has one to each other,
        which have one to it.
      timeout: seconds without a sign of life after which a process counts as gone.
    """

    def __init__(self, index: int, count: int, links: Mapping[int, Link], timeout: float):
        self.index, self.count = index, count
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
          why: what happened to it, such as `failed: …`, which ends the others too; None: it is
            done.
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
            self._lose(peer, f"process {peer} (on {link.host}) is gone; {ADVICE}")

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
                self._lose(peer, f"process {peer} {message['left']}")
            with self._changed:
                self._changed.notify_all()

    def _beat(self) -> None:
        """Sends signs of life, and misses those of others."""
        while not self._leaving:
            for peer, link in self._links.items():
                link.send()
                if time.monotonic() - link.heard > self._timeout and not link.left:
                    what = f"process {peer} (on {link.host}) has given no sign of life for"
                    self._lose(peer, f"{what} {self._timeout:g} s; {ADVICE}")
            time.sleep(min(5.0, self._timeout / 6))

    def _lose(self, peer: int, what: str) -> None:
        with self._changed:
            if self._leaving or self._loss is not None:
                return
            self._loss = what
            self._changed.notify_all()
        for other, link in self._links.items():
            if other != peer:
                link.send(lost=what)
        # The main thread may wait for the lost process forever.
        timer = threading.Timer(GRACE, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if self._leaving:
            return
        tqdm.write(f"error: {self._loss}", file=sys.stderr)
        interrupts.end_at_once(ProcessError.exit_status)
