"""Checkpoints of a run: parameters, optimizer state, and a JSON description of what they are.

The only module that imports orbax. A checkpoint is a folder `STEP/` with the items `params`, `ema`
(their average, if one is kept), `optimizer` (its state, and the step) and `description`. Orbax
commits it whole or not at all; checksums in the description tell bytes that changed afterwards,
which the array format doesn't.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from aecore import storage
from aecore.errors import CheckpointError, SavingError
from aecore.saved.descriptions import FILE_IN_CHECKPOINT, Description, model_changes
from aecore.steps.state import TrainState
from aecore.storage import absolute, to_path, write_whole

_log = logging.getLogger(__name__)


class UnfitError(ValueError):
    """A network can't have a checkpoint's parameters, whose names or shapes are others."""


def best_step(steps: Iterable[int], description: Description) -> int | None:
    """Of the steps that have a checkpoint, the one with the lowest validation loss."""
    available = set(steps)
    scored = [entry for entry in description.history if entry["step"] in available]
    return min(scored, key=lambda entry: entry["mse"])["step"] if scored else None


def exists(run: epath.PathLike) -> bool:
    """Whether a run directory holds a checkpoint, whole or not."""
    folder = to_path(run) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run, for the process that trains it.

    Args:
      directory: where they lie; made if missing.
      keep: how many of the newest to keep, besides the best by validation loss.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        self._policy = _NewestAndBest(keep)
        self._directory = absolute(directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True, preservation_policy=self._policy
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, SavingError):
            return  # Closing would fail for the same reason.
        with self._saving():
            self._manager.close()  # Waits for a save in progress.

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns whatever orbax and the file system raise into one line."""
        try:
            yield
        except Exception as error:
            raise SavingError(
                f"{self._directory}: a checkpoint can't be saved ({_reason(error)}); "
                "earlier ones are kept; fix that and run the same command again"
            ) from error

    def save(self, state: TrainState, description: Description) -> None:
        """Copies the state and saves it in the background.

        Of a checkpoint of the same step, saved before that step was evaluated, the description is
        written anew; its arrays are the same.

        Args:
          state: what to save, under `state.step`.
          description: of the run at this step.

        Raises:
          SavingError: this checkpoint, or the one before it, can't be written.
        """
        with self._saving():
            self._save(state, description)

    def _save(self, state: TrainState, description: Description) -> None:
        step = int(state.step)
        items = _items(state)
        checksums = {name: _checksum(tree) for name, tree in items.items()}
        description = dataclasses.replace(description, checksums=checksums)
        self._policy.description = description
        if step in self._manager.all_steps():
            self._manager.wait_until_finished()
            if _checksums(_read_description(self._manager, step)) != checksums:
                raise ValueError(f"there is one of step {step} with other arrays")
            # As one file, so that a process that is killed leaves the old one or the new one.
            file = self._directory / str(step) / FILE_IN_CHECKPOINT
            content = json.dumps(description.to_json()).encode()
            _on_first_process(lambda: write_whole(file, content))
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                description=ocp.args.JsonSave(description.to_json()),
            ),
            force=True,
        )

    def wait(self) -> None:
        """Returns when the last save is complete."""
        with self._saving():
            self._manager.wait_until_finished()

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, Description] | None:
        """The newest checkpoint that is whole.

        Damaged ones that are newer are named in a warning and set aside as `STEP.damaged`. One that
        only can't be read for the moment, as without a network, is not taken for damaged.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to.

        Returns:
          State and description, or None if there is no checkpoint.

        Raises:
          CheckpointError: there are checkpoints, and none of them can be restored, or the newest
            can't be read for the moment, or not by all processes.
        """
        restored, damaged = self._newest(abstract_state)
        step = restored[1].step if restored else None
        if any(other != step for other in _of_all_processes(step)):
            raise CheckpointError(
                f"not all processes read the same checkpoint in {self._directory}; see that they "
                "all use the same folder, and run the same command again"
            )
        if restored:
            _on_first_process(lambda: self._set_aside(damaged))
            self._manager.reload()
            self._policy.description = restored[1]
        elif damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} can be restored; they are damaged, "
                f"or of another model or optimizer ({_reason(damaged[0][1])}); "
                "move them away to start anew"
            )
        return restored

    def _newest(
        self, abstract_state: TrainState
    ) -> tuple[tuple[TrainState, Description] | None, list[tuple[int, Exception]]]:
        """What `restore` returns, and the newer ones that are damaged."""
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                description = _read_description(self._manager, step)
                items = _restore(self._manager, step, description, _items(abstract_state))
            except Exception as error:  # Each kind of damage fails differently within orbax.
                _check_is_damage(self._directory / str(step), error)
                damaged.append((step, error))
                continue
            state = TrainState(params=items["params"], ema=items.get("ema"), **items["optimizer"])
            return (state, description), damaged
        return None, damaged

    def _set_aside(self, damaged: Iterable[tuple[int, Exception]]) -> None:
        for step, error in damaged:
            folder = self._directory / str(step)
            _log.warning("%s; set aside", _damage(folder, error))
            name, count = f"{step}.damaged", 1
            while folder.with_name(name).exists():
                count += 1
                name = f"{step}.damaged-{count}"
            folder.rename(folder.with_name(name))


