"""Keeps the chatter of native libraries off the terminal."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax


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


def ignore_absent_tpu() -> None:
    """Keeps JAX from trying a TPU where libtpu is installed, as a compiler, but no TPU is there.

    libtpu would complain on stderr. Must be called before JAX is used; does nothing if
    `JAX_PLATFORMS` is set.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return
    gpu = "cuda,cpu" if Path("/dev/nvidia0").exists() else "cpu"
    jax.config.update("jax_platforms", gpu)
