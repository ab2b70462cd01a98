"""The training loop: resume, launch, log late, evaluate, save, stop."""

import collections
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

import aecore
from aecore import config
from aecore.config import Experiment
from aecore.data import sources
from aecore.data.sources import Dataset
from aecore.errors import CheckpointError, ConfigError, Interrupted, NonFiniteLossError
from aecore.media import images
from aecore.restoring import expectations
from aecore.restoring.restorer import Restorer
from aecore.saved import checkpoints
from aecore.saved.checkpoints import Checkpoints
from aecore.scoring import evaluation, reports
from aecore.steps import state
from aecore.steps.devices import DataParallel, join_processes
from aecore.storage import write_json
from aecore.training import assembly, feeds

_WHEN_IT_ENDS = frozenset({"training.epochs", "training.steps"})

# A run may go on with other values of these: they say how long, where, how often and on what, but
# not what is learned.
_CHANGEABLE = frozenset(
    {"name", "run_dir", "data.data_dir", "data.memory_limit"}
    | _WHEN_IT_ENDS
    | {f"training.{name}" for name in ("patience", "min_delta")}
    | {f"training.{name}" for name in ("checkpoint_every", "keep", "log_every")}
    | {f"training.{name}" for name in ("feed", "degrade_on", "precision", "accumulation")}
    | {f"training.{name}" for name in ("parallel", "devices", "distributed")}
)

_SAMPLES = 10
"""Pictures in samples.png."""

_LOOKED_AT = 256
"""Validation images of which a checkpoint says what the network's inputs are like."""


def train(experiment: Experiment, *, progress: bool = True) -> dict[str, Any]:
    """Trains an experiment, or goes on with it where its run directory left off.

    Args:
      experiment: what to train. Results go to `experiment.directory`.
      progress: whether to show a progress bar on stderr.

    Returns:
      The summary, as written to `summary.json`. Its scores are those of the best checkpoint by
      validation loss, the one that `restore` uses.

    Raises:
      ConfigError: the settings don't fit the data or the devices.
      DataError: the data can't be loaded.
      CheckpointError: the run directory belongs to a different experiment.
      NonFiniteLossError: the loss became NaN or infinite.
      Interrupted: Ctrl-C or SIGTERM came, and a checkpoint was saved.
    """
    experiment = _with_absolute_data_dir(experiment)
    join_processes(experiment.training.distributed)
    # A checkpoint that couldn't be described or read again would come to light after training.
    config.from_json(config.to_json(experiment), model=experiment.model)
    directory = epath.Path(experiment.directory).expanduser()
    _check_same_experiment(experiment, directory)
    parallel = assembly.devices(experiment.training)
    dataset = sources.load(experiment.data)
    experiment.check_images(*dataset.image_shape)
    if experiment.training.batch_size > len(dataset.train):
        raise ConfigError(
            f"batch_size {experiment.training.batch_size} is more than the {len(dataset.train)} "
            "training images; use a smaller one"
        )
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} can't be made: {error}; use another --run-dir") from error
    with (
        _Interruption() as interruption,
        Checkpoints(directory / "checkpoints", experiment.training.keep) as checkpoints,
    ):
        run = _Run(experiment, dataset, parallel, directory, checkpoints, interruption)
        if run.is_first:
            write_json(directory / "experiment.json", config.to_json(experiment))
        with run.log, _bar(run, progress and run.is_first) as bar:
            run.fit(bar)
    return run.summarize()


