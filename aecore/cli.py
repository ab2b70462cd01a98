"""The `aecore` command, and the `main` of experiment files: words in, exit status out."""

from aecore import interrupts

interrupts.install()

import collections
import contextlib
import dataclasses
import inspect
import io
import itertools
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Union

import tyro
from tqdm import tqdm

from aecore.config import Experiment
from aecore.errors import AecoreError, ConfigError, Interrupted, SavingError
from aecore.serving.limits import Limits

_STARTED = time.time()
"""When the program began, nearly."""


def main(
    experiment: Experiment,
    args: Sequence[str] | None = None,
    then: Callable[[Experiment], None] | None = None,
    prog: str | None = None,
) -> None:
    """Trains an experiment whose settings the command line may change; exits if that fails.

    Args:
      experiment: the defaults of all flags.
      args: words of the command line; by default those of the process.
      then: called after training with the experiment as trained, in the first process only.
      prog: the words of the command line before `args`, for `--help`; by default the program's.
    """
    with _exit_status():
        chosen = tyro.cli(Experiment, default=experiment, args=args, prog=prog)
        import jax

        from aecore.media import images
        from aecore.scoring import evaluation
        from aecore.training import clock, loop, starting

        images.silence_pillow()
        # The settings of a network need not be repeated to go on from it.
        chosen = starting.with_its_network(chosen, experiment.model)
        summary = loop.train(chosen, started=_STARTED)
        if jax.process_index() > 0:  # Only the first process prints.
            return
        run = chosen.directory
        _say(
            f"\n{summary['name']}: {summary['steps']:,} steps, {summary['epochs']:.4g} epochs in "
            f"{summary['seconds']:.0f} s, {summary['images_per_second']:,.1f} images/s "
            f"on {summary['devices']} x {summary['device']}\n"
            f"{summary['evaluation']['images']:,} validation images, "
            f"checkpoint of step {summary['evaluation']['step']:,}\n\n"
            f"{evaluation.table(summary['evaluation'], summary['baseline'])}\n\n"
            f"{clock.table(summary['time'])}\n\n"
            f"checkpoints  {run}/checkpoints\n"
            f"pictures     {run}/samples.png  {run}/curves.png\n"
            f"scores       {run}/summary.json\n\n"
            "Next: aecore restore "
            f"{shlex.quote(f'{run}/example.png')} -o restored.png -m {shlex.quote(run)}"
        )
        if then is not None:
            then(chosen)


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains an experiment that comes with aecore, or one of your own.

    Settings of the experiment may follow, such as --data PHOTOS --training.steps 500; --help after
    its name lists them. It does what `python` does with the experiment's file.
    """

    experiment: tyro.conf.Positional[str]
    """An experiment's name, or a file, such as `aecore init` writes."""

    def run(self, flags: Sequence[str]) -> int:
        from aecore.experiments import catalogue

        defined = catalogue.load(self.experiment)
        main(defined.experiment, flags, defined.then, prog=f"aecore train {self.experiment}")
        return 0

    @classmethod
    def help(cls) -> str:
        """The docstring, and a line about each experiment."""
        from aecore.experiments import catalogue

        known = catalogue.entries()
        width = max(len(entry.name) for entry in known)
        lines = [f"  {entry.name:{width}}  {entry.about}" for entry in known]
        return "\n".join([inspect.getdoc(cls) or "", "", *lines])


@dataclasses.dataclass(frozen=True)
class Init:
    """Writes an experiment file to change and to train."""

    file: tyro.conf.Positional[str]
    """The file to write, such as mine.py."""
    experiment: str = "denoise"
    """The experiment that it begins as; `aecore train --help` lists them."""

    def run(self) -> int:
        from aecore.experiments import catalogue
        from aecore.storage import exists, to_path, write_whole

        path = to_path(self.file)
        if path.suffix != ".py":
            raise ConfigError(f"{path} doesn't end in .py; name a Python file, such as mine.py")
        if exists(path):
            raise ConfigError(f"{path} exists; name another file")
        text = catalogue.template(self.experiment, path)
        write_whole(path, text.encode())
        _say(f"{path}: change what you like, then: aecore train {shlex.quote(str(path))}")
        return 0


