"""The command line: `aecore restore | evaluate | bench | plan`, and `main` of experiment files."""

import contextlib
import dataclasses
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

import tyro
from etils import epath
from tqdm import tqdm

from aecore.config import Experiment
from aecore.errors import AecoreError, ConfigError, ImageError, Interrupted


def main(experiment: Experiment, args: Sequence[str] | None = None) -> None:
    """Trains an experiment, changed by what the command line says, and exits.

    Args:
      experiment: gives every flag its default.
      args: the command line's words; those of the process by default.
    """
    with _exit_status():
        chosen = tyro.cli(Experiment, default=experiment, args=args)
        import jax

        from aecore import evaluation, training

        summary = training.train(chosen)
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


@dataclasses.dataclass(frozen=True)
class Restore:
    """Restores pictures with a trained network."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, and folders of pictures, which are read recursively."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """A picture, if there is one input; else a folder, in which folders keep their structure."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """The run directory that holds the network."""

    def run(self) -> int:
        from aecore import images
        from aecore.restoration import Restorer

        pairs = self._pairs()
        restorer = Restorer.load(self.model)
        failures = 0
        for source, target in tqdm(pairs, unit=" pictures", disable=len(pairs) == 1):
            try:
                restored = restorer(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                images.save(restored, target)
            except (ImageError, OSError) as error:
                message = str(error)
                if self._one_picture():
                    raise
                tqdm.write(
                    message if str(source) in message else f"{source}: {message}", file=sys.stderr
                )
                failures += 1
        return 1 if failures else 0

    def _one_picture(self) -> bool:
        return len(self.inputs) == 1 and not epath.Path(self.inputs[0]).is_dir()

    def _pairs(self) -> list[tuple[epath.Path, epath.Path]]:
        """Inputs and the outputs that they become."""
        from aecore import images

        if not self.inputs:
            raise ConfigError("no input; name pictures or folders of pictures")
        pairs = []
        output = epath.Path(self.output)
        for path in map(epath.Path, self.inputs):
            if path.is_dir():
                found = images.find(path)
                if not found:
                    raise ConfigError(f"{path} holds no pictures")
                pairs += [(picture, output / picture.relative_to(path)) for picture in found]
            elif not path.exists():
                raise ConfigError(f"{path} does not exist")
            elif self._one_picture() and output.suffix and not output.is_dir():
                pairs.append((path, output))
            else:
                pairs.append((path, output / path.name))
        sources = {}
        for source, target in pairs:
            if source.resolve() == target.resolve():
                raise ConfigError(f"{source} would be overwritten; choose another output")
            if target in sources:
                raise ConfigError(f"{sources[target]} and {source} would both become {target}")
            sources[target] = source
        return pairs


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores a run's best checkpoint on its validation images."""

    run_dir: tyro.conf.Positional[str]
    """The run directory."""
    data_dir: str | None = None
    """Where the data are now; None: where they were."""
    batch_size: int | None = None
    """Images at a time; None: as in training."""

    def run(self) -> int:
        from aecore import evaluation

        scores = evaluation.evaluate(
            self.run_dir, data_dir=self.data_dir, batch_size=self.batch_size
        )
        print(
            f"{self.run_dir}: {scores['evaluation']['images']:,} validation images, "
            f"checkpoint of step {scores['evaluation']['step']:,}\n\n"
            f"{evaluation.table(scores['evaluation'], scores['baseline'])}"
        )
        return 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles an experiment's training step for some devices, and says what it needs there.

    Flags of the experiment, such as --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """The experiment's file, as experiments/lfw_enhance.py."""
    topology: str
    """A TPU slice, such as v5e:4x4, which need not be there; or cpu or gpu, for this machine's."""
    json: str | None = None
    """A file to write the figures to."""

    def run(self, flags: Sequence[str]) -> int:
        import jax

        from aecore import planning

        if self.topology not in ("cpu", "gpu"):
            # Compiling for a slice needs no device of this machine, which libtpu may wait for.
            jax.config.update("jax_platforms", "cpu")
        experiment = _experiment(self.experiment, flags)
        report = planning.plan(experiment, _image_shape(experiment), self.topology)
        return _show(report, planning.table, self.json)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures an experiment's throughput here: its pipeline, its step, its loop, restoring.

    Flags of the experiment, such as --training.batch-size 512, may follow.
    """

    experiment: tyro.conf.Positional[str]
    """The experiment's file, as experiments/lfw_enhance.py."""
    json: str | None = None
    """A file to write the figures to."""
    seconds: float = 2.0
    """How long each measurement lasts, about."""
    repeats: int = 5
    """How often each is repeated, taking turns."""

    def run(self, flags: Sequence[str]) -> int:
        from aecore import benchmarking

        experiment = _experiment(self.experiment, flags)
        report = benchmarking.bench(experiment, seconds=self.seconds, repeats=self.repeats)
        return _show(report, benchmarking.table, self.json)


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
    from aecore import data

    return data.load(experiment.data).image_shape


def _show(
    report: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str], file: str | None
) -> int:
    print(table(report))
    if file is not None:
        epath.Path(file).write_text(json.dumps(report, indent=2) + "\n")
    return 0


_COMMANDS = {"restore": Restore, "evaluate": Evaluate, "bench": Bench, "plan": Plan}


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
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Orbax and TFDS report through absl what a user can't act on.
    logging.getLogger("absl").setLevel(logging.ERROR)
    _keep_compiled_programs()
    try:
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
        cache = os.environ.get("XDG_CACHE_HOME") or epath.Path("~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(cache) / "aecore" / "jax"))
        # Small networks compile in less time than JAX thinks worth keeping.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
