"""Ctrl-C and SIGTERM as a request to stop."""

import signal
import threading
import time


class Interruption:
    """Turns SIGINT and SIGTERM into a request to stop.

    A second Ctrl-C stops at once, or after the compilation that is under way.
    """

    def __init__(self):
        self.requested = False
        self.why: str | None = None
        """What went wrong, if a stop is asked for because of that."""
        self._first = 0.0
        self._previous = {}

    def __enter__(self) -> "Interruption":
        # Python allows this in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def request(self, why: str) -> None:
        """Asks for a stop because something went wrong."""
        self.why = why
        self.requested = True

    def _handle(self, number, frame) -> None:
        del frame
        now = time.monotonic()
        # A terminal and a wrapper script may both deliver the same Ctrl-C.
        if self.requested and number == signal.SIGINT and now > self._first + 1:
            raise KeyboardInterrupt
        if not self.requested:
            self._first = now
        self.requested = True
