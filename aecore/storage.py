"""Paths, local or `gs://`, and files that appear whole or not at all."""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO, TypeGuard

from etils import epath

from aecore.errors import AecoreError, ConfigError

REQUESTS = 32
"""Requests to a remote file system at the same time, as each takes long to be answered."""

_PACKAGES = {"gs": ("gcsfs", "'aecore[gcs]'"), "s3": ("s3fs", "s3fs")}
"""For the schemes of addresses, the package that reads them, and what pip installs it by."""


def to_path(path: epath.PathLike) -> epath.Path:
    """A path with `~` expanded; addresses such as `gs://bucket/folder` are paths too.

    Raises:
      ConfigError: it is empty, or an address that can't be read: of a kind such as `https://`, or
        without the package for it.
    """
    if not os.fspath(path):
        raise ConfigError("the name of a file or folder is empty; give one")
    scheme, is_address, _ = os.fspath(path).partition("://")
    if is_address and scheme in _PACKAGES:
        _prepare(scheme)
    try:
        return epath.Path(path).expanduser()
    except KeyError as error:  # That's how etils reports a scheme it doesn't know.
        raise ConfigError(
            f"{os.fspath(path)}: {error.args[0]} addresses can't be read; download the file first"
        ) from error


@functools.cache
def _prepare(scheme: str) -> None:
    package, installed_by = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{scheme}:// addresses need {package}: pip install {installed_by}")
    if scheme == "gs":
        import fsspec.config

        # What other processes write must be seen.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that means the same in any working directory, with `~` expanded.

    Addresses such as `gs://bucket/folder` stay as they are: etils would take them for local paths.

    Raises:
      ConfigError: as for `to_path`.
    """
    expanded = to_path(path)
    return expanded if is_remote(expanded) else expanded.absolute()


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an address such as `gs://bucket/folder`."""
    return "://" in os.fspath(path)


def resolved(path: epath.Path) -> str:
    """A path by which one file is recognised under several names."""
    return os.fspath(path) if is_remote(path) else os.path.realpath(path)


def is_free(path: epath.PathLike) -> bool:
    """Whether a file can be written here: nothing has the name, or a regular file does.

    Buckets hold a file and a folder of one name side by side.
    """
    if is_remote(path):
        return True
    return not os.path.exists(path) or os.path.isfile(path)  # noqa: PTH110, PTH113


def check_writable(path: epath.Path) -> None:
    """Refuses a path where `write_report` can't write, before the work whose results it is for.

    Raises:
      ConfigError: it is a folder, or its folder is missing.
    """
    if is_stream(path):
        return
    # Buckets have no folders that must exist.
    if not is_free(path) or not (is_remote(path) or path.parent.is_dir()):
        raise ConfigError(
            f"{path} can't be written: it is a folder, or its folder is missing; name a file"
        )


def is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether an exception says that a disk or a quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def reason(error: BaseException) -> str:
    """Why something failed, in the words of the exception but without the path in it."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def reason_with_path(error: BaseException) -> str:
    """`reason`, after the path of an exception of the file system that names one."""
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{where}{reason(error)}"


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Has errors of the file system name the path.

    Raises:
      OSError: instead of one that names no file, such as when the disk is full; and instead of what
        remote file systems raise, such as without a network or credentials.
    """
    try:
        yield
    except AecoreError:
        raise
    except Exception as error:  # Of a remote file system, any.
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        if not is_remote(path):
            raise
        if isinstance(error, FileNotFoundError):
            message = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, message, os.fspath(path)) from error
        raise OSError(errno.EIO, _remote_reason(error), os.fspath(path)) from error


def _remote_reason(error: BaseException) -> str:
    why = " ".join(reason(error).split())
    return f"can't be reached; check the network and your credentials ({why:.300})"


def explained(error: Exception) -> str | None:
    """One line about an exception of a remote file system; None for any other exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return None
    modules = [type(error).__module__]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        modules.append(frame.f_globals.get("__name__", ""))
    is_remote_error = any(name.startswith(_REMOTE_LIBRARIES) for name in modules)
    return f"the address {_remote_reason(error)}" if is_remote_error else None


_REMOTE_LIBRARIES = ("aiohttp", "fsspec", "gcsfs", "google.api_core", "google.auth", "google.cloud")
"""Modules whose exceptions these are, or whose code raised them."""


def exists(path: epath.Path) -> bool:
    """Whether there is a file or folder; raises OSError if a remote file system can't tell."""
    with naming(path):
        return path.exists()


