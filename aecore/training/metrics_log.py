"""`metrics.jsonl`, TensorBoard's event files, and whoever else wants to know the scores."""

import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from aecore.saved.checks import is_count
from aecore.storage import is_remote, naming, write_whole

_SECONDS = 30
"""How often a file in a bucket, to which nothing can be appended, is written anew."""

_SECONDS_OF_EVENTS = 120
"""How often TensorBoard sees new events."""

Callback = Callable[[int, Mapping[str, float]], None]
"""Called with a step and what `metrics.jsonl` holds of it: `loss` and what was measured with it; of
an evaluation, `validation_mse`, `validation_psnr` and `validation_ssim`."""


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard.

    Args:
      directory: the run's.
      step: the step that the run starts from; lines of later steps, which will be done again, are
        dropped.
      unlogged: losses of the steps before it that no line has averaged yet.
      every: steps that a line averages.
      writes: whether this process writes; of several, one does.
      callback: called in that process with each line, once it is written.
    """

    def __init__(
        self,
        directory: epath.Path,
        step: int,
        unlogged: Sequence[float],
        every: int,
        writes: bool,
        callback: Callback | None = None,
    ):
        self._writes = writes
        self._callback = callback
        self._path = directory / "metrics.jsonl"
        self._directory = directory
        self._every = every
        self._losses = list(unlogged)
        self._step = step
        self._text = ""
        self._events: _Events | None = None
        if writes and self._path.exists():
            kept = [line for line in self._read() if line["step"] <= step]
            self._text = "".join(map(_json_line, kept))
            write_whole(self._path, self._text.encode())

    def __enter__(self) -> "MetricsLog":
        if not self._writes:
            return self
        self._file = None if is_remote(self._path) else self._path.open("a")
        self._written = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if not self._writes:
            return
        # After a failure, such as of a full disk, closing fails for the same reason.
        has_failed = kind is not None and issubclass(kind, OSError)
        ignored = contextlib.suppress(*([OSError] if has_failed else []))
        with ignored, naming(self._path):
            self.flush()
            if self._file is not None:
                self._file.close()
        if self._events is not None:
            with ignored, naming(self._directory):
                self._events.close()

    def flush(self) -> None:
        """Has all lines written, so that a checkpoint may follow that goes on after them."""
        if self._writes and self._file is None:
            write_whole(self._path, self._text.encode())
            self._written = time.monotonic()

    @property
    def unlogged(self) -> tuple[float, ...]:
        """Losses that no line has averaged yet."""
        return tuple(self._losses)

    def add_loss(self, step: int, loss: float, measured: Callable[[], Mapping[str, float]]) -> None:
        """Records a step's loss; writes the mean since the last line if one is due.

        Args:
          step: its number.
          loss: of that step.
          measured: gives what else belongs in a line.
        """
        self._losses.append(loss)
        if step % self._every == 0:
            self._write_losses(step, measured())

    def finish(self, step: int, measured: Mapping[str, float]) -> None:
        """Writes the mean of the losses since the last line."""
        if self._losses:
            self._write_losses(step, measured)

    def _write_losses(self, step: int, measured: Mapping[str, float]) -> None:
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self._write(step, {"loss": mean, **measured})

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Records an evaluation."""
        names = ("mse", "psnr", "ssim")
        self._write(step, {f"validation_{name}": scores[name] for name in names})

    def read(self, name: str) -> list[dict[str, float]]:
        """The lines that hold a value."""
        return [line for line in self._read() if name in line]

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        line = _json_line({"step": step, **values})
        if self._file is not None:
            with naming(self._path):
                self._file.write(line)
                self._file.flush()
        else:
            self._text += line
            if time.monotonic() > self._written + _SECONDS:
                self.flush()
        with naming(self._directory):
            if self._events is None:
                # An import takes half a second and more, for which the first step needn't wait.
                self._events = _Events(self._directory, self._step + 1)
            self._events.add(step, values)
        if self._callback is not None:
            self._callback(step, values)

    def _read(self) -> list[dict[str, float]]:
        lines = []
        for line in self._path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line.decode()))
            except ValueError:  # Cut off when the process was killed, or damaged.
                continue
        return [line for line in lines if _is_line(line)]


def _is_line(value: Any) -> bool:
    """Whether a line of the metrics holds a step and numbers, as an undamaged one does."""
    return (
        isinstance(value, dict)
        and is_count(value.get("step"))
        and all(isinstance(number, (int, float)) for number in value.values())
    )


class _Events:
    """TensorBoard's file of scalars.

    tensorboardX has a writer for it, whose thread dies where it can't write, as on a full disk, and
    blocks who adds scalars after that. This one writes in the thread that adds them.

    Args:
      directory: where the file is made.
      first_step: what earlier files hold of this step and later ones is dropped.
    """

    def __init__(self, directory: epath.Path, first_step: int):
        with _without_pytorch():
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter
            from tensorboardX.summary import scalar
        kinds: Any = event_pb2
        self._event, self._scalar = kinds.Event, scalar
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = RecordWriter(str(directory / name))
        self._flushed = -math.inf
        self._write(file_version="brain.Event:2")
        start = kinds.SessionLog(status=kinds.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._scalar(name, value))
        if time.monotonic() > self._flushed + _SECONDS_OF_EVENTS:
            self._file.flush()
            self._flushed = time.monotonic()

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _without_pytorch() -> Iterator[None]:
    """Hides PyTorch from tensorboardX.

    Where PyTorch is installed, tensorboardX imports it, for tensors that are never logged here.
    That takes seconds, in which Python starts fewer steps, and it loads CUDA's libraries once more.
    """
    modules: dict[str, Any] = sys.modules
    hide = "torch" not in modules
    if hide:
        modules["torch"] = None
    try:
        yield
    finally:
        if hide:
            del modules["torch"]


def _json_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
