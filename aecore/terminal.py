"""Keeps the chatter of native libraries off the terminal."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drops what native code writes to the standard error stream."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