def entries(folder: epath.Path) -> list[tuple[epath.Path, bool]]:
    """What a folder holds, ordered by name, each with whether it is a folder, too.

    Raises:
      OSError: it can't be read.
    """
    if not is_remote(folder):
        return [(path, path.is_dir()) for path in sorted(folder.iterdir())]
    with naming(folder):
        found = _listed(folder)
    return sorted((path, entry["type"] == "directory") for path, entry in found.items())


def walk(folder: epath.Path) -> list[epath.Path]:
    """The files in a folder and in those within it; of a bucket, in few requests."""
    if not is_remote(folder):
        return [root / name for root, _, names in folder.walk() for name in names]
    with naming(folder):
        files, place = _remote(folder)
        return [epath.Path(files.unstrip_protocol(name)) for name in files.find(place)]


def sizes(paths: Iterable[epath.Path]) -> dict[epath.Path, int]:
    """The sizes in bytes of those files that exist. Many in one folder of a bucket are listed.

    Raises:
      OSError: a remote file system can't tell.
    """
    paths = list(paths)
    wanted = set(paths)
    with ThreadPoolExecutor(REQUESTS) as pool:
        if len(paths) <= REQUESTS or not is_remote(paths[0]):
            found = zip(paths, pool.map(_size, paths), strict=True)
            return {path: size for path, size in found if size is not None}
        listed = pool.map(_listed_sizes, {path.parent for path in paths})
        return {path: size for found in listed for path, size in found.items() if path in wanted}


def _size(path: epath.Path) -> int | None:
    with naming(path):
        try:
            return path.stat().length
        except FileNotFoundError:
            return None


def _listed_sizes(folder: epath.Path) -> dict[epath.Path, int]:
    with naming(folder):
        try:
            found = _listed(folder).items()
        except FileNotFoundError:
            return {}
    return {path: entry["size"] for path, entry in found if entry["type"] == "file"}


def _remote(path: epath.PathLike) -> tuple[Any, str]:
    """The file system of an address, and the address within it."""
    import fsspec

    return fsspec.url_to_fs(os.fspath(path))


def _listed(folder: epath.Path) -> dict[epath.Path, dict[str, Any]]:
    """What a bucket says of everything in a folder."""
    files, place = _remote(folder)
    found = {epath.Path(files.unstrip_protocol(e["name"])): e for e in files.ls(place, detail=True)}
    found.pop(folder, None)  # An empty object may stand for it.
    return found


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that appears whole or not at all, whatever happens.

    It is written under another name, which it loses when it is complete. In buckets that isn't
    needed, as there a file exists when all of it has arrived.

    Raises:
      OSError: the file can't be written, or something other than a regular file, such as a device,
        has its name. It names the path.
    """
    path = epath.Path(path)
    with naming(path):
        if not is_free(path):
            raise FileExistsError(
                errno.EEXIST, "there is a directory, device or pipe of that name", str(path)
            )
        if is_remote(path):
            files, place = _remote(path)
            files.pipe_file(place, data)
            return
        temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
            temporary.replace(path)
        except OSError as error:  # It names the other file.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        finally:
            with contextlib.suppress(Exception):
                temporary.unlink(missing_ok=True)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON for people and machines, as `write_report` does; NaN and infinity become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_report(path, json.dumps(finite, indent=2) + "\n")


def write_report(path: epath.PathLike, text: str) -> None:
    """Writes a file as `write_whole` does, or into the device or pipe of that name."""
    path = epath.Path(path)
    content = text.encode(errors="surrogateescape")  # Names of files may be no UTF-8.
    if not is_stream(path):
        write_whole(path, content)
        return
    with naming(path):
        for own in (sys.stdout, sys.stderr):
            # Opened anew, a file that one of these leads to would be written from another place.
            if own is not None and _leads_to(path, own):
                print(text, end="", file=own, flush=True)
                return
        with path.open("ab") as stream:
            stream.write(content)


def _leads_to(path: epath.Path, stream: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))  # noqa: PTH116
    except (OSError, ValueError):  # A notebook's streams have no number.
        return False


_OF_STREAMS = tuple(map(epath.Path, ("/dev", "/dev/fd", "/proc/self/fd")))
"""Folders whose entries may lead to files, such as `/dev/stdout`, in whose place none may be put.
`/dev/shm` is a disk in memory."""


def is_stream(path: epath.Path) -> bool:
    """Whether what is written here goes elsewhere, and no file may be put in its place."""
    if is_remote(path):
        return False
    return path.parent in _OF_STREAMS or (path.exists() and not (path.is_file() or path.is_dir()))
