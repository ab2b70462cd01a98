"""The command line: `aecore restore`, `evaluate` and the others, and `main` of experiment files."""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import tyro
from etils import epath
from tqdm import tqdm

from aecore.config import Experiment
from aecore.errors import AecoreError, ConfigError, Interrupted


def main(
    experiment: Experiment,
    args: Sequence[str] | None = None,
    then: Callable[[Experiment], None] | None = None,
) -> None:
    """Trains an experiment, changed by what the command line says; exits if that fails.

    Args:
      experiment: gives every flag its default.
      args: the command line's words; those of the process by default.
      then: called afterwards with the experiment as it was trained, by the first process.
    """
    with _exit_status():
        chosen = tyro.cli(Experiment, default=experiment, args=args)
        import jax

        from aecore.scoring import evaluation
        from aecore.training import loop

        summary = loop.train(chosen)
        if jax.process_index() > 0:  # The first process speaks for all.
            return
        run = chosen.directory
        print(
            f"\n{summary['name']}: {summary['steps']:,} steps, {summary['epochs']:.4g} epochs in "
            f"{summary['seconds']:.0f} s, {summary['images_per_second']:,.1f} images/s "
            f"on {summary['devices']} x {summary['device']}\n"
            f"{summary['evaluation']['images']:,} validation images, "
            f"checkpoint of step {summary['evaluation']['step']:,}\n\n"
            f"{evaluation.table(summary['evaluation'], summary['baseline'])}\n\n"
            f"checkpoints  {run}/checkpoints\n"
            f"pictures     {run}/samples.png  {run}/curves.png\n"
            f"scores       {run}/summary.json\n\n"
            f"Next: aecore restore {run}/example.png -o restored.png -m {run}"
        )
        if then is not None:
            then(chosen)