class _Run:
    """A run's moving parts; `fit` moves them.

    A step's number counts the steps done, itself included. What is due after a step follows from
    its number and the history of evaluations alone, so that a resumed run decides alike.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        parallel: DataParallel,
        directory: epath.Path,
        checkpoints: Checkpoints,
        interruption: "_Interruption",
    ):
        training = experiment.training
        self.experiment = experiment
        self.parallel = parallel
        self.directory = directory
        self.checkpoints = checkpoints
        self.interruption = interruption
        examples = dataset.examples()
        self.validation = sources.whole_array(dataset.validation)
        self.steps_per_epoch = len(examples) // training.batch_size
        self.last_step = training.last_step(len(examples))

        # With several processes, the first one alone writes what isn't a checkpoint.
        self.is_first = jax.process_index() == 0

        parts = assembly.assemble(experiment, dataset.image_shape, parallel, self.last_step)
        self.feed = feeds.create(
            examples, experiment.degradation, training, parallel, parts.train_step
        )
        self.evaluator = evaluation.Evaluator(parts.apply, experiment.degradation, parallel)
        degraded = evaluation.degraded(experiment.degradation, self.validation[:_LOOKED_AT])
        self.degraded_samples = degraded[:_SAMPLES].copy()
        self.description = config.to_json(experiment) | {
            "aecore": aecore.__version__,
            "image_size": list(dataset.image_shape[:2]),
            "channels": dataset.image_shape[2],
            "fingerprint": dataset.fingerprint(),
            "inputs": expectations.describe(degraded),
        }
        self.abstract_state = parallel.abstract(parts.create)
        restored = checkpoints.restore(self.abstract_state)
        if restored:
            self.state, description = restored
            self._check_same_run(description)
        else:
            self.state, description = parallel.compile_create(parts.create)(), {}
        self.step = self.saved_step = int(jax.device_get(self.state.step))
        self.first_step = self.step + 1
        self.history = list(description.get("history", []))
        self.clock = _Clock(training.batch_size, description)
        self.log = _MetricsLog(directory, self.step, training.log_every, self.is_first)
        self.launched = collections.deque()
        self.is_finite = jax.jit(
            lambda tree: jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
        )

    def fit(self, bar: tqdm) -> None:
        """Trains to the end, or until the validation loss no longer falls."""
        if self.step < self.last_step and not self._loss_no_longer_falls():
            # Not of the state's own arrays, which are donated to the steps meanwhile.
            params = self.abstract_state.inference_params
            self.evaluator.compile_ahead(params, self.validation)
        while True:
            if self._evaluation_is_due():
                self._collect_losses(bar)
                bar.set_description(f"{self.epoch_label(self.step)}, evaluating")
                self._evaluate()
            elif self._checkpoint_is_due():
                self._collect_losses(bar)
                self._save()
            if self.step >= self.last_step or self._loss_no_longer_falls():
                break
            if self._stop_is_requested():
                self._collect_losses(bar)
                self._stop()
            self.state, losses, count = self.feed.launch(
                self.state, self.step, self._next_stop() - self.step
            )
            self.launched.append((self.step + 1, count, losses))
            self.step += count
            # Losses are read late, so that the devices always have a step to go on with.
            self._collect_losses(bar, leave=2)
        self.checkpoints.wait()
        self.clock.stop()
        self.log.finish(self.step, self.clock.images_per_second)

    def _next_stop(self) -> int:
        """The next step after which something may be due."""
        every = [self.steps_per_epoch, self.experiment.training.checkpoint_every]
        if jax.process_count() > 1:
            every.append(self.experiment.training.log_every)
        return min(self.last_step, *((self.step // n + 1) * n for n in every))

    def _stop_is_requested(self) -> bool:
        """Whether a process was asked to stop. All processes stop after the same step."""
        requested = self.interruption.requested
        if jax.process_count() == 1:
            return requested
        if self.step % self.experiment.training.log_every:
            return False
        return bool(multihost_utils.process_allgather(np.bool_(requested)).any())

    def epoch_label(self, step: int) -> str:
        """Names the epoch that a step belongs to."""
        epoch = -(-min(step, self.last_step) // self.steps_per_epoch)
        return f"epoch {epoch}/{self.experiment.training.epochs}"

    def summarize(self) -> dict[str, Any]:
        """Writes `summary.json` and the pictures, from the best checkpoint; returns the summary."""
        restorer = Restorer.load(self.directory, model=self.experiment.model)
        scores = restorer.description["metrics"]
        if scores is None:  # Every checkpoint that was evaluated has since been damaged.
            params = self.parallel.replicate(restorer.params)
            scores = {
                "step": restorer.description["step"],
                **self.evaluator(params, self.validation),
            }
        summary = {
            "name": self.experiment.name,
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            **self.clock.to_json(),
            "evaluation": scores,
            "baseline": evaluation.baseline(
                self.experiment.degradation, self.parallel, self.validation
            ),
            "parameters": state.count_parameters(self.state.params),
            "device": jax.devices()[0].device_kind,
            "devices": self.parallel.device_count,
            "seed": self.experiment.training.seed,
        }
        if not self.is_first:
            return summary
        summary |= self._classical_scores()
        degraded = self.degraded_samples
        original = self.validation[: len(degraded)].astype(np.float32) / 255
        reports.save_samples(
            {"degraded": degraded, "restored": restorer(degraded), "original": original},
            self.directory / "samples.png",
        )
        reports.save_curves(
            self.log.read("loss"),
            self.history,
            summary["baseline"],
            self.directory / "curves.png",
            self.experiment.training.loss,
        )
        images.save(images.from_float(degraded[0]), self.directory / "example.png")
        write_json(self.directory / "summary.json", summary)
        return summary

    def _classical_scores(self) -> dict[str, Any]:
        """Those that an evaluation has added to the summary of the finished run."""
        try:
            earlier = json.loads((self.directory / "summary.json").read_text())
            return {"classical": earlier["classical"]}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _collect_losses(self, bar: tqdm, leave: int = 0) -> None:
        """Waits for all launched steps but those of the last few calls; records their losses."""
        while len(self.launched) > leave:
            first, count, losses = self.launched.popleft()
            losses = np.atleast_1d(jax.device_get(losses))[:count]
            self.clock.tick(count)
            speed = self.clock.images_per_second
            for step, loss in enumerate(losses.tolist(), first):
                self._check_finite("loss", loss, step)
                self.log.add_loss(step, loss, speed)
            if first == self.first_step:
                bar.unpause()  # Time left is reckoned without the first step's compilation.
            if self.clock.seconds_per_step:
                self.feed.seconds_per_step(self.clock.seconds_per_step)
            bar.set_description(self.epoch_label(first), refresh=False)
            bar.set_postfix(loss=f"{losses[-1]:.5f}", refresh=False)
            bar.update(count * self.experiment.training.batch_size)

    def _evaluation_is_due(self) -> bool:
        epoch_ends = self.step % self.steps_per_epoch == 0 or self.step >= self.last_step
        return self.step > 0 and epoch_ends and not self._scores()

    def _checkpoint_is_due(self) -> bool:
        every = self.experiment.training.checkpoint_every
        return self.step > self.saved_step and self.step % every == 0

    def _scores(self) -> Mapping[str, float] | None:
        """The scores at this step, if it has been evaluated."""
        return self.history[-1] if self.history and self.history[-1]["step"] == self.step else None

    def _loss_no_longer_falls(self) -> bool:
        """Early stopping, as in Keras, over the epochs' validation losses."""
        training = self.experiment.training
        best, waited = math.inf, 0
        for scores in self.history:
            if scores["step"] % self.steps_per_epoch == 0:
                improved = scores["mse"] < best - training.min_delta
                best, waited = (scores["mse"], 0) if improved else (best, waited + 1)
        return training.patience is not None and waited >= training.patience

    def _evaluate(self) -> None:
        scores = self.evaluator(
            self.state.inference_params, self.validation, self._evaluation_may_stop
        )
        if scores is None:
            self._stop()
        self._check_finite("validation loss", scores["mse"], self.step)
        self.history.append({"step": self.step, **scores})
        self.log.add_scores(self.step, scores)
        self._save()

    def _evaluation_may_stop(self) -> bool:
        # Several processes would have to agree before each batch.
        return self.interruption.requested and jax.process_count() == 1

    def _save(self) -> None:
        finite = jax.device_get(self.is_finite(self.state))
        self._check_finite("state", 0.0 if finite else math.nan, self.step)
        self.checkpoints.save(
            self.state,
            self.description
            | {"step": self.step, "history": self.history, "metrics": self._scores()}
            | self.clock.to_json(),
        )
        self.saved_step = self.step
        self.clock.pause()

    def _stop(self) -> NoReturn:
        if self.step > self.saved_step:
            self._save()
        self.checkpoints.wait()
        done = f"after step {self.step}, which is saved in {self.directory}"
        raise Interrupted(
            f"stopped {done if self.step else 'before the first step'}; "
            "run the same command again to go on"
        )

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            kept = f"the checkpoint of step {self.saved_step} is kept"
            raise NonFiniteLossError(
                f"the {name} became {value} at step {step}; "
                f"{kept if self.saved_step else 'there is no checkpoint yet'}; "
                "try a lower --optimizer.learning-rate, with another --run-dir"
            )

    def _check_same_run(self, description: Mapping[str, Any]) -> None:
        """As `_check_same_experiment`, but by what the checkpoint itself says."""
        settings = {name: description[name] for name in config.to_json(self.experiment)}
        _refuse_differences(settings, self.experiment, self.directory)
        old, new = description["fingerprint"], self.description["fingerprint"]
        if old != new:
            raise CheckpointError(
                f"{self.directory} was trained on other images ({old}, now {new}); "
                "restore them, or use another --run-dir"
            )


