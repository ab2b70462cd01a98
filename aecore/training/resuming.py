"""Checks that a run directory may be resumed with an experiment."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from aecore.config import Experiment
from aecore.config.settings import OnResume, on_resume
from aecore.errors import CheckpointError, ConfigError
from aecore.saved import checkpoints
from aecore.saved.descriptions import Description, changes, experiment_from_json
from aecore.storage import exists
from aecore.training import assembly, claim

_WRITTEN = (
    "experiment.json",
    claim.FILE,
    "metrics.jsonl",
    "summary.json",
    "samples.png",
    "curves.png",
    "example.png",
)
"""Files that a run writes, and replaces if they exist."""


def check_directory(experiment: Experiment, directory: epath.Path) -> None:
    """Refuses a run directory of another experiment, by its `experiment.json`.

    Raises:
      CheckpointError: names the settings that differ and mustn't.
      ConfigError: it is the folder of something else, of which the run would replace a file.
    """
    _check_files(directory)
    path = directory / "experiment.json"
    if not (path.exists() and checkpoints.exists(directory)):
        return
    try:
        _check(json.loads(path.read_text()), experiment, directory)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not describe an experiment ({error}); use another --run-dir"
        ) from error


def _check_files(directory: epath.Path) -> None:
    """Refuses a folder in which no run has begun if it holds a file that a run would replace."""
    # A run makes this folder first, and then its claim, as buckets have no empty folders.
    if exists(directory / "checkpoints") or claim.read(directory) is not None:
        return
    if _describes_experiment(directory / "experiment.json"):  # Checkpoints may have been removed.
        return
    for name in _WRITTEN:
        if exists(directory / name):
            raise ConfigError(
                f"{directory} holds {name}, which is not of a run; use another --run-dir"
            )


def _describes_experiment(path: epath.Path) -> bool:
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and {"model", "training"} <= described.keys()


def check_run(
    saved: Description,
    now: Description,
    experiment: Experiment,
    directory: epath.Path,
    images: int,
) -> None:
    """Refuses a checkpoint of another experiment, by what it says of itself.

    Args:
      saved: the checkpoint's description.
      now: that of the experiment.
      experiment: to be trained.
      directory: of the run, for messages.
      images: how many there are for training.

    Raises:
      CheckpointError: it was trained with other settings or on other images, or its finished steps
        would have had other learning rates.
    """
    old = _check(saved.to_json(), experiment, directory)
    if saved.random_streams != now.random_streams:
        raise CheckpointError(
            f"{directory} was trained by aecore {saved.aecore}, which drew other random numbers, "
            "and can't be resumed exactly; restore with it, or train anew in another --run-dir"
        )
    if saved.fingerprint != now.fingerprint:
        raise CheckpointError(
            f"{directory} was trained on other images ({saved.fingerprint}, now "
            f"{now.fingerprint}); bring them back, or use another --run-dir"
        )
    before, after = (_rates(e, images, saved.step or 0) for e in (old, experiment))
    differing = np.flatnonzero(before != after)
    if differing.size:
        step = int(differing[0])
        raise CheckpointError(
            f"{directory} was to end at step {old.training.last_step(images)}, now at "
            f"{experiment.training.last_step(images)}: with this schedule, the learning rate of "
            f"step {step + 1} would have been {after[step]:.3g}, not {before[step]:.3g}; "
            "use another --run-dir, or the --training.epochs and --training.steps it was made with"
        )


def _check(saved: Mapping[str, Any], experiment: Experiment, directory: epath.Path) -> Experiment:
    """The saved experiment; refuses one that differs in what a resumed run may not change."""
    old = experiment_from_json(saved, like=experiment.model)
    differing = [
        f"{name}: {before} -> {after}"
        for name, field, before, after in changes(old, experiment)
        if on_resume(field) is OnResume.FIXED
    ]
    if differing:
        raise CheckpointError(
            f"{directory} holds a different experiment ({'; '.join(differing)}); "
            "use another --run-dir, or the settings it was made with"
        )
    return old


def _rates(experiment: Experiment, images: int, steps: int) -> np.ndarray:
    """The learning rates of the first steps, `(steps,)` float32."""
    rate = assembly.learning_rate(experiment.optimizer, experiment.training.last_step(images))
    if not callable(rate):
        return np.full(steps, rate, np.float32)
    return np.asarray(rate(jnp.arange(steps)), np.float32)