@dataclasses.dataclass(frozen=True)
class Restore:
    """Restores pictures with a trained network."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, videos, folders of them, and patterns such as 'pictures/*.png'."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """A file, if there is one input; else a folder, in which folders keep their structure."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A run directory, an exported file, or the name of weights that ship with aecore."""
    recursive: bool = False
    """Search folders within folders."""
    suffix: str = ""
    """Appended to the names of files in the output folder, before their ending."""
    ext: Literal["auto", "png", "jpg", "webp", "tiff"] = "auto"
    """The ending and format of pictures in the output folder; auto: the input's."""
    tile: Literal["auto"] | int = "auto"
    """The side of the tiles in which large pictures are restored, in pixels; 0: none."""
    batch_size: int | None = None
    """Most pictures at a time; None: as many as are worth it."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """What computes."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network computes in; auto: bfloat16 on TPUs, else float32."""
    alpha: Literal["keep", "drop"] = "keep"
    """What becomes of alpha channels, which are never restored."""
    if_exists: Literal["fail", "skip", "overwrite"] = "fail"
    """What to do about outputs that are there already; fail: nothing is restored at all."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do after a file that can't be restored."""
    compare: bool = False
    """Also write NAME_compare.png, with input and output side by side."""
    report: str | None = None
    """A file to write to, as JSON, what became of each input."""
    dry_run: bool = False
    """Only say what would be written."""

    def run(self) -> int:
        from aecore.media import images
        from aecore.restoring import bulk, files

        jobs, failures = files.find(
            self.inputs,
            self.output,
            recursive=self.recursive,
            suffix=self.suffix,
            extension=self.ext,
        )
        files.check(
            jobs,
            comparing=self.compare,
            overwrite=self.if_exists == "overwrite",
            report=self.report,
        )
        jobs, skipped = self._without_existing(jobs)
        if self.dry_run:
            for job in jobs:
                print(f"{job.source} -> {job.target}")
            for failure in failures:
                print(failure, file=sys.stderr)
            return 1 if failures else 0
        images.silence_pillow()
        with _notes_on_stdout(), _interruptible() as is_interrupted:
            restorer = self._restorer()
            results = bulk.restore(jobs, restorer, alpha=self.alpha, compare=self.compare)
            with contextlib.closing(results):
                watched = _until(is_interrupted, itertools.chain(failures, results))
                outcomes = self._collect(watched, skipped, len(failures) + len(jobs))
            counts = collections.Counter(type(outcome).__name__ for outcome in outcomes)
        print(
            f"{counts['Done']:,} restored, {counts['Failure']:,} failed, {len(skipped):,} skipped"
        )
        return 1 if counts["Failure"] else 0

    def _collect(self, results: Iterator[Any], skipped: Sequence[Any], total: int) -> list[Any]:
        """Reports results as they come."""
        from aecore.restoring.files import Failure

        outcomes, said = [], set()
        try:
            with tqdm(total=total, unit=" files", disable=None) as bar:
                for outcome in results:
                    outcomes.append(outcome)
                    bar.update()
                    if isinstance(outcome, Failure):
                        tqdm.write(str(outcome), file=sys.stderr)
                        if self.on_error == "stop":
                            break
                        continue
                    for note in outcome.notes:
                        if note not in said:
                            said.add(note)
                            tqdm.write(f"note: {outcome.job.source}: {note}", file=sys.stdout)
        except KeyboardInterrupt:
            raise Interrupted(
                f"{len(outcomes):,} of {total:,} files are done; "
                "the same command with --if-exists skip goes on"
            ) from None
        finally:
            if self.report is not None:
                _write_report(epath.Path(self.report).expanduser(), outcomes, skipped)
        return outcomes

    def _restorer(self) -> Any:
        import jax

        from aecore.restoring.restorer import Restorer

        try:
            device = None if self.device == "auto" else jax.local_devices(backend=self.device)[0]
        except RuntimeError as error:
            raise ConfigError(f"there is no {self.device} here; use --device auto") from error
        restorer = Restorer.load(
            self.model,
            tile=self.tile,
            batch_size=self.batch_size,
            precision=self.precision,
            device=device,
        )
        if restorer.network.channels not in (1, 3):
            raise ConfigError(
                f"{self.model} is for images of {restorer.network.channels} channels; "
                "pictures have 1 or 3"
            )
        return restorer

    def _without_existing(self, jobs: list[Any]) -> tuple[list[Any], list[Any]]:
        existing = [
            job for job in jobs if job.target.exists() or (self.compare and job.comparison.exists())
        ]
        if existing and self.if_exists == "fail":
            others = f", and {len(existing) - 1} others do" if len(existing) > 1 else ""
            raise ConfigError(
                f"{existing[0].target} exists{others}; use --if-exists skip or overwrite"
            )
        skipped = existing if self.if_exists == "skip" else []
        return [job for job in jobs if job not in set(skipped)], skipped


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a trained network to one file, for use without Flax and orbax, or for ONNX."""

    model: tyro.conf.Positional[str]
    """A run directory, an exported file, or the name of weights that ship with aecore."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """The file to write."""
    format: Literal["auto", "stablehlo", "onnx", "weights"] = "auto"
    """stablehlo: what aecore.Restorer.load reads anywhere; onnx: for onnxruntime and others;
    weights: parameters alone, for models that aecore knows; auto: onnx if the file ends in .onnx,
    else stablehlo."""

    def run(self) -> int:
        from aecore.restoring.restorer import Restorer
        from aecore.saved import exported

        restorer = Restorer.load(self.model)
        path = epath.Path(self.output).expanduser()
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (restorer.network, restorer.params, restorer.description)
        if self.format == "onnx" or (self.format == "auto" and path.suffix.lower() == ".onnx"):
            exported.export_onnx(path, *content)
        else:
            exported.save(path, *content, with_functions=self.format != "weights")
        print(f"{path}: {path.stat().length:,} bytes")
        return 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """Prints a network layer by layer, what it was trained on, and its scores."""

    model: tyro.conf.Positional[str]
    """A run directory, an exported file, or the name of weights that ship with aecore."""

    def run(self) -> int:
        from aecore.restoring.restorer import Restorer

        print(Restorer.load(self.model).summary())
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores a run's best checkpoint on its validation images, beside classical methods."""

    run_dir: tyro.conf.Positional[str]
    """The run directory."""
    data_dir: str | None = None
    """Where the data are now; None: where they were."""
    batch_size: int | None = None
    """Images at a time; None: as many as are fast."""
    classical: bool = True
    """Whether to score classical methods too, each tuned on training images alone."""
    methods: tuple[str, ...] | None = None
    """Which of them, as median or "total variation"; None: all that are installed. BM3D takes about
    a second for each image."""
    save: bool = False
    """Write the scores into the run's summary.json, and ranked.png, a picture of the best, the
    median and the worst results."""
    json: str | None = None
    """A file to write the scores to."""

    def run(self) -> int:
        from aecore.scoring import evaluation

        scores = evaluation.evaluate(
            self.run_dir,
            data_dir=self.data_dir,
            batch_size=self.batch_size,
            classical=self.methods or self.classical,
            save=self.save,
            progress=True,
        )

        def table(scores):
            return (
                f"{self.run_dir}: {scores['evaluation']['images']:,} validation images, "
                f"checkpoint of step {scores['evaluation']['step']:,}\n\n"
                f"{evaluation.table(**scores)}"
            )

        return _show(scores, table, self.json)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predicts what training needs on devices that need not exist, such as a TPU slice.

    Compiles the training step for the devices, and reports memory, operations, limits on the
    speed, and the largest batch that fits. Settings of the experiment, such as
    --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """The experiment's file, such as experiments/lfw_enhance.py."""
    topology: str
    """A TPU slice, such as v5e:4x4 or tpu7x:2x2x1; or cpu or gpu for this machine's devices."""
    json: str | None = None
    """File to write the figures to."""

    def run(self, flags: Sequence[str]) -> int:
        import jax

        from aecore.measuring import planning

        if self.topology not in ("cpu", "gpu"):
            # Compiling for a slice needs no device of this machine, for which libtpu might wait.
            jax.config.update("jax_platforms", "cpu")
            # Programs for devices that don't exist can be written to the cache, but not read.
            jax.config.update("jax_enable_compilation_cache", False)
        experiment = _experiment(self.experiment, flags)
        plan = planning.plan(
            experiment,
            _image_shape(experiment),
            self.topology,
            show=lambda text: print(text, flush=True),
            progress=lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
        )
        if self.json is not None:
            _write_json(dataclasses.asdict(plan), self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures how many images per second an experiment does on this machine.

    Measures the input pipeline, the training step, the whole loop, and restoring. Settings of the
    experiment, such as --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """The experiment's file, such as experiments/lfw_enhance.py."""
    json: str | None = None
    """File to write the figures to."""
    seconds: float = 2.0
    """About how long each measurement lasts."""
    repeats: int = 5
    """How often each measurement is repeated, in turns with the others."""

    def run(self, flags: Sequence[str]) -> int:
        from aecore.measuring import benchmarking

        experiment = _experiment(self.experiment, flags)
        report = benchmarking.bench(experiment, seconds=self.seconds, repeats=self.repeats)
        return _show(report, benchmarking.table, self.json)


def _write_report(path: Any, outcomes: Sequence[Any], skipped: Sequence[Any]) -> None:
    from aecore.restoring.files import Failure
    from aecore.storage import write_whole

    entries = [
        {"source": str(outcome.source), "status": "failed", "reason": outcome.reason}
        if isinstance(outcome, Failure)
        else {
            "source": str(outcome.job.source),
            "target": str(outcome.job.target),
            "status": "restored",
            "notes": list(outcome.notes),
        }
        for outcome in outcomes
    ]
    entries += [
        {"source": str(job.source), "target": str(job.target), "status": "skipped"}
        for job in skipped
    ]
    write_whole(path, (json.dumps({"files": entries}, indent=2) + "\n").encode())


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt; yields whether one came.

    The exception alone would not do: where it is raised within a callback, it is lost.
    """
    came = threading.Event()

    def interrupt(*_):
        came.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _until(is_interrupted: Callable[[], bool], results: Iterable[Any]) -> Iterator[Any]:
    for result in results:
        if is_interrupted():
            raise KeyboardInterrupt
        yield result


@contextlib.contextmanager
def _notes_on_stdout() -> Iterator[None]:
    """Has what a restorer notes printed beside the results, so that stderr names failures alone."""

    class Printing(logging.Handler):
        def emit(self, record):
            tqdm.write(f"note: {record.getMessage()}", file=sys.stdout)

    logger, handler = logging.getLogger("aecore.restoring"), Printing()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _experiment(file: str, flags: Sequence[str]) -> Experiment:
    """The `experiment` of an experiment's file, changed by flags."""
    path = epath.Path(file)
    if not path.is_file():
        raise ConfigError(f"{path} is no file; name an experiment's, as experiments/quickstart.py")
    experiment = runpy.run_path(str(path)).get("experiment")
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path} defines no `experiment`; see experiments/quickstart.py")
    return tyro.cli(Experiment, default=experiment, args=flags)


