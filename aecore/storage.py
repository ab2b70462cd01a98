"""Paths, local or `gs://`, and files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

from aecore.errors import AecoreError, ConfigError


def to_path(path: epath.PathLike) -> epath.Path:
    """A path with `~` expanded; addresses such as `gs://bucket/folder` are paths too.

    Raises:
      ConfigError: it is an address of a kind that can't be read, such as `https://`.
    """
    try:
        return epath.Path(path).expanduser()
    except KeyError as error:  # That's how etils reports a scheme it doesn't know.
        raise ConfigError(
            f"{os.fspath(path)}: {error.args[0]} addresses can't be read; download the file first"
        ) from error


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
    """Whether a file can be written here: nothing has the name, or a regular file does."""
    if is_remote(path):
        return not epath.Path(path).is_dir()
    return not os.path.exists(path) or os.path.isfile(path)  # noqa: PTH110, PTH113


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk or a quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def reason(error: BaseException) -> str:
    """Why something failed, in the words of the exception but without the path in it."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


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
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except Exception as error:  # Of a remote file system, any.
        if not is_remote(path):
            raise
        why = " ".join(reason(error).split())
        message = f"can't be reached; check the network and your credentials ({why})"
        raise OSError(errno.EIO, message, os.fspath(path)) from error


def exists(path: epath.Path) -> bool:
    """Whether there is a file or folder; raises OSError if a remote file system can't tell."""
    with naming(path):
        return path.exists()


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it, which is removed whatever happens.

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
        temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            with contextlib.suppress(Exception):
                temporary.unlink(missing_ok=True)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON for people and machines, as `write_whole` does."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