@dataclasses.dataclass(frozen=True)
class Restore:
    """Restores pictures with a trained network."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, videos, folders of them, and patterns such as 'pictures/*.png'."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """A file, if there is one input; otherwise a folder, with subfolders as in the inputs."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """A run directory, an exported file or folder, or the name of weights that ship with aecore."""
    recursive: bool = False
    """Also restore files in subfolders."""
    suffix: str = ""
    """Text appended to output file names, before the ending."""
    ext: Literal["auto", "png", "jpg", "webp", "tiff"] = "auto"
    """File format of pictures in the output folder; auto: the same as the input's."""
    quality: int | None = None
    """Quality of JPEG, WebP and AVIF files, 1 to 100. None: JPEGs are compressed as strongly as the
    input, if that is a JPEG; otherwise 95."""
    tile: Literal["auto"] | int = "auto"
    """Large pictures are restored in tiles of this many pixels a side; 0: never."""
    batch_size: int | None = None
    """How many pictures to restore at once, at most; None: chosen for speed."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to compute on."""
    devices: int | None = None
    """How many of them to use; None: all of this machine."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format for computing; auto: bfloat16 on TPUs, float32 elsewhere."""
    strength: float = 1.0
    """How much of the correction is applied, from 0 (none) to 1."""
    consistent: bool = False
    """Change results so that degrading them gives the inputs again; for networks that enlarge, or
    were trained on pixelated or masked images."""
    alpha: Literal["keep", "drop"] = "keep"
    """Whether outputs keep the input's alpha channel, which is never restored."""
    if_exists: Literal["fail", "skip", "overwrite"] = "fail"
    """What to do if output files exist; fail: stop before restoring anything."""
    shard: str | None = None
    """Restore one part of the inputs, such as 1/4, 2/4, 3/4 or 4/4, so that several machines can
    divide them. A file's name alone decides to which part it belongs. In Slurm, with --array=1-4:
    $SLURM_ARRAY_TASK_ID/4."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do when a file can't be restored."""
    compare: bool = False
    """Also write NAME_compare.png, with input and output side by side."""
    report: str | None = None
    """Write a JSON file that lists what became of each input."""
    dry_run: bool = False
    """Only print what would be written."""

    def run(self) -> int:
        from aecore.media import images
        from aecore.restoring import bulk, files
        from aecore.storage import is_remote, to_path, write_json

        options = bulk.WriteOptions(alpha=self.alpha, compare=self.compare, quality=self.quality)
        shard = files.Shard.parse("1/1" if self.shard is None else self.shard)
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
        failures = [failure for failure in failures if shard.holds(failure)]
        jobs, skipped = files.to_do(
            [job for job in jobs if shard.holds(job)],
            comparing=self.compare,
            if_exists=self.if_exists,
        )
        if self.dry_run:
            for job in jobs:
                _say(f"{job.source} -> {job.target}")
            for failure in failures:
                print(failure, file=sys.stderr)
            return 1 if failures else 0
        images.silence_pillow()
        with _notes_on_stdout(), _interruptible() as is_interrupted:
            restorer = bulk.load(
                self.model,
                tile=self.tile,
                batch_size=self.batch_size,
                precision=self.precision,
                device=None if self.device == "auto" else self.device,
                devices=self.devices,
                strength=self.strength,
                consistent=self.consistent,
            )
            outcomes = []

            def finished_late(outcome):
                outcomes.append(outcome)
                if isinstance(outcome, files.Failure):
                    tqdm.write(str(outcome), file=sys.stderr)

            results = bulk.restore(jobs, restorer, options, late=finished_late)
            total = len(failures) + len(jobs)
            try:
                with contextlib.closing(results):
                    self._collect(
                        itertools.chain(failures, results), outcomes, total, is_interrupted
                    )
            except KeyboardInterrupt:
                raise Interrupted(
                    f"{len(outcomes):,} of {total:,} files are done; "
                    "to continue, run the same command with --if-exists skip"
                ) from None
            finally:
                if self.report is not None:
                    path = to_path(self.report)
                    # If nothing could be restored, the output folder isn't there.
                    if not is_remote(path):
                        path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, bulk.report(outcomes, skipped))
            counts = collections.Counter(type(outcome).__name__ for outcome in outcomes)
            self._say_how_often(outcomes)
        _say(f"{counts['Done']:,} restored, {counts['Failure']:,} failed, {len(skipped):,} skipped")
        return 1 if counts["Failure"] else 0

    def _say_how_often(self, outcomes: Iterable[Any]) -> None:
        """Says of each note, which was printed for one file, how many others it is about."""
        from aecore.restoring.bulk import Done

        notes = collections.Counter(
            note
            for outcome in outcomes
            if isinstance(outcome, Done)
            for note in dict.fromkeys(outcome.notes)
        )
        where = "listed in the report" if self.report is not None else "--report FILE lists them"
        for note, count in notes.items():
            if count > 1:
                others = f"{count - 1:,} more file{'s' if count > 2 else ''}"
                _say(f"note: {others}: {note} ({where})")

    def _collect(
        self,
        results: Iterable[Any],
        outcomes: list[Any],
        total: int,
        is_interrupted: Callable[[], bool],
    ) -> None:
        """Adds results to `outcomes` and reports them as they come.

        Raises:
          KeyboardInterrupt: somebody pressed Ctrl-C, or SIGTERM came.
        """
        from aecore.restoring.files import Failure

        said = set()
        with tqdm(total=total, unit=" files", disable=None) as bar:
            for outcome in results:
                outcomes.append(outcome)
                bar.update()
                if isinstance(outcome, Failure):
                    tqdm.write(str(outcome), file=sys.stderr)
                    if self.on_error == "stop":
                        return
                else:
                    for note in outcome.notes:
                        if note not in said:
                            said.add(note)
                            _say(f"note: {outcome.job.source}: {note}")
                if is_interrupted():
                    raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves a page on which pictures are dropped, restored, compared and downloaded."""

    model: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["-m"])]
    """A run directory, an exported file, or the name of weights that ship with aecore. Given
    several times, visitors choose; the first is the default."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can reach the page. 0.0.0.0: others can,
    without a password."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """What visitors may ask for."""
    tile: Literal["auto"] | int = "auto"
    """Large pictures are restored in tiles of this many pixels a side; 0: never."""
    batch_size: int | None = None
    """How many pictures to restore at once, at most; None: chosen for speed."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to compute on."""
    devices: int | None = None
    """How many of them to use; None: all of this machine."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format for computing; auto: bfloat16 on TPUs, float32 elsewhere."""

    def run(self) -> int:
        from aecore.media import images
        from aecore.restoring import bulk

        try:
            from aecore.serving import server
        except ImportError as error:
            raise ConfigError(
                f'serving needs the package {error.name}: pip install "aecore[serve]"'
            ) from error
        if not self.model:
            raise ConfigError("no network; name one, as by -m photo-denoise")
        restorers = {
            model: bulk.load(
                model,
                tile=self.tile,
                batch_size=self.batch_size,
                precision=self.precision,
                device=None if self.device == "auto" else self.device,
                devices=self.devices,
            )
            for model in self.model
        }
        images.silence_pillow()
        server.serve(restorers, host=self.host, port=self.port, limits=self.limits)
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a trained network to one file, which runs without Flax and orbax, or in ONNX Runtime;
    or as a page, in which visitors' browsers restore their pictures themselves.

    An ONNX file needs no JAX either. It takes images of any size, `(batch, height, width,
    channels)` float32 in [0, 1], and restores them as `aecore.Restorer` does.
    """

    model: tyro.conf.Positional[str]
    """A run directory, an exported file or folder, or the name of weights that ship with aecore."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """The file to write; for safetensors and web, a folder. A file that exists is replaced only if
    its name ends in .aecore, or in .onnx for onnx."""
    format: Literal["auto", "stablehlo", "onnx", "weights", "safetensors", "web"] = "auto"
    """stablehlo: the network's functions, compiled by JAX on any machine. onnx: for ONNX Runtime
    and other programs. weights: parameters alone, small and lasting; a model of your own must then
    be given when they are loaded. safetensors: a folder with a model card, as hubs take it. web: a
    folder that any web server can serve, in which the browser computes everything, with ONNX
    Runtime. auto: onnx if the file's name ends in .onnx, else stablehlo."""
    parameters: Literal["float32", "bfloat16"] | None = None
    """Number format of the parameters, for stablehlo and weights alone; bfloat16 makes the file
    half as large. None: as they are."""
    runtime: str | None = None
    """For web, the file that `npm pack onnxruntime-web@1.30.0` writes; None: it is downloaded."""

    def run(self) -> int:
        from aecore.saved import exported, hub, weights
        from aecore.storage import exists, to_path

        path = to_path(self.output)
        form = self.format
        if form == "auto":
            form = "onnx" if path.suffix.lower() == ".onnx" else "stablehlo"
        if self.runtime is not None and form != "web":
            raise ConfigError("--runtime is for --format web alone; leave it out")
        if self.parameters is not None and form not in ("stablehlo", "weights"):
            raise ConfigError(
                f"--parameters {self.parameters} can't be had with --format {form}; leave it out"
            )
        if form not in ("safetensors", "web"):
            if path.is_dir():
                raise ConfigError(f"{path} is a folder; name a file")
            ending = ".onnx" if form == "onnx" else ".aecore"
            # Any other file may be something else, such as a picture.
            if path.suffix.lower() != ending and exists(path):
                raise ConfigError(f"{path} exists and doesn't end in {ending}; name another file")
        trained = weights.load(self.model)
        if form == "safetensors":
            hub.save(path, trained)
            _say(f"{path}: {hub.WEIGHTS}, {hub.CONFIG}, {hub.CARD}")
            return 0
        if form == "web":
            return self._write_page(path, trained)
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "onnx":
            exported.export_onnx(path, trained)
        else:
            exported.save(
                path,
                trained,
                with_functions=form != "weights",
                parameters=self.parameters,
            )
        _say(f"{path}: {path.stat().length:,} bytes")
        return 0

    def _write_page(self, folder: Any, trained: Any) -> int:
        from aecore.serving import site

        site.write(folder, trained, name=self.model, package=self.runtime)
        quoted = shlex.quote(str(folder))
        _say(f"{folder}: try it with python -m http.server --bind 127.0.0.1 -d {quoted}")
        return 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """Prints a network's layers, what it was trained on, and its scores."""

    model: tyro.conf.Positional[str]
    """A run directory, an exported file or folder, or the name of weights that ship with aecore."""

    def run(self) -> int:
        from aecore.restoring.restorer import Restorer

        _say(Restorer.load(self.model).summary())
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores a network beside classical methods: on its run's validation images, or any pictures.

    With --data, pictures are degraded whole, at their own sizes, restored and compared with the
    originals, as papers on image restoration do; the protocol is printed with the scores.
    """

    model: tyro.conf.Positional[str]
    """A run directory; with --data also an exported file, or the name of weights that ship with
    aecore."""
    data: str | None = None
    """A folder of pictures, or of pairs in its folders degraded and original; None: the run's own
    validation images."""
    degradation: str | None = None
    """What is done to the pictures, as in Python: 'GaussianNoise(25 / 255, clip=False)'. None: what
    the network was trained to undo, and nothing to pairs."""
    csv: str | None = None
    """With --data, a file to write each picture's scores to."""
    pictures: str | None = None
    """With --data, a PNG file to show the best, median and worst results in."""
    data_dir: str | None = None
    """Folder of the run's own data, if they have moved since the training."""
    batch_size: int | None = None
    """Images per call; None: a fast number."""
    classical: bool = True
    """Also score classical methods. They are tuned on training images; with --data, on the middles
    of the first pictures that are scored, which favours them."""
    methods: tuple[str, ...] | None = None
    """Classical methods to score, such as median or "total variation"; None: all that are
    installed. BM3D takes seconds per image."""
    save: bool = False
    """Add the scores to the run's summary.json, and write ranked.png with the best, median and
    worst results, unless it was trained on crops."""
    json: str | None = None
    """File to write the scores to."""

    def run(self) -> int:
        from aecore import degradations
        from aecore.media import images
        from aecore.scoring import evaluation, pictures
        from aecore.scoring.evaluate import evaluate

        file = _writable(self.json)
        if self.methods and not self.classical:
            raise ConfigError("--methods and --no-classical contradict each other; leave one out")
        if self.pictures is not None and not self.pictures.lower().endswith(".png"):
            raise ConfigError(
                f"--pictures {self.pictures} is not named .png, as the PNG file that it will be"
            )
        if self.data is not None:
            pictures.check_outputs(self.data, (self.csv, self.pictures, self.json))
        images.silence_pillow()
        scores = evaluate(
            self.model,
            data=self.data,
            data_dir=self.data_dir,
            batch_size=self.batch_size,
            degradation=None if self.degradation is None else degradations.parse(self.degradation),
            classical=self.methods or self.classical,
            save=self.save,
            csv=self.csv,
            pictures=self.pictures,
            progress=True,
        )

        def table(scores):
            step = scores["evaluation"]["step"]
            what = "validation images" if self.data is None else f"pictures of {self.data}"
            lines = [
                f"{self.model}: {scores['evaluation']['images']:,} {what}"
                + ("" if step is None else f", checkpoint of step {step:,}")
            ]
            if "protocol" in scores:
                lines.append(scores["protocol"])
            scores = {name: scores[name] for name in scores if name != "protocol"}
            return "\n".join([*lines, "", evaluation.table(**scores)])

        return _show(scores, table, file)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predicts memory and speed of training on devices that you don't have, such as a TPU slice.

    Compiles the training step for the devices, and reports memory, operations, limits on the
    speed, and the largest batch that fits. Settings of the experiment, such as
    --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """An experiment's file, or its name; `aecore train --help` lists them."""
    topology: str
    """A TPU slice, such as v5e:4x4 or tpu7x:2x2x1; or cpu or gpu for this machine's devices."""
    slices: int = 1
    """How many such slices there are, connected by the data centre's network."""
    json: str | None = None
    """File to write the figures to."""

    def run(self, flags: Sequence[str]) -> int:
        import jax

        from aecore.measuring import planning
        from aecore.storage import write_json

        file = _writable(self.json)
        if self.topology not in ("cpu", "gpu"):
            # Compiling for a slice needs no device of this machine, for which libtpu might wait.
            jax.config.update("jax_platforms", "cpu")
            # Programs for devices that don't exist can be written to the cache, but not read.
            jax.config.update("jax_enable_compilation_cache", False)
        experiment = _experiment(self.experiment, flags)
        plan = planning.plan(
            experiment,
            self.topology,
            slices=self.slices,
            show=_say,
            progress=lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
        )
        if file is not None:
            write_json(file, dataclasses.asdict(plan))
        return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures how many images per second an experiment does on this machine.

    Measures the input pipeline, the training step, the whole loop, and restoring. Settings of the
    experiment, such as --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """An experiment's file, or its name; `aecore train --help` lists them."""
    json: str | None = None
    """File to write the figures to."""
    seconds: float = 2.0
    """About how long each measurement lasts."""
    repeats: int = 5
    """How often each measurement is repeated, in turns with the others."""

    def run(self, flags: Sequence[str]) -> int:
        from aecore.measuring import benchmarking

        file = _writable(self.json)
        experiment = _experiment(self.experiment, flags)
        report = benchmarking.bench(experiment, seconds=self.seconds, repeats=self.repeats)
        return _show(report, benchmarking.table, file)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt; yields a function that says if one came.

    The exception alone isn't enough: raised within a callback, it would be lost.
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