def _image_shape(experiment: Experiment) -> tuple[int, int, int]:
    """Of an experiment's images, without loading them where it says so."""
    if experiment.data.image_size is not None:
        return (*experiment.data.image_size, experiment.model.channels)
    from aecore.data import sources

    return sources.load(experiment.data).image_shape


def _show(
    report: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str], file: str | None
) -> int:
    print(table(report))
    if file is not None:
        _write_json(report, file)
    return 0


def _write_json(report: Mapping[str, Any], file: str) -> None:
    epath.Path(file).write_text(json.dumps(report, indent=2) + "\n")


_COMMANDS = {
    "restore": Restore,
    "export": Export,
    "summary": Summary,
    "evaluate": Evaluate,
    "bench": Bench,
    "plan": Plan,
}


def run(args: Sequence[str] | None = None) -> None:
    """The `aecore` command."""
    commands = Union[  # noqa: UP007 as it is made of a list
        tuple(Annotated[command, tyro.conf.subcommand(name)] for name, command in _COMMANDS.items())
    ]
    with _exit_status():
        command, flags = tyro.cli(commands, prog="aecore", args=args, return_unknown_args=True)
        if isinstance(command, (Bench, Plan)):  # The other flags are the experiment's.
            sys.exit(command.run(flags))
        if flags:
            raise ConfigError(f"{flags[0]} is not known here; see --help")
        sys.exit(command.run())


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Ends the process with one line on stderr, instead of a traceback, for aecore's own errors."""
    from aecore.measuring import hardware

    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Orbax and TFDS report through absl what a user can't act on.
    logging.getLogger("absl").setLevel(logging.ERROR)
    hardware.quiet_libtpu()
    try:
        _keep_compiled_programs()
        yield
    except AecoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(
            f"interrupted: {error}" if isinstance(error, Interrupted) else "interrupted",
            file=sys.stderr,
        )
        sys.exit(130)


def _keep_compiled_programs() -> None:
    """Has JAX keep what it compiles under the user's cache folder, so that a restart is quick."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or epath.Path("~/.cache").expanduser()
        cache = epath.Path(home) / "aecore" / "jax"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(cache, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # All of it: with a threshold, chance would decide about what takes about as long.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
