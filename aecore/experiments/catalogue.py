"""Experiment files by name, and new ones made of them.

An experiment file is a Python program that defines `experiment`; if it also defines a function
`then`, that is called with the experiment after its training. Those that come with aecore lie in
`experiments/` beside the package in a clone, and within the package where it was installed.
"""

import ast
import dataclasses
import runpy
import sys
from collections.abc import Callable

from etils import epath

from aecore.config import Experiment
from aecore.errors import ConfigError

_HERE = epath.resource_path("aecore.experiments")
_INSTALLED, _CLONED = _HERE / "files", _HERE.parent.parent / "experiments"

_DEFINES = "\nexperiment = Experiment("


@dataclasses.dataclass(frozen=True)
class Entry:
    """An experiment that comes with aecore."""

    name: str
    """Its file's name with dashes, without `photo-` or `my-` before it."""
    path: epath.Path
    about: str
    """The first line of the file."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """What an experiment file defines."""

    experiment: Experiment
    then: Callable[[Experiment], None] | None


def entries() -> list[Entry]:
    """The experiments that come with aecore, sorted by name."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CLONED
    found = []
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if _DEFINES in text:
            about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            found.append(Entry(_name(path.stem), path, about))
    return sorted(found, key=lambda entry: entry.name)


def _name(text: str) -> str:
    return text.replace("_", "-").removeprefix("photo-").removeprefix("my-")


def find(source: str) -> epath.Path:
    """The file of an experiment.

    Args:
      source: a file, or the name of one that comes with aecore, such as `denoise`, `photo-denoise`
        or `photo_denoise`.

    Raises:
      ConfigError: there is neither.
    """
    path = epath.Path(source)
    if path.suffix == ".py" and path.is_file():
        return path
    known = {entry.name: entry.path for entry in entries()}
    if _name(source) in known:
        return known[_name(source)]
    if path.suffix == ".py":
        raise ConfigError(f"{source} does not exist; name a file, or one of {', '.join(known)}")
    raise ConfigError(
        f"{source} is neither an experiment file that ends in .py nor one of {', '.join(known)}"
    )


def load(source: str) -> Definition:
    """Runs an experiment file, except what it does as a program of its own.

    Args:
      source: as for `find`.

    Raises:
      ConfigError: there is no such file, or it defines no experiment.
    """
    path = find(source)
    # As Python does for a program: it may import its neighbours, also while it trains.
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, folder)
    defined = runpy.run_path(str(path))
    experiment = defined.get("experiment")
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"{path} doesn't define `experiment`; `aecore init FILE` writes a file that does"
        )
    return Definition(experiment, defined.get("then"))


def template(source: str, path: epath.Path) -> str:
    """The text of a new experiment file that begins as a copy of another.

    Args:
      source: the other, as for `find`.
      path: where the new file will be. Its name becomes the experiment's, so that its run directory
        is another one.
    """
    old = find(source)
    text = old.read_text(encoding="utf-8")
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    start = 0 if ast.get_docstring(tree) is None else tree.body[0].end_lineno
    about = (
        f'"""An experiment of your own, made from {old.stem}; change what you like.\n\n'
        f"    python {path}\n"
        f"    python {path} --help\n"
        '"""\n'
    )
    body = "".join(lines[start:])
    return about + body.replace(f'name="{old.stem}"', f'name="{path.stem}"', 1)
