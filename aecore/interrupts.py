"""Ctrl-C and SIGTERM end a command in one line, from its first imports on."""

import atexit
import functools
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

STATUS = 130
"""Exit status of a command that was interrupted."""

_requested = False


def end_if_requested() -> None:
    """Ends the process if a request to stop was swallowed by what ran then, such as an import."""
    if _requested:
        _end()


def ignore_at_exit() -> None:
    """When Python shuts down, nothing is left to be stopped; to be called when the work is done."""
    atexit.register(_ignore)


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    # An exception within an import may crash libraries that are being loaded.
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _uncaught(before: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # An import that is interrupted may fail with an error of its own.
    if _requested or issubclass(kind, KeyboardInterrupt):
        _end()
    before(kind, error, trace)


def _unraisable(before: Any, about: Any) -> None:
    if not issubclass(about.exc_type, KeyboardInterrupt):
        before(about)


def end_at_once(status: int) -> NoReturn:
    """Ends the process from any thread, without Python's cleanup."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end() -> NoReturn:
    print("interrupted", file=sys.stderr)
    end_at_once(STATUS)


def install() -> None:
    """Has Ctrl-C and SIGTERM end this process so; a command calls it before its long imports."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == usual:  # Else the program has its own way.
            signal.signal(number, _interrupt)
    sys.excepthook = functools.partial(_uncaught, sys.excepthook)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