class _Interruption:
    """Turns SIGINT and SIGTERM into a request to stop; a second Ctrl-C stops at once,
    but for a compilation that is under way."""

    def __init__(self):
        self.requested = False
        self._first = 0.0
        self._previous = {}

    def __enter__(self) -> "_Interruption":
        # Python allows this in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        del frame
        now = time.monotonic()
        # A terminal and a wrapper may both pass on the same Ctrl-C.
        if self.requested and number == signal.SIGINT and now > self._first + 1:
            raise KeyboardInterrupt
        if not self.requested:
            self._first = now
        self.requested = True


class _Clock:
    """How long a run has taken, over all its sessions, and how fast its steps are.

    The speed leaves out the step's compilation, evaluation and saving.
    """

    def __init__(self, batch_size: int, description: Mapping[str, Any]):
        self._batch_size = batch_size
        self._earlier_seconds = description.get("seconds", 0.0)
        self._earlier_speed = description.get("images_per_second", 0.0)
        self._start = time.perf_counter()
        self._end = None
        self._last_tick = None
        self._steps = 0
        self._step_seconds = 0.0

    def tick(self, steps: int) -> None:
        """Steps are done. The first ones after a pause are not timed."""
        now = time.perf_counter()
        if self._last_tick is not None:
            self._steps += steps
            self._step_seconds += now - self._last_tick
        self._last_tick = now

    def pause(self) -> None:
        """What comes before the next step does not count as a step."""
        self._last_tick = None

    def stop(self) -> None:
        self._end = time.perf_counter()

    @property
    def seconds_per_step(self) -> float | None:
        """As measured since this process started; None if nothing was yet."""
        return self._step_seconds / self._steps if self._steps else None

    @property
    def images_per_second(self) -> float:
        if not self._steps:
            return self._earlier_speed
        return self._steps * self._batch_size / self._step_seconds

    def to_json(self) -> dict[str, float]:
        seconds = self._earlier_seconds + (self._end or time.perf_counter()) - self._start
        return {"seconds": seconds, "images_per_second": self.images_per_second}


