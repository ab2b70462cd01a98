"""TensorFlow, imported where it is first needed and kept away from the accelerators."""

import contextlib
import functools
import os

from aecore.errors import DataError
from aecore.terminal import silent_stderr


@functools.cache
def import_tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        # Before it has set up its log, TensorFlow ignores that level.
        with silent_stderr():
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
