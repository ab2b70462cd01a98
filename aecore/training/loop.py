"""The training loop: resume, launch, log late, evaluate, save, stop."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

import aecore
from aecore.config import Experiment
from aecore.data import sources
from aecore.data.crops import Crops
from aecore.data.sources import Dataset
from aecore.errors import ConfigError, Interrupted, NonFiniteLossError
from aecore.media import images
from aecore.networks.base import check_memory
from aecore.restoring import expectations
from aecore.restoring.restorer import Restorer
from aecore.saved.checkpoints import Checkpoints, exists
from aecore.saved.descriptions import (
    RANDOM_STREAMS,
    Description,
    describe,
    experiment_from_json,
)
from aecore.saved.trained import TrainedNetwork
from aecore.scoring import evaluation, reports
from aecore.steps import hardware, memory, state
from aecore.steps.devices import Devices
from aecore.steps.state import TrainState
from aecore.storage import reason, to_path, write_json
from aecore.training import assembly, claim, feeds, processes, resuming, starting
from aecore.training.assembly import Assembly
from aecore.training.clock import Clock
from aecore.training.interruption import Interruption
from aecore.training.metrics_log import Callback, MetricsLog
from aecore.training.profiling import Profile

_log = logging.getLogger(__name__)

_SAMPLES = 10
"""Images in samples.png."""

_LOOKED_AT = 256
"""Validation images from which a checkpoint describes the network's inputs."""

_PHOTOGRAPHS_LOOKED_AT = 48
"""The same of photographs, as decoding one may take a fifth of a second."""