class _MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard; drops lines of steps that will be done again.

    Of several processes, one `writes`.
    """

    def __init__(self, directory: epath.Path, step: int, every: int, writes: bool):
        self._writes = writes
        self._path = directory / "metrics.jsonl"
        self._directory = directory
        self._every = every
        self._losses = []
        self._step = step
        if writes and self._path.exists():
            kept = [line for line in self._read() if line["step"] <= step]
            self._path.write_text("".join(map(_json_line, kept)))

    def __enter__(self) -> "_MetricsLog":
        if not self._writes:
            return self
        from tensorboardX import SummaryWriter

        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(self._directory), purge_step=self._step + 1)
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._file.close()
            self._tensorboard.close()

    def add_loss(self, step: int, loss: float, images_per_second: float) -> None:
        """Records a step's loss; writes the mean of those since the last line, if one is due."""
        self._losses.append(loss)
        if step % self._every == 0:
            self._write_losses(step, images_per_second)

    def finish(self, step: int, images_per_second: float) -> None:
        """Writes the mean of the losses that no line was due for yet."""
        if self._losses:
            self._write_losses(step, images_per_second)

    def _write_losses(self, step: int, images_per_second: float) -> None:
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self._write(step, {"loss": mean, "images_per_second": images_per_second})

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Records an evaluation."""
        names = ("mse", "psnr", "ssim")
        self._write(step, {f"validation_{name}": scores[name] for name in names})

    def read(self, name: str) -> list[dict[str, float]]:
        """The lines that hold a value."""
        return [line for line in self._read() if name in line]

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(_json_line({"step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def _read(self) -> list[dict[str, float]]:
        lines = []
        for line in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # Cut off when the process was killed.
                continue
        return [line for line in lines if isinstance(line, dict) and "step" in line]


def _bar(run: _Run, progress: bool) -> tqdm:
    batch_size = run.experiment.training.batch_size
    return tqdm(
        desc=run.epoch_label(run.step + 1),
        total=run.last_step * batch_size,
        initial=run.step * batch_size,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not progress,
        # A log file gets a line now and then, a terminal a moving bar.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )


def _with_absolute_data_dir(experiment: Experiment) -> Experiment:
    """So that the data are found again from another working directory."""
    if experiment.data.data_dir is None:
        return experiment
    data_dir = str(epath.Path(experiment.data.data_dir).expanduser().absolute())
    return dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, data_dir=data_dir)
    )


def _check_same_experiment(experiment: Experiment, directory: epath.Path) -> None:
    path = directory / "experiment.json"
    if not (path.exists() and checkpoints.exists(directory)):
        return
    try:
        old = json.loads(path.read_text())
        if not isinstance(old, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not describe an experiment ({error}); use another --run-dir"
        ) from error
    _refuse_differences(old, experiment, directory)


def _refuse_differences(
    old: Mapping[str, Any], experiment: Experiment, directory: epath.Path
) -> None:
    changeable = _CHANGEABLE
    if experiment.optimizer.schedule == "cosine":
        changeable -= _WHEN_IT_ENDS  # A learning rate that falls to 0 by then depends on it.
    differing = config.differences(
        config.with_defaults(old), config.to_json(experiment), changeable
    )
    if differing:
        raise CheckpointError(
            f"{directory} holds a different experiment ({'; '.join(differing)}); "
            "use another --run-dir, or the settings it was made with"
        )


def _json_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
