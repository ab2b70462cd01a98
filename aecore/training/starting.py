"""Starting a training from the parameters of an earlier one."""

import dataclasses
from typing import Any

import jax

from aecore.config import Experiment
from aecore.errors import CheckpointError, ConfigError
from aecore.networks.base import abstract_params, hyperparameters
from aecore.saved import weights
from aecore.saved.checkpoints import exists
from aecore.saved.descriptions import describe_model, model_changes
from aecore.saved.trained import TrainedNetwork
from aecore.training import processes


def with_its_network(experiment: Experiment, default: Any) -> Experiment:
    """The experiment with the model settings of the network that it starts from.

    Settings that differ from the default model's were chosen. If they are not the network's, or it
    can't be loaded, nothing changes here; training then reports the error. A run that has begun
    keeps its own model.

    Args:
      experiment: what to train.
      default: the model that it had before anything was chosen.
    """
    source, model = experiment.training.start_from, experiment.model
    if source is None:
        return experiment
    processes.join(experiment.training)  # Before reading a checkpoint uses JAX.
    try:
        run = experiment.directory
        before = weights.load(run if exists(run) else source).description.build_model()
    except (CheckpointError, ConfigError):
        return experiment
    if not (type(before) is type(model) is type(default)):
        return experiment
    old, new, usual = map(hyperparameters, (before, model, default))
    chosen = {name: value for name, value in new.items() if value != usual[name]}
    if any(old[name] != value for name, value in chosen.items()):
        return experiment
    return dataclasses.replace(experiment, model=before)


def load(experiment: Experiment) -> TrainedNetwork | None:
    """What `training.start_from` names, or None if it is None.

    Raises:
      ConfigError: there is no such network, or it is not the experiment's.
    """
    source, model = experiment.training.start_from, experiment.model
    if source is None:
        return None
    try:
        trained = weights.load(source)
        before = trained.description.build_model()
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"training.start_from {source}: {error}") from error
    differing = [f"{type(before).__name__} -> {type(model).__name__}"]
    if type(before) is type(model):
        differing = model_changes(describe_model(before), model)
    side = model.stride
    shapes = abstract_params(model, (side, side, model.channels))
    if not differing and _shapes(trained.params) != _shapes(shapes):
        differing = ["its parameters have other shapes"]
    if differing:
        raise ConfigError(
            f"training.start_from {source} is another network ({'; '.join(differing)}); "
            "use the same --model settings, or start from another one"
        )
    return trained


def describe(source: str, trained: TrainedNetwork) -> dict[str, Any]:
    """What a checkpoint says of what its training started from, as JSON values."""
    description = trained.description
    return {"source": source, "name": description.name, "step": description.step}


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), dict(params))
