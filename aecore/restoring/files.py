"""Finds the files to restore and names their outputs, without reading or writing any."""

import dataclasses
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from etils import epath

from aecore.errors import ConfigError
from aecore.media import images, videos
from aecore.storage import (
    check_writable,
    entries,
    is_free,
    is_remote,
    naming,
    reason,
    resolved,
    sizes,
    to_path,
)

COMPARISON = "_compare.png"
"""Appended to an output's stem to name the picture that compares it with its input."""

_FALLBACK = ".png"
"""Output format for pictures in formats that can be read but not written."""


class Job(NamedTuple):
    """A file to restore."""

    source: epath.Path
    target: epath.Path

    @property
    def comparison(self) -> epath.Path:
        """Path of the picture that shows input and output side by side."""
        return self.target.with_name(self.target.stem + COMPARISON)

    def outputs(self, comparing: bool) -> list[epath.Path]:
        """What is written: the target and, of pictures, the comparison if one is wanted."""
        return [self.target, self.comparison] if comparing and not self.is_video else [self.target]

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in videos.SUFFIXES


class Failure(NamedTuple):
    """A file that could not be restored, and why."""

    source: epath.Path
    reason: str
    target: epath.Path | None = None
    """The job's, if there was one; one source may have several."""

    def __str__(self):
        # A file's name may contain line breaks.
        text = f"{self.source}: {self.reason}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several parts into which inputs are divided, by their names alone."""

    number: int
    """From 1 to `count`."""
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads `I/N`, such as `1/4` for the first of four.

        Raises:
          ConfigError: it is something else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"shard {text} is not possible; use I/N with I from 1 to N, such as 1/4 to 4/4"
            )
        return cls(int(match[1]), int(match[2]))

    def holds(self, item: Job | Failure) -> bool:
        """Whether a file, or an input that can't be restored, belongs to this part."""
        # CRC-32 would put numbered files into few of 2, 4 or 8 parts.
        digest = hashlib.blake2b(os.fsencode(item.source), digest_size=8).digest()
        return int.from_bytes(digest) % self.count == self.number - 1


def find(
    inputs: Sequence[str], output: str, *, recursive: bool, suffix: str, extension: str
) -> tuple[list[Job], list[Failure]]:
    """Finds the files that inputs name, and names their outputs.

    Args:
      inputs: files; folders; patterns such as `pictures/*.png`.
      output: a file, if the inputs name one file; else, or with a slash at its end, a folder, in
        which folders keep their structure, and in which no inputs are looked for unless they are
        named there.
      recursive: whether folders within folders are searched.
      suffix: appended to the stems of files in the output folder; empty if the output is a file.
      extension: the ending of pictures in it, without the dot; or `auto` for the input's own, and
        if the output is a file.

    Returns:
      Jobs, and the inputs that can't be restored.

    Raises:
      ConfigError: nothing was named, or an empty text; the output can't be written, or it is one
        file where the inputs may be several, or where its name is to be changed; or as for
        `check_naming`.
    """
    if not inputs:
        raise ConfigError("no input; name pictures or folders of pictures")
    if not all(inputs):
        raise ConfigError("an input is empty; name pictures or folders")
    if not output:
        raise ConfigError("no output; name a file or a folder")
    check_naming(suffix=suffix, extension=extension)
    folder = to_path(output)
    found, failures = [], []
    for name in inputs:
        for item in _expand(name, recursive, resolved(folder)):
            (failures if isinstance(item, Failure) else found).append(item)
    several = len(inputs) > 1 or len(found) > 1 or to_path(inputs[0]).is_dir()
    # Paths don't keep a slash at their end.
    is_folder = output.endswith(("/", os.sep)) or folder.is_dir()
    ending = "" if is_folder else folder.suffix.lower()
    if several and (ending in videos.SUFFIXES or images.can_write(ending)):
        raise ConfigError(
            f"{folder} would be one file, but the input may be several; name a folder instead"
        )
    if found and ending and not several:
        job = Job(found[0][0], folder)
        if not (ending in videos.SUFFIXES if job.is_video else images.can_write(ending)):
            raise ConfigError(
                f"{folder}: {'videos' if job.is_video else 'pictures'} can't be written with the "
                f"ending {folder.suffix!r}; use {'.mp4 or .mkv' if job.is_video else '.png'}"
            )
        if suffix or extension != "auto":
            raise ConfigError(
                f"{folder} is the whole name of the one output; leave out --suffix and --ext, or "
                "name a folder"
            )
        return [job], failures
    jobs = {}
    for source, relative in found:
        target = output_path(folder / relative, suffix=suffix, extension=extension)
        jobs.setdefault((resolved(source), target), Job(source, target))
    # Outputs of an earlier run that lie beside their inputs aren't restored again.
    outputs = {resolved(job.target) for job in jobs.values()} if suffix else set()
    return [job for job in jobs.values() if resolved(job.source) not in outputs], failures