def _on_first_process(change: Callable[[], object]) -> None:
    """Changes files; returns in every process when it is done."""
    if jax.process_index() == 0:
        change()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("aecore checkpoint files")


def _of_all_processes(step: int | None) -> list[int | None]:
    if jax.process_count() == 1:
        return [step]
    steps = multihost_utils.process_allgather(np.int32(-1 if step is None else step))
    return [None if each < 0 else int(each) for each in steps]


def load(
    run: epath.PathLike, abstract_params: Callable[[Description], Any], model: Any = None
) -> tuple[Any, Description]:
    """Loads a run's best checkpoint, or its newest where none was evaluated; changes no file.

    A damaged checkpoint is named in a warning, and another one used.

    Args:
      run: a run directory.
      abstract_params: from a description, the shapes, dtypes and shardings of the parameters;
        UnfitError: the model can't have any.
      model: the network that they are of, if it was chosen by who loads the run.

    Returns:
      Parameters, averaged ones if the run kept an average, and description.

    Raises:
      CheckpointError: the run has no checkpoint, or none that is whole, or one can't be read for
        the moment; or the model is not the run's.
    """
    directory = absolute(run) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{run} has no checkpoints: there is no folder {directory}; "
            "name the directory of a run that aecore trained"
        )
    manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False))
    with manager:
        descriptions = {}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                descriptions[step] = _read_description(manager, step)
            except Exception as error:  # Each kind of damage fails differently within orbax.
                _check_is_damage(directory / str(step), error)
                _log.warning("%s; not used", _damage(directory / str(step), error))
        candidates = list(descriptions)
        if candidates:
            best = best_step(candidates, descriptions[candidates[0]])
            candidates.sort(key=lambda step: (step != best, -step))
        for step in candidates:
            description = descriptions[step]
            try:
                abstract = abstract_params(description)
                # The checksums name the items that there are.
                name = "ema" if "ema" in _checksums(description) else "params"
                params = _restore(manager, step, description, {name: abstract})[name]
            except CheckpointError:
                raise
            except Exception as error:  # As above.
                if model is not None and isinstance(error, UnfitError):
                    _check_model(run, description, model, error)
                _check_is_damage(directory / str(step), error)
                _log.warning("%s; not used", _damage(directory / str(step), error))
                continue
            return params, description
    raise CheckpointError(
        f"{run} has no usable checkpoint in {directory}"
        + ("" if candidates else "; train the run first")
    )


def _check_model(
    run: epath.PathLike, description: Description, model: Any, error: Exception
) -> None:
    """Raises CheckpointError if it is another model that parameters don't fit."""
    # Where a description says nothing of the model, it is the likelier reason.
    described = description.model
    differing = [str(error)] if described is None else model_changes(described, model)
    if differing:
        raise CheckpointError(
            f"model= is not the network of {run} ({'; '.join(differing)}); load it with the model "
            "that it was trained with"
        ) from error


