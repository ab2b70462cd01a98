"""Files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import threading
from typing import Any

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that means the same in any working directory, with `~` expanded.

    Addresses such as `gs://bucket/folder` stay as they are: etils would take them for local paths.
    """
    expanded = epath.Path(path).expanduser()
    return expanded if "://" in os.fspath(path) else expanded.absolute()


def write_whole(path: Any, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it, of which nothing is left in any case.

    Args:
      path: an `epath.Path` or a `pathlib.Path`.
      data: what to write.

    Raises:
      OSError: the file can't be written, or what has its name is no regular file, such as a
        device; of remote file systems, what they raise.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise FileExistsError(
            errno.EEXIST, "there is a directory, device or pipe of that name", str(path)
        )
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Any, value: Any) -> None:
    """Writes JSON for people and machines, as `write_whole` does."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
