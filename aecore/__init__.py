"""Convolutional autoencoders that restore degraded images, in JAX."""

import importlib
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aecore.config import Data, Experiment, Optimizer, Training
    from aecore.restoring.kept import restore
    from aecore.restoring.restorer import Restorer
    from aecore.scoring.evaluate import evaluate
    from aecore.training.loop import train

__version__ = "0.1.0"

# Without a handler of the program's own, nothing is printed.
logging.getLogger("aecore").addHandler(logging.NullHandler())

# Otherwise etils reads `gs://` with TensorFlow, where that is installed: it would be imported to
# restore a picture, tells errors apart by their text, and can't be pointed to another server.
# It looks once, at its first path.
os.environ.setdefault("EPATH_USE_TF", "false")

# Names are resolved at first use, so that `import aecore` costs nothing and each program
# imports only what it needs of JAX, orbax and TensorFlow.
_HOME = {
    "Data": "config",
    "Experiment": "config",
    "Optimizer": "config",
    "Training": "config",
    "Restorer": "restoring.restorer",
    "restore": "restoring.kept",
    "evaluate": "scoring.evaluate",
    "train": "training.loop",
}

__all__ = [
    "Data",
    "Experiment",
    "Optimizer",
    "Restorer",
    "Training",
    "config",
    "degradations",
    "errors",
    "evaluate",
    "losses",
    "metrics",
    "models",
    "ray",
    "restore",
    "train",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"aecore.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"aecore.{name}")
    raise AttributeError(f"module 'aecore' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
