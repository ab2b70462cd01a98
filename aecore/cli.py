"""The command line: `aecore restore | evaluate`, and `main` for experiment files."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

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


def run(args: Sequence[str] | None = None) -> None:
    """The `aecore` command."""
    with _exit_status():
        command = tyro.extras.subcommand_cli_from_dict(
            {"restore": Restore, "evaluate": Evaluate}, prog="aecore", args=args
        )
        sys.exit(command.run())


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Ends the process with one line on stderr, instead of a traceback, for aecore's own errors."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Orbax and TFDS report through absl what a user can't act on.
    logging.getLogger("absl").setLevel(logging.ERROR)
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