def _read_description(manager: ocp.CheckpointManager, step: int) -> Description:
    args = ocp.args.Composite(description=ocp.args.JsonRestore())
    return Description.from_json(manager.restore(step, args=args)["description"], of_run=True)


def _checksums(description: Description) -> Mapping[str, Any]:
    return description.checksums or {}


def _items(state: TrainState) -> dict[str, Any]:
    """A state's parts; using a network takes the parameters, or their average, alone."""
    items = {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _restore(
    manager: ocp.CheckpointManager, step: int, description: Description, abstract: dict[str, Any]
) -> Mapping[str, Any]:
    for name, tree in abstract.items():
        _check_shapes(epath.Path(manager.directory) / str(step) / name, tree)
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    items = manager.restore(step, args=ocp.args.Composite(**args))
    for name in abstract:
        if _checksum(items[name]) != _checksums(description)[name]:
            raise ValueError(f"the checksum of {name} is wrong")
    return items


def _check_shapes(folder: epath.Path, abstract: Any) -> None:
    """Refuses arrays of other names and shapes, which orbax would fit to what is asked for."""

    def shapes(tree):
        return {
            tuple(_key_name(key) for key in path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    expected, found = (
        shapes(abstract),
        shapes(ocp.StandardCheckpointHandler().metadata(folder).tree),
    )
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise UnfitError(
                f"{'/'.join(path)} has shape {found.get(path)}, expected is {expected.get(path)}"
            )


def _key_name(key: Any) -> str:
    """Of a step in a tree's path; orbax keeps attributes and indices as names."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


_OF_DAMAGE = (
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EOVERFLOW,
)
"""Numbers of the errors of files that are missing, or named by bytes that are wrong."""

_PASSING = re.compile("ABORTED|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE")
"""What TensorStore's messages say of a bucket that doesn't answer."""


def _check_is_damage(folder: epath.Path, error: Exception) -> None:
    """Refuses to go on to another checkpoint if this one may be whole.

    Raises:
      CheckpointError: memory, a device, the network or the file system failed, not what was read.
    """
    cause: BaseException | None = error
    while isinstance(cause, Exception) and not isinstance(cause, FileNotFoundError):
        number = cause.errno if isinstance(cause, OSError) else _number(cause)
        if (
            isinstance(cause, (MemoryError, jax.errors.JaxRuntimeError))
            or number not in (None, *_OF_DAMAGE)
            or (number is None and _PASSING.search(str(cause)))
            or storage.explained(cause) is not None
        ):
            raise CheckpointError(
                f"checkpoint {folder} can't be read ({_reason(cause)}); it may be whole, so "
                "nothing was changed: run the same command again, or move it away to use an "
                "earlier one"
            ) from error
        cause = cause.__cause__ or cause.__context__


def _number(error: BaseException) -> int | None:
    """Of the system's error, as TensorStore writes it into its messages."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _reason(error: BaseException) -> str:
    number = _number(error)
    if number is not None:
        return os.strerror(number)
    return f"{' '.join(storage.reason(error).split()):.200}"


def _damage(folder: epath.Path, error: Exception) -> str:
    return f"checkpoint {folder} is damaged ({_reason(error)})"


def _checksum(tree: Any) -> str:
    """CRC-32 over the names, types and bytes of a tree's arrays."""
    crc = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array: Any = np.ascontiguousarray(jax.device_get(leaf))
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        crc = zlib.crc32(array, zlib.crc32(head.encode(), crc))
    return f"{crc:08x}"


class _NewestAndBest:
    """Orbax preservation policy: the newest `keep`, and the best by validation loss."""

    def __init__(self, keep: int):
        self._keep = keep
        self.description = Description()

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self._keep :], best_step(steps, self.description)}
        return [step in kept for step in steps]
