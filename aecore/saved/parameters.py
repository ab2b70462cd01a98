"""A network's parameters by name, and the model that they fit."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from aecore.errors import CheckpointError, ConfigError
from aecore.saved.descriptions import Description


def registered(description: Description) -> Any:
    from aecore import models

    name = (description.model or {}).get("type", "unnamed")
    if name not in models.REGISTRY:
        raise CheckpointError(
            f"it holds parameters alone, and their model {name!r:.40} is not known; pass it as "
            "model=, or export the network with its functions (--format stablehlo)"
        )
    try:
        return description.build_model()
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def fitting(model: Any, params: Any) -> Any:
    """The model, if it takes such parameters."""
    from aecore.networks.base import abstract_params

    size = (8 * model.stride, 8 * model.stride, model.channels)
    expected = flatten(abstract_params(model, size))
    given = flatten(params)
    for name in sorted(expected.keys() | given.keys()):
        shapes = [tree[name].shape if name in tree else None for tree in (expected, given)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} has shape {shapes[1]} in the file and {shapes[0]} in "
                f"{type(model).__name__}; use the model that the file was made with"
            )
    return model


def flatten(params: Any) -> dict[str, Any]:
    """Nested dictionaries as one, with names such as `encoder_0/kernel`."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat["/".join(str(key.key) for key in path)] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)[last] = leaf
    return params