def _say(line: str) -> None:
    """Prints a line above a progress bar. If whoever reads, such as `head`, is gone: nothing."""
    from aecore.storage import naming

    try:
        with naming("standard output"):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _notes_on_stdout() -> Iterator[None]:
    """Prints a restorer's notes on stdout, so that stderr names failures only."""

    class Printing(logging.Handler):
        def emit(self, record):
            _say(f"note: {record.getMessage()}")

    logger, handler = logging.getLogger("aecore.restoring"), Printing()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _experiment(source: str, flags: Sequence[str]) -> Experiment:
    """The experiment of a file or a name, changed by flags, which `aecore train` takes too."""
    from aecore.experiments import catalogue

    default = catalogue.load(source).experiment
    return tyro.cli(Experiment, default=default, args=flags, prog=f"aecore train {source}")


def _writable(file: str | None) -> Any:
    """The path of a file that results are to be written to, refused before the work."""
    from aecore.storage import check_writable, to_path

    if file is None:
        return None
    path = to_path(file)
    check_writable(path)
    return path


def _show(report: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str], file: Any) -> int:
    from aecore.storage import write_json

    if file is not None:  # First, as nobody may be there to read the table.
        write_json(file, report)
    _say(table(report))
    return 0


_COMMANDS = {
    "train": Train,
    "init": Init,
    "restore": Restore,
    "serve": Serve,
    "export": Export,
    "summary": Summary,
    "evaluate": Evaluate,
    "bench": Bench,
    "plan": Plan,
}


