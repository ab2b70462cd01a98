"""Where a trained network comes from: a run directory, an exported file, or aecore itself."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from aecore.errors import CheckpointError
from aecore.saved import exported
from aecore.saved.descriptions import Description

NAMES: Mapping[str, str] = {
    "fashion-mnist-denoise": "d9bde09ac9599da285bf5ff9ad6a85170a00abd4e6fe22b57907f82df5756217",
    "lfw-enhance": "b872aceac8bb2a80499d98a174b2aa2b5c2ad38ad6acdb47d6b01396ea2256f6",
}
"""Weights that ship with aecore, and the SHA-256 of their files."""

_FOLDER = epath.resource_path("aecore.saved") / "pretrained"


def load(source: str | os.PathLike, *, model: Any = None) -> tuple[Any, Any, Description]:
    """Loads a network's parameters, on the default device where they come from a run.

    Args:
      source: a run directory, local or `gs://`; an exported file; or one of `NAMES`.
      model: needed if a run's model is not in `aecore.models.REGISTRY`.

    Returns:
      The model or `aecore.networks.Network`, its parameters, and its description.

    Raises:
      CheckpointError: there is nothing that can be used, or its model is unknown.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise CheckpointError(f"{source!r} names no run directory, exported file, or weights")
    path = epath.Path(source).expanduser()
    if not path.exists() and str(source) in NAMES:
        shipped = _FOLDER / f"{source}{exported.SUFFIX}"
        return exported.load(shipped, sha256=NAMES[str(source)])
    if path.is_file():
        return exported.load(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} does not exist; name a run directory, a file that `aecore export` wrote, "
            f"or one of {', '.join(NAMES)}"
        )
    return _of_run(path, model)


def _of_run(run: epath.Path, model: Any) -> tuple[Any, Any, Description]:
    from aecore.errors import ConfigError
    from aecore.saved import checkpoints
    from aecore.steps import state

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def build_model(description):
        try:
            return description.build_model() if model is None else model
        except ConfigError as error:
            raise CheckpointError(f"{run}: {error}") from error

    def abstract(description):
        shape = (*description.image_size, description.channels)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            state.abstract_params(build_model(description), shape),
        )

    params, description = checkpoints.load(run, abstract)
    return build_model(description), params, description