def train(
    experiment: Experiment,
    *,
    progress: bool = True,
    started: float | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Trains an experiment, or resumes it from its run directory.

    Args:
      experiment: what to train. Results are written to `experiment.directory`.
      progress: whether to show a progress bar on stderr.
      started: when the program began, as `time.time` counts, from when on the run's time is
        counted; None: now.
      callback: called with the step and its scores, in the first process, when a line is added to
        `metrics.jsonl`: every `training.log_every` steps with `loss` and what was measured, and
        after evaluations with `validation_mse`, `validation_psnr` and `validation_ssim`. A resumed
        run tells again what came after its checkpoint. `experiments/other_tools.py` has callbacks
        for Weights & Biases and MLflow.

    Returns:
      The summary, as written to `summary.json`. Its scores are those of the checkpoint with the
      best validation loss, which `restore` uses.

    Raises:
      ConfigError: the settings don't fit the data or the devices; another process trains in this
        run directory; of several processes that train together, not all have the same experiment.
      DataError: the data can't be loaded.
      CheckpointError: the run directory belongs to a different experiment.
      NonFiniteLossError: the loss became NaN or infinite.
      SavingError: a checkpoint can't be written, as when the disk is full.
      ProcessError: another process that trains with this one didn't come, failed, or is gone.
      Interrupted: Ctrl-C or SIGTERM stopped it; a checkpoint was saved.
    """
    started = time.time() if started is None else started
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{experiment!r:.80} is not an experiment; use an aecore.Experiment")
    if callback is not None and not callable(callback):
        raise ConfigError(
            f"callback {callback!r:.80} can't be called; use a function of a step and its scores"
        )
    with (
        processes.together(experiment),
        Clock(experiment.training.batch_size, started=started) as clock,
    ):
        return _train(experiment, progress, clock, callback)


def _train(
    experiment: Experiment, progress: bool, clock: Clock, callback: Callback | None
) -> dict[str, Any]:
    # Otherwise an experiment that a checkpoint can't describe would come to light after training.
    described = describe(experiment)
    experiment_from_json(described, model=experiment.model)
    directory = to_path(experiment.directory)
    resuming.check_directory(experiment, directory)
    devices = assembly.devices(experiment.training)
    available = memory.limit(devices.mesh.local_devices[0]) or memory.physical()
    # Adam keeps two more arrays of each parameter's size, and its gradient is another.
    check_memory(experiment.model, available, copies=4)
    # If that fails, better before the images are loaded.
    start = None if exists(directory) else starting.load(experiment)
    loaded = _Loaded.load(experiment, progress)
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or directory} can't be made ({reason(error)}); use another --run-dir"
        ) from error
    interruption = Interruption()
    with (
        _alone(directory, clock, interruption) as earlier,
        interruption,
        Checkpoints(directory / "checkpoints", experiment.training.keep) as checkpoints,
    ):
        run = _Run(
            experiment,
            loaded,
            devices,
            directory,
            checkpoints,
            interruption,
            clock,
            callback,
            start,
        )
        clock.go_on(run.before, earlier)
        if run.is_first:
            write_json(directory / "experiment.json", described)
        shown = _bar(run, progress and run.is_first)
        with run.log, contextlib.closing(run.feed), run.profile, shown as bar:
            run.fit(bar)
        return run.summarize()


@contextlib.contextmanager
def _alone(directory: epath.Path, clock: Clock, interruption: Interruption) -> Iterator[float]:
    """Claims the run directory, for the first process of a training; yields as `claimed` does."""
    is_first = jax.process_index() == 0
    own = (
        claim.claimed(directory, clock.total, interruption.request)
        if is_first
        else contextlib.nullcontext(0.0)
    )
    with own as earlier:
        processes.check_sees(directory)
        yield earlier


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What a run is trained and validated on."""

    dataset: Dataset
    examples: np.ndarray | Crops
    fingerprint: str

    @classmethod
    def load(cls, experiment: Experiment, progress: bool) -> "_Loaded":
        """Loads them; all processes must have the same."""
        dataset = sources.load(experiment.data, progress=progress)
        fingerprint = dataset.fingerprint()
        processes.check_data(fingerprint)
        return cls(dataset, assembly.examples(experiment, dataset), fingerprint)


class _Run:
    """A training run under way.

    A step's number counts the steps done, itself included. What is due after a step depends on its
    number and the history of evaluations alone, so that a resumed run decides the same.
    """

    def __init__(
        self,
        experiment: Experiment,
        loaded: _Loaded,
        devices: Devices,
        directory: epath.Path,
        checkpoints: Checkpoints,
        interruption: Interruption,
        clock: Clock,
        callback: Callback | None,
        start: TrainedNetwork | None,
    ):
        training, dataset, examples = experiment.training, loaded.dataset, loaded.examples
        self.experiment = experiment
        self.devices = devices
        self.directory = directory
        self.checkpoints = checkpoints
        self.interruption = interruption
        self.clock = clock
        self.profile = Profile(training, directory)
        self.validation = dataset.to_validate()
        self.steps_per_epoch = len(examples) // training.batch_size
        self.last_step = training.last_step(len(examples))

        # With several processes, only the first writes anything but checkpoints.
        self.is_first = jax.process_index() == 0

        assembled = assembly.assemble(experiment, dataset.image_shape, devices, self.last_step)
        self.description = dataclasses.replace(
            Description.from_json(describe(experiment)),
            aecore=aecore.__version__,
            image_size=dataset.image_shape[:2],
            channels=dataset.image_shape[2],
            fingerprint=loaded.fingerprint,
            random_streams=RANDOM_STREAMS,
        )
        self.abstract_state = assembled.abstract_state
        restored = checkpoints.restore(self.abstract_state)
        # Before images are put on devices, and compiling begins.
        if restored:
            resuming.check_run(restored[1], self.description, experiment, directory, len(examples))
        self.feed = feeds.create(examples, experiment.degradation, training, assembled)
        self.evaluator = evaluation.Evaluator(
            assembled.apply,
            experiment.degradation,
            devices,
            multiple=experiment.model.stride * experiment.model_scale,
        )
        looked_at = _LOOKED_AT if dataset.crop is None else _PHOTOGRAPHS_LOOKED_AT
        to_degrade, originals = dataset.samples(looked_at)
        degraded = evaluation.degraded(experiment.degradation, to_degrade)
        self.degraded_samples = degraded[:_SAMPLES].copy()
        self.original_samples = originals[:_SAMPLES].astype(np.float32) / 255
        self.state, resumed = restored or self._begin(assembled, start)
        self.description = dataclasses.replace(
            self.description,
            inputs=expectations.describe(degraded),
            started_from=resumed.started_from,
        )
        self.step = self.saved_step = int(jax.device_get(self.state.step))
        self.first_step = self.step + 1
        self.before = self._with_time_of_end(resumed)
        self.history = list(resumed.history)
        self.log = MetricsLog(
            directory, self.step, resumed.unlogged, training.log_every, self.is_first, callback
        )
        self.launched = collections.deque()
        self.spread: dict[str, float] = {}
        self.most_images_per_second = self._matrix_limit(assembled) if self.is_first else None
        self.is_finite = jax.jit(
            lambda tree: jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
        )

    def _matrix_limit(self, assembled: Assembly) -> float | None:
        """Images per second if the devices did nothing but the network's matrix products."""
        device, precision = self.devices.mesh.local_devices[0], self.experiment.training.precision
        rate, flops = hardware.operations_per_second(device, precision), assembled.flops_per_image()
        return self.devices.device_count * rate / flops if rate and flops else None

    def _begin(
        self, assembled: Assembly, start: TrainedNetwork | None
    ) -> tuple[TrainState, Description]:
        """The state at step 0, with the parameters of the network to start from, if there is one.

        The description only tells of that network.
        """
        created = self.devices.compile_create(assembled.create)()
        # Not loaded yet where there were checkpoints, none of them whole.
        trained = start or starting.load(self.experiment)
        if trained is None:
            return created, Description()
        # A file may hold fewer bits.
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), trained.params)
        # Twice, since a step's input is donated.
        params, ema = (self.devices.replicate(found) for _ in range(2))
        ema = None if created.ema is None else ema
        source = self.experiment.training.start_from or ""
        description = Description(started_from=starting.describe(source, trained))
        return dataclasses.replace(created, params=params, ema=ema), description

    def fit(self, bar: tqdm) -> None:
        """Trains to the end, or until the validation loss no longer falls."""
        if self._is_over():
            if self.is_first:
                limit, advice = self._end()
                _log.warning(
                    "%s was trained to its end before, %s, so nothing is trained now; %s",
                    self.directory,
                    f"--training.{limit} {getattr(self.experiment.training, limit)}",
                    advice,
                )
        else:
            # Not of the state's own arrays, which are donated to the steps meanwhile.
            params = self.abstract_state.inference_params
            self.evaluator.compile_ahead(params, self.validation)
        self.clock.begin("training")
        while True:
            self._profile(bar)
            if self._evaluation_is_due():
                self._collect_losses(bar)
                bar.set_description(f"{self.epoch_label(self.step)}, evaluating")
                self._evaluate()
            elif self._checkpoint_is_due():
                self._collect_losses(bar)
                self._save()
            if self._is_over():
                break
            if self._agree_to_stop():
                self._collect_losses(bar)
                self._stop()
            waited = self.feed.seconds_waited
            self.state, losses, count = self.feed.launch(
                self.state, self.step, self._next_stop() - self.step
            )
            self.clock.move(self.feed.seconds_waited - waited, "waiting for input")
            self.launched.append((self.step + 1, count, losses))
            self.step += count
            # Losses are read late, so that the devices always have the next step queued.
            self._collect_losses(bar, leave=2)
        self.profile.end()
        with self.clock.during("saving"):
            self.checkpoints.wait()
        self.log.finish(self.step, self._measured())
        self.clock.begin("evaluating")

    def _profile(self, bar: tqdm) -> None:
        """Begins or ends the trace, if that is due."""
        if self.profile.ends_after(self.step):
            self._collect_losses(bar)
            self.profile.end()
        if self.profile.begins_after(self.step):
            self._collect_losses(bar)
            self.profile.begin()

    def _measured(self) -> dict[str, float]:
        """Speed, and where the time goes, for a line of the metrics."""
        speed = self.clock.images_per_second
        found = {"images_per_second": speed, **self.clock.shares(), **self.spread}
        if self.most_images_per_second:
            found["share_of_matrix_rate"] = speed / self.most_images_per_second
        if (used := memory.peak(self.devices.mesh.local_devices[0])) is not None:
            found["device_memory"] = used
        return found

    def _next_stop(self) -> int:
        """The next step after which something may be due."""
        every = [self.steps_per_epoch, self.experiment.training.checkpoint_every]
        if jax.process_count() > 1:
            every.append(self.experiment.training.log_every)
        edges = [edge for edge in self.profile.edges() if edge > self.step]
        return min(self.last_step, *edges, *((self.step // n + 1) * n for n in every))

    def _agree_to_stop(self) -> bool:
        """Whether any process was asked to stop; they also tell each other how fast they are.

        All processes stop after the same step.
        """
        requested = self.interruption.requested
        if jax.process_count() == 1:
            return requested
        if self.step % self.experiment.training.log_every:
            return False
        told = np.array([requested, self.clock.seconds_per_step or 0.0], np.float32)
        told = np.asarray(multihost_utils.process_allgather(told))
        slowest, fastest = told[:, 1].max(), told[:, 1].min()
        self.spread = {"step_seconds_least": float(fastest), "step_seconds_most": float(slowest)}
        return bool(told[:, 0].any())

    def epoch_label(self, step: int) -> str:
        """Names the epoch that a step belongs to."""
        epoch = -(-min(step, self.last_step) // self.steps_per_epoch)
        return f"epoch {epoch}/{self.experiment.training.epochs}"

    def summarize(self) -> dict[str, Any]:
        """Writes `summary.json` and the pictures, from the best checkpoint; returns the summary."""
        restorer = Restorer.load(self.directory, model=self.experiment.model)
        scores = restorer.description.metrics
        if scores is None:  # Every evaluated checkpoint has since been damaged.
            params = self.devices.replicate(restorer.trained.params)
            values = self.evaluator.per_image(params, self.validation)
            scores = {"step": restorer.description.step, **evaluation.summarize(values)}
        if self.is_first:
            self._draw(restorer)
        summary = {
            "name": self.experiment.name,
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            **self.clock.to_json(),
            "evaluation": scores,
            "baseline": self.baseline,
            "parameters": state.count_parameters(self.state.params),
            "device": jax.devices()[0].device_kind,
            "devices": self.devices.device_count,
            "seed": self.experiment.training.seed,
        }
        if self.is_first:
            summary |= self._classical_scores()
            write_json(self.directory / "summary.json", summary)
        return summary

    def _draw(self, restorer: Restorer) -> None:
        """Writes the pictures of the run."""
        degraded = self.degraded_samples.clip(0, 1)
        reports.save_samples(
            {
                "degraded": degraded,
                "restored": restorer(degraded),
                "original": self.original_samples,
            },
            self.directory / "samples.png",
        )
        reports.save_curves(
            self.log.read("loss"),
            self.history,
            self.baseline,
            self.directory / "curves.png",
            self.experiment.training.loss,
        )
        images.save(images.from_float(degraded[0]), self.directory / "example.png")

    @functools.cached_property
    def baseline(self) -> evaluation.Scores:
        """Scores of the degraded images themselves."""
        return evaluation.baseline(self.experiment.degradation, self.devices, self.validation)

    def _earlier_summary(self) -> dict[str, Any]:
        """What this run's last end wrote, if it has ended before."""
        try:
            summary = json.loads((self.directory / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def _classical_scores(self) -> dict[str, Any]:
        """Scores of classical methods that an evaluation added to an earlier summary."""
        earlier = self._earlier_summary()
        return {"classical": earlier["classical"]} if "classical" in earlier else {}

    def _with_time_of_end(self, resumed: Description) -> Description:
        """With the time that was spent after the last checkpoint of a run that had ended there."""
        earlier = self._earlier_summary()
        spent = {name: earlier.get(name) for name in ("seconds", "time")}
        if earlier.get("steps") == resumed.step and None not in spent.values():
            with contextlib.suppress(ValueError):  # The file is damaged.
                return dataclasses.replace(resumed, **spent)
        return resumed

    def _collect_losses(self, bar: tqdm, leave: int = 0) -> None:
        """Waits for the launched steps, except the last `leave` calls; records their losses."""
        while len(self.launched) > leave:
            first, count, losses = self.launched.popleft()
            losses = np.atleast_1d(jax.device_get(losses))[:count]
            self.clock.tick(count)
            for step, loss in enumerate(losses.tolist(), first):
                self._check_finite("loss", loss, step)
                self.log.add_loss(step, loss, self._measured)
            if first == self.first_step:
                bar.unpause()  # The remaining time is estimated without the compilation.
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

    def _is_over(self) -> bool:
        return self.step >= self.last_step or self._loss_no_longer_falls()

    def _end(self) -> tuple[str, str]:
        """The setting that ended the training, and how to go on in spite of it."""
        training, optimizer = self.experiment.training, self.experiment.optimizer
        if self.step < self.last_step:
            limit = "patience"
        else:
            limit = "steps" if training.steps == self.last_step else "epochs"
            # The end decides the rates of steps that are finished, so that it must stay.
            if optimizer.schedule == "cosine" or optimizer.warmup_steps > self.last_step // 2:
                return limit, (
                    "its learning rates depend on where it ends, so begin anew in another "
                    f"--run-dir, as from its network by --training.start-from {self.directory}"
                )
        return limit, (f"use more --training.{limit} to go on, or another --run-dir to begin anew")

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
        try:
            with self.clock.during("evaluating"):
                scores = self.evaluator(
                    self.state.inference_params, self.validation, self._evaluation_may_stop
                )
                self._check_finite("validation loss", scores["mse"], self.step)
                if not self.history:
                    self._warn_if_no_better(scores["mse"], self.baseline["mse"])
        except evaluation.Stopped:
            self._stop()
        self.history.append({"step": self.step, **scores})
        self.log.add_scores(self.step, scores)
        self._save()

    def _warn_if_no_better(self, mse: float, of_input: float) -> None:
        if mse >= of_input and self.is_first:
            _log.warning(
                "after %d steps the network is no better than its input (MSE %.5f, that of the "
                "input %.5f); if this goes on, try a lower --optimizer.learning-rate, or "
                "--optimizer.warmup-steps",
                self.step,
                mse,
                of_input,
            )

    def _evaluation_may_stop(self) -> bool:
        # Several processes would have to agree before each batch.
        return self.interruption.requested and jax.process_count() == 1

    def _save(self) -> None:
        with self.clock.during("saving"):
            self._write_checkpoint()
        self.clock.pause()

    def _write_checkpoint(self) -> None:
        finite = jax.device_get(self.is_finite(self.state))
        self._check_finite("state", 0.0 if finite else math.nan, self.step)
        self.log.flush()
        self.checkpoints.save(
            self.state,
            dataclasses.replace(
                self.description,
                step=self.step,
                history=tuple(self.history),
                metrics=self._scores(),
                unlogged=self.log.unlogged,
                **self.clock.to_json(),
            ),
        )
        self.saved_step = self.step

    def _stop(self) -> NoReturn:
        if self.interruption.why is not None:  # The run directory is another process's now.
            raise ConfigError(self.interruption.why)
        if self.step > self.saved_step:
            self._save()
        self.checkpoints.wait()
        done = f"after step {self.step}, which is saved in {self.directory}"
        raise Interrupted(
            f"stopped {done if self.step else 'before the first step'}; "
            "run the same command again to resume"
        )

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            kept = f"the checkpoint of step {self.saved_step} is kept"
            raise NonFiniteLossError(
                f"the {name} became {value} at step {step}; "
                f"{kept if self.saved_step else 'there is no checkpoint yet'}; "
                "try a lower --optimizer.learning-rate, with another --run-dir"
            )


class _Log:
    """What a progress bar writes to where there is no terminal: a line for each of its states."""

    def write(self, text: str) -> None:
        if state := text.strip():
            print(state, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _bar(run: _Run, progress: bool) -> tqdm:
    batch_size = run.experiment.training.batch_size
    in_terminal = sys.stderr.isatty()
    return tqdm(
        file=None if in_terminal else _Log(),
        desc=run.epoch_label(run.step + 1),
        total=run.last_step * batch_size,
        initial=run.step * batch_size,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=in_terminal,
        disable=not progress,
        mininterval=0.2 if in_terminal else 10.0,
    )
