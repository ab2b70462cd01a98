"""TensorFlow, imported where it is first needed and kept away from the accelerators."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aecore.errors import DataError

_importing = threading.Lock()


def import_tensorflow():
    # The standard error stream belongs to all threads, so two must not silence it at once.
    with _importing:
        return _import()


@functools.cache
def _import():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        # Before it has set up its log, TensorFlow ignores that level.
        with _silent_stderr():
            with _without_keras():
                import tensorflow as tf

            # JAX owns the accelerators: TensorFlow would reserve their memory. A program that
            # has already used TensorFlow has made its own choice.
            with contextlib.suppress(RuntimeError):
                for kind in ("GPU", "TPU"):
                    tf.config.set_visible_devices([], kind)
    except ImportError as error:
        raise DataError(
            f"images are streamed with tensorflow, which can't be imported ({error}); "
            "install tensorflow-cpu"
        ) from error
    return tf


class Callbacks:
    """Python functions for tf.data to call, which TensorFlow doesn't keep when they are closed.

    TensorFlow (2.21) keeps what `tf.numpy_function` was given for as long as the process lives, and
    with it all that the function refers to, such as a dataset.
    """

    def __init__(self):
        self._functions: list[Callable[..., Any]] = []

    def add(self, function: Callable[..., Any], kinds: Any) -> Callable[..., Any]:
        """A function of tensors, to be called while a pipeline is built.

        Args:
          function: takes and gives NumPy arrays.
          kinds: of what it gives: a `tf.DType`, or a list of several.
        """
        tf = import_tensorflow()
        place = len(self._functions)
        self._functions.append(function)

        def call(*arrays):
            return self._functions[place](*arrays)

        return lambda *tensors: tf.numpy_function(call, tensors, kinds, stateful=False)

    def close(self) -> None:
        """Lets go of the functions; the iterators that call them must be gone."""
        self._functions.clear()


def untuned(dataset: Any) -> Any:
    """A `tf.data.Dataset` without the thread that tunes how parallel it is.

    That thread sleeps for up to a minute at a time. When an iterator goes, TensorFlow (2.21) wakes
    it and waits for its end; about one time in eight the thread misses the call and sleeps on, and
    all of Python waits as long.
    """
    options = import_tensorflow().data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Spares TensorFlow loading Keras, a third of its import, whose optimizers it looks for.

    It does without them where there is no Keras. Whoever uses `tf.keras` loads it then.
    """
    name = "keras.src.optimizers"
    if "keras" in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what native code writes to the standard error stream; Python's own lines still come."""
    # It stays open: what is imported meanwhile may hold on to it.
    own, before = os.fdopen(os.dup(2), "w", buffering=1), sys.stderr
    if _is_standard_error(before):
        sys.stderr = own
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own.fileno(), 2)
        if sys.stderr is own:
            sys.stderr = before


def _is_standard_error(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # Notebooks and tests have streams of their own.
        return False