def check_naming(*, suffix: str, extension: str) -> None:
    """Raises ConfigError if no output can be called so, with `find`'s options."""
    if {"/", os.sep} & set(suffix):
        raise ConfigError(f"suffix {suffix!r} contains a slash; use --output for folders")
    if extension != "auto" and not images.can_write(f".{extension}"):
        raise ConfigError(
            f"pictures can't be written with the extension {extension!r}; use 'auto', or an ending "
            "without its dot, such as 'png', 'jpg', 'webp' or 'tiff'"
        )


def output_path(path: epath.Path, *, suffix: str = "", extension: str = "auto") -> epath.Path:
    """What an output is called that would have the name of its input, with `find`'s options."""
    is_video = path.suffix.lower() in videos.SUFFIXES
    ending = path.suffix if extension == "auto" or is_video else f".{extension}"
    if not is_video and not images.can_write(ending):
        ending = _FALLBACK
    return path.with_name(f"{path.stem}{suffix}{ending}")


def check(jobs: Sequence[Job], *, comparing: bool, overwrite: bool, report: str | None) -> None:
    """Refuses outputs that would collide with each other or with inputs, or can't be files.

    An input may be overwritten if that was asked for by naming it as the one output.

    Args:
      jobs: what `find` gave.
      comparing: whether comparisons are written.
      overwrite: whether outputs may exist.
      report: a report that is written, too.

    Raises:
      ConfigError: two files would have the same name, or one can't be written.
      OSError: a remote file system can't be reached.
    """
    sources = {resolved(job.source): job.source for job in jobs}
    named = {}
    for job in jobs:
        for target in job.outputs(comparing):
            place = resolved(target)
            if place in named:
                raise ConfigError(
                    f"{named[place]} and {job.source} would both become {target}; choose "
                    "another --suffix or --ext, or restore them into different folders"
                )
            named[place] = job.source
            may_overwrite = len(jobs) == 1 and target == job.target
            if place in sources and not (overwrite and may_overwrite):
                hint = ", or use --if-exists overwrite" if may_overwrite else ""
                raise ConfigError(
                    f"{sources[place]} would be overwritten; choose another output or a "
                    f"--suffix{hint}"
                )
            with naming(target):
                if not is_free(target):
                    raise ConfigError(f"{target} exists and is not a regular file; name another")
                if is_remote(target):  # Buckets have no folders that must exist.
                    continue
            in_the_way = next((p for p in target.parents if p.exists()), None)
            if in_the_way is not None and not in_the_way.is_dir():
                raise ConfigError(f"{in_the_way} is not a folder; choose another output")
    if report is not None:
        path = to_path(report)
        if resolved(path) in named or resolved(path) in sources:
            raise ConfigError(f"{path} is an input or an output; choose another report file")
        # Folders of outputs are made if they are missing.
        made = {resolved(folder) for job in jobs for folder in job.target.parents}
        if resolved(path.parent) not in made or not is_free(path):
            check_writable(path)


