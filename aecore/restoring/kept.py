"""`aecore.restore`: a function that keeps the networks that it has loaded."""

import os
import threading
from typing import Any, NamedTuple

from aecore.restoring import engine
from aecore.restoring.restorer import Restorer
from aecore.saved import weights


class _Kept(NamedTuple):
    """A restorer that `restore` made."""

    version: weights.Version
    model: Any
    restorer: Restorer


_MOST_KEPT = 4
"""Restorers that are kept for the next calls of `restore`."""

_kept: list[_Kept] = []  # The last one was used last.
_kept_lock = threading.Lock()


def _kept_restorer(source: str | os.PathLike, model: Any) -> Restorer:
    engine.refuse_fork()
    with _kept_lock:
        # Taken before loading, so that what changes meanwhile is loaded again next time.
        version = weights.version(source)
        found = [kept for kept in _kept if (kept.version, kept.model) == (version, model)]
        new = found[0] if found else _Kept(version, model, Restorer.load(source, model=model))
        others = [k for k in _kept if (k.version.path, k.model) != (version.path, model)]
        _kept[:] = [*others, new][-_MOST_KEPT:]
        return new.restorer


def restore(image: Any, run: str | os.PathLike, *, model: Any = None, strength: float = 1.0) -> Any:
    """Restores an image with a trained network.

    The last few networks are kept, and loaded again when their files have changed. To choose tiles,
    precision or device, or consistent results, use a `Restorer`.

    Args:
      image: what `Restorer` takes.
      run: a run directory, an exported file, or a name of weights, as `Restorer.load` takes it.
      model: needed if a run's model is not in `aecore.models.REGISTRY`.
      strength: how much of the correction is applied, from 0 to 1, as for `Restorer`.

    Returns:
      The same kind, dtype and shape; for a path, a Pillow image.

    Raises:
      CheckpointError: the run has no usable checkpoint.
      ConfigError: `strength` is out of bounds.
      ImageError: the image can't be read, or doesn't fit the model; or it is a file with colour,
        or gray with alpha, of 16 bits, which Pillow's images can't hold. Restore the array
        `aecore.media.images.read_picture(path).frames[0].values` then.
    """
    return _kept_restorer(run, model).with_strength(strength)(image)
