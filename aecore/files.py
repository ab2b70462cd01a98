"""Which files are restored, and what becomes of each; nothing is read or written."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath
from PIL import Image

from aecore import images, videos
from aecore.errors import ConfigError

COMPARISON = "_compare.png"
"""What is appended to an output's stem to name the comparison with its input."""

_FALLBACK = ".png"
"""For pictures in formats that Pillow reads but doesn't write."""


class Job(NamedTuple):
    """A file to restore."""

    source: epath.Path
    target: epath.Path

    @property
    def comparison(self) -> epath.Path:
        """Where a picture of both goes, if one is wanted."""
        return self.target.with_name(self.target.stem + COMPARISON)

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in videos.SUFFIXES


class Failure(NamedTuple):
    """A file that could not be restored, and why."""

    source: epath.Path
    reason: str

    def __str__(self):
        return f"{self.source}: {self.reason}"


def find(
    inputs: Sequence[str], output: str, *, recursive: bool, suffix: str, extension: str
) -> tuple[list[Job], list[Failure]]:
    """Finds the files that inputs name, and names their outputs.

    Args:
      inputs: files; folders; patterns such as `pictures/*.png`.
      output: a file, if there is one input that is a file; else a folder, in which folders keep
        their structure.
      recursive: whether folders within folders are searched.
      suffix: appended to the stems of files in the output folder.
      extension: the ending of outputs, without its dot; or `auto` for the inputs' own.

    Returns:
      Jobs, and what was named but can't be a job.

    Raises:
      ConfigError: nothing was named; or outputs would collide with each other or with inputs.
    """
    if not inputs:
        raise ConfigError("no input; name pictures or folders of pictures")
    folder = epath.Path(output).expanduser()
    found, failures = [], []
    for name in inputs:
        for item in _expand(name, recursive):
            (failures if isinstance(item, Failure) else found).append(item)
    is_one_file = len(inputs) == 1 and len(found) == 1 and found[0][0].name == found[0][1]
    if is_one_file and folder.suffix and not folder.is_dir() and not _is_pattern(inputs[0]):
        return [Job(found[0][0], folder)], failures
    jobs = []
    for source, relative in found:
        ending = source.suffix if extension == "auto" else f".{extension}"
        if ending.lower() not in videos.SUFFIXES and not _is_written(ending):
            ending = _FALLBACK
        target = folder / relative
        jobs.append(Job(source, target.with_name(f"{source.stem}{suffix}{ending}")))
    return jobs, failures


def check(jobs: Sequence[Job], *, comparing: bool, overwrite: bool) -> None:
    """Refuses outputs that would collide with each other or with inputs.

    An input may be overwritten if that was asked for by naming it as the one output.

    Raises:
      ConfigError: there are such.
    """
    sources = {_resolved(job.source): job.source for job in jobs}
    named = {}
    for job in jobs:
        for target in [job.target] + [job.comparison] * comparing:
            resolved = _resolved(target)
            if resolved in named:
                raise ConfigError(
                    f"{named[resolved]} and {job.source} would both become {target}; choose "
                    "another --suffix or --ext, or restore them into different folders"
                )
            named[resolved] = job.source
            if resolved in sources and not (overwrite and len(jobs) == 1 and target == job.target):
                raise ConfigError(
                    f"{sources[resolved]} would be overwritten; choose another output or a --suffix"
                )


def _expand(name: str, recursive: bool) -> Iterator[tuple[epath.Path, str] | Failure]:
    """Files that an input names, each with its path within the output folder."""
    path = epath.Path(name).expanduser()
    if path.is_dir():
        yield from _in_folder(path, "", recursive)
    elif _is_pattern(name) and not os.path.lexists(path):
        matches = sorted(glob.glob(os.fspath(path), recursive=True))  # noqa: PTH207
        if not matches:
            yield Failure(path, "matches no file")
        fixed = _fixed_part(path)
        for match in map(epath.Path, matches):
            within = os.fspath(match.relative_to(fixed))
            if not match.is_dir():
                yield match, within
            elif _looks_like_picture(match):
                yield from _in_folder(match, within, recursive)
    else:
        yield path, path.name


def _in_folder(
    folder: epath.Path, within: str, recursive: bool
) -> Iterator[tuple[epath.Path, str] | Failure]:
    found = False
    for path in sorted(folder.iterdir()):
        relative = os.path.join(within, path.name)  # noqa: PTH118
        if path.name.startswith("."):
            continue
        if path.is_dir() and not os.path.islink(path):  # noqa: PTH114
            if recursive or _looks_like_picture(path):
                for item in _in_folder(path, relative, recursive):
                    found = True
                    yield item
        elif _looks_like_picture(path):
            found = True
            yield path, relative
    if not found and (_looks_like_picture(folder) or not within):
        hint = "" if recursive else "; with --recursive, folders within it are searched too"
        yield Failure(folder, f"is a folder that holds no pictures{hint}")


def _looks_like_picture(path: epath.Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES | videos.SUFFIXES


def _is_written(ending: str) -> bool:
    return Image.registered_extensions().get(ending.lower()) in Image.SAVE


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def _fixed_part(path: epath.Path) -> epath.Path:
    """The folders of a pattern before its first wildcard."""
    fixed = epath.Path(path.anchor)
    for part in path.parts[len(fixed.parts) : -1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _resolved(path: epath.Path) -> str:
    return os.path.realpath(path)