def run(args: Sequence[str] | None = None) -> None:
    """The `aecore` command."""
    words = list(sys.argv[1:] if args is None else args)
    # What follows the name of an experiment to train, --help too, is the experiment's.
    is_training = words[:1] == ["train"]
    words, flags = (words[:2], words[2:]) if is_training else (words, [])
    with _exit_status():
        if words == ["--version"]:
            from aecore import __version__

            _say(f"aecore {__version__}")
            return
        commands: Any = Union[  # noqa: UP007 as it is made of a list
            tuple(
                Annotated[
                    command,
                    tyro.conf.subcommand(
                        name,
                        description=Train.help() if is_training and command is Train else None,
                    ),
                ]
                for name, command in _COMMANDS.items()
            )
        ]
        command, unknown = tyro.cli(commands, prog="aecore", args=words, return_unknown_args=True)
        if isinstance(command, (Bench, Plan, Train)):  # Other flags belong to the experiment.
            sys.exit(command.run([*unknown, *flags]))
        if unknown:
            name = unknown[0]
            hint = f"for the file, write ./{name}" if os.path.lexists(name) else "see --help"
            raise ConfigError(f"{name} is not an option of this command; {hint}")
        sys.exit(command.run())


class _AboveBars(logging.Handler):
    """Prints log records on stderr, above a progress bar if there is one."""

    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # Nothing fails for want of a reader.
            self.handleError(record)


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Ends the process with one line on stderr instead of a traceback for expected errors."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # It was closed, as by `>&-`.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # Files' names may be no UTF-8.
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[_AboveBars()])
    # Orbax and TFDS report through absl, and others by themselves, what a user can't act on;
    # failures are raised besides.
    for library in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # Where the cache of compiled programs can't be used, they are compiled anew.
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache")
    # What native threads raise, such as those of a failed save, reaches us as an exception too.
    sys.unraisablehook = lambda _: None
    interrupts.end_if_requested()
    try:
        from aecore.steps import hardware

        hardware.quiet_libtpu()
        hardware.keep_compiled()
        yield
    except AecoreError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(error.exit_status, at_once=isinstance(error, SavingError))
    except Exception as error:
        from aecore.storage import explained, reason_with_path

        line = explained(error)
        if line is None and isinstance(error, OSError):
            line = reason_with_path(error)
        if line is None and not _is_among_others():
            raise
        print(traceback.format_exc() if line is None else f"error: {line}", file=sys.stderr)
        _end(1, at_once=False)
    except KeyboardInterrupt as error:
        print(
            f"interrupted: {error}" if isinstance(error, Interrupted) else "interrupted",
            file=sys.stderr,
        )
        _end(interrupts.STATUS, at_once=not isinstance(error, Interrupted))
    finally:
        interrupts.ignore_at_exit()


def _end(status: int, *, at_once: bool) -> NoReturn:
    """Ends the process.

    Args:
      status: the exit status.
      at_once: without Python's cleanup, in which unfinished saves would report. A process that
        failed among others always ends so, since JAX would wait there for them.
    """
    if not at_once and (status in (0, interrupts.STATUS) or not _is_among_others()):
        sys.exit(status)
    interrupts.end_at_once(status)


def _is_among_others() -> bool:
    """Whether other processes train with this one."""
    import jax

    return jax.distributed.is_initialized()