def to_do(
    jobs: Sequence[Job], *, comparing: bool, if_exists: Literal["fail", "skip", "overwrite"]
) -> tuple[list[Job], list[Job]]:
    """Divides jobs by whether their outputs exist.

    Args:
      jobs: what `find` gave.
      comparing: whether comparisons are written.
      if_exists: what to do with jobs whose outputs exist.

    Returns:
      Jobs to do, and those to skip.

    Raises:
      ConfigError: an output exists, and `if_exists` is fail.
      OSError: a remote file system can't be reached.
    """
    outputs = [job.outputs(comparing) for job in jobs]
    there = sizes(itertools.chain.from_iterable(outputs))
    if there and if_exists == "fail":
        first = next(path for paths in outputs for path in paths if path in there)
        more = f", and {len(there) - 1} more" if len(there) > 1 else ""
        raise ConfigError(f"{first} exists{more}; use --if-exists skip or --if-exists overwrite")
    if if_exists == "overwrite":
        return list(jobs), []
    remaining, skipped = [], []
    for job in jobs:
        # A comparison alone can be from a run that ended between the two.
        (skipped if job.target in there else remaining).append(job)
    return remaining, skipped


def _expand(
    name: str, recursive: bool, excluded: str
) -> Iterator[tuple[epath.Path, str] | Failure]:
    """Files that an input names, each with its path within the output folder."""
    path = to_path(name)
    if path.is_dir():
        yield from _in_folder(path, "", recursive, excluded)
    elif glob.has_magic(name) and not os.path.lexists(path):
        fixed = _fixed_part(path)
        if is_remote(path):
            matches = sorted(map(os.fspath, fixed.glob(os.fspath(path.relative_to(fixed)))))
        else:
            matches = sorted(glob.glob(os.fspath(path), recursive=True))  # noqa: PTH207
        found = [epath.Path(match) for match in matches]
        # A pattern that begins in the output folder is for the files there.
        if not _lies_in(fixed, excluded):
            found = [match for match in found if not _lies_in(match.parent, excluded)]
        if not found:
            yield Failure(path, "matches no file")
        for match in found:
            within = os.fspath(match.relative_to(fixed))
            if not match.is_dir():
                yield match, within
            elif _looks_like_picture(match):
                yield Failure(match, "is a folder")
    else:
        yield path, path.name


def _in_folder(
    folder: epath.Path, within: str, recursive: bool, excluded: str
) -> Iterator[tuple[epath.Path, str] | Failure]:
    try:
        found = entries(folder)
    except OSError as error:
        yield Failure(folder, f"can't be read: {reason(error)}")
        return
    holds_pictures = False
    for path, is_folder in found:
        relative = os.path.join(within, path.name)  # noqa: PTH118
        if path.name.startswith("."):
            continue
        if is_folder and not os.path.islink(path):  # noqa: PTH114
            if recursive and resolved(path) != excluded:
                holds_pictures = True
                yield from _in_folder(path, relative, recursive, excluded)
            elif _looks_like_picture(path):
                yield Failure(path, "is a folder; with --recursive, it is searched too")
        elif _looks_like_picture(path):
            holds_pictures = True
            yield path, relative
    if not holds_pictures and (_looks_like_picture(folder) or not within):
        hint = "" if recursive else "; with --recursive, folders within it are searched too"
        what = "is a folder that holds no pictures, by the endings of its files"
        yield Failure(folder, what + hint)


def _lies_in(folder: epath.Path, excluded: str) -> bool:
    return epath.Path(resolved(folder)).is_relative_to(excluded)


def _looks_like_picture(path: epath.Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES | videos.SUFFIXES


def _fixed_part(path: epath.Path) -> epath.Path:
    """The folders of a pattern before its first wildcard."""
    fixed = epath.Path(path.anchor)
    for part in path.parts[len(fixed.parts) : -1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
