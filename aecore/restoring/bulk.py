"""Restores many files, so that reading, computing and writing overlap."""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from aecore.data.ahead import results_ahead
from aecore.errors import ConfigError, ImageError
from aecore.media import images, videos
from aecore.media.images import Picture
from aecore.restoring.files import Failure, Job
from aecore.restoring.restorer import Restorer
from aecore.storage import is_disk_full, reason

_THREADS = min(8, os.cpu_count() or 1)

_MOST_PIXELS = 2**26
"""Most pixels to hold of pictures read ahead, and as many again of those to be written."""

_LEAST_PIXELS = 2**18
"""As which smaller pictures count, so that not too many files are read ahead."""

_VIDEO_FRAMES = 16
"""Frames of a video that are restored at a time; fewer, but one at least, if a network enlarges
them, so that the results have no more pixels."""


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """How restored pictures are written.

    Raises:
      ConfigError: the quality is out of range.
    """

    alpha: Literal["keep", "drop"] = "keep"
    """Whether alpha channels are kept as they are, or dropped."""
    compare: bool = False
    """Whether to write each input beside its output, in one picture, too; enlarged by interpolation
    if the output is larger."""
    quality: int | None = None
    """Of JPEG, WebP and AVIF files, 1 to 100; None for the input's, as far as it is known."""

    def __post_init__(self):
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ConfigError(f"quality {self.quality} is out of range; use 1 to 100")


@dataclasses.dataclass(frozen=True)
class Done:
    """A file that was restored."""

    job: Job
    notes: tuple[str, ...]
    """What was changed besides restoring, each a few words."""


def load(run: str | os.PathLike, **settings: Any) -> Restorer:
    """Loads a network that restores files; as `Restorer.load`.

    Raises:
      CheckpointError: as there.
      ConfigError: the network is for images that no picture file holds.
    """
    restorer = Restorer.load(run, **settings)
    check_channels(restorer.network.channels, os.fspath(run))
    return restorer


def check_channels(channels: int, name: str) -> None:
    """Raises ConfigError if a network, of that name, is for images that no picture file holds."""
    if channels not in (1, 3):
        raise ConfigError(f"{name} is for images of {channels} channels; pictures have 1 or 3")


def restore(
    jobs: Sequence[Job],
    restorer: Restorer,
    options: WriteOptions = WriteOptions(),
    *,
    more_follow: bool = False,
    late: Callable[[Done | Failure], None] = lambda _: None,
) -> Generator[Done | Failure]:
    """Restores files; each output appears whole or not at all.

    Args:
      jobs: what to restore; the order may change so that pictures of one size are batched.
      restorer: the network.
      options: how pictures are written.
      more_follow: whether the restorer is given other jobs afterwards; as for `Restorer.many`.
      late: if the iterator is closed early, files that are being written are finished; this is
        called with what became of each.

    Yields:
      For each job what became of it, when its output is written.

    Raises:
      OSError: the disk is full.
      ImageError: the device's memory doesn't suffice.
    """
    pictures = [job for job in jobs if not job.is_video]
    writing: _Writing = collections.deque()
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as readers,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as writers,
    ):
        try:
            yield from _restore_pictures(
                pictures, restorer, options, readers, writers, more_follow, writing
            )
            for job in jobs:
                if job.is_video:
                    yield _outcome(_restore_video, job, restorer)
        finally:
            # What is being written is finished; nothing new is begun.
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=True, cancel_futures=True)
            for future, _ in writing:
                if not future.cancelled() and future.exception() is None:
                    late(future.result())


def report(outcomes: Iterable[Done | Failure], skipped: Iterable[Job]) -> dict[str, Any]:
    """What became of each file, as JSON values: its `source` and `status`, and what belongs to it.

    Args:
      outcomes: what `restore` gave, and failures of `files.find`.
      skipped: what was not restored, because its output existed.
    """

    def entry(job, status, **more):
        return {"source": str(job.source), "target": str(job.target), "status": status, **more}

    entries = [
        {"source": str(outcome.source), "status": "failed", "reason": outcome.reason}
        if isinstance(outcome, Failure)
        else entry(outcome.job, "restored", notes=list(outcome.notes))
        for outcome in outcomes
    ]
    return {"files": [*entries, *(entry(job, "skipped") for job in skipped)]}


_Writing = collections.deque[tuple[concurrent.futures.Future[Done | Failure], int]]
"""Files that are being written, the oldest first, each with the pixels of its result."""


def _restore_pictures(
    jobs: Sequence[Job],
    restorer: Restorer,
    options: WriteOptions,
    readers: concurrent.futures.Executor,
    writers: concurrent.futures.Executor,
    more_follow: bool,
    writing: _Writing,
) -> Iterator[Done | Failure]:
    sizes, pixels = {}, {}
    for job, extent in zip(jobs, readers.map(_extent, jobs), strict=True):
        if isinstance(extent, Failure):
            yield extent
        else:
            sizes[job], pixels[job] = extent

    def submit(job):
        return readers.submit(_read, job, options.alpha, restorer)

    under_way = collections.deque()
    unreadable = collections.deque()

    def frames(order):
        ahead = results_ahead(
            submit, order, most=_MOST_PIXELS, cost=lambda job: max(pixels[job], _LEAST_PIXELS)
        )
        for picture in ahead:
            if isinstance(picture, Failure):
                unreadable.append(picture)
                continue
            job, content = picture
            under_way.append((job, content, []))
            for frame in content.frames:
                yield job, frame.values

    def finished(most_pixels):
        while unreadable:
            yield unreadable.popleft()
        while writing and (
            writing[0][0].done() or sum(waiting for _, waiting in writing) > most_pixels
        ):
            # Removed only then, as waiting may be interrupted.
            outcome = writing[0][0].result()
            writing.popleft()
            yield outcome

    for _, values in restorer.many(sizes, frames, more_follow=more_follow):
        job, content, restored = under_way[0]
        restored.append(values)
        if len(restored) == len(content.frames):
            under_way.popleft()
            future = writers.submit(_outcome, _write, job, content, restored, options)
            writing.append((future, restorer.network.scale**2 * pixels[job]))
        yield from finished(_MOST_PIXELS)
    yield from finished(0)


def _failure(job: Job, error: Exception) -> Failure:
    if isinstance(error, ImageError):
        # Messages of several lines become one.
        source = " ".join(str(job.source).split())
        return Failure(job.source, str(error).removeprefix(source).lstrip(": "), job.target)
    where = getattr(error, "filename", None) or job.target
    return Failure(job.source, f"{where}: {reason(error)}", job.target)


def _extent(job: Job) -> tuple[tuple[int, int], int] | Failure:
    try:
        return images.read_extent(job.source)
    except (ImageError, OSError) as error:
        return _failure(job, error)


def _read(job: Job, alpha: str, restorer: Restorer) -> tuple[Job, Picture] | Failure:
    try:
        picture = images.read_picture(job.source)
    except (ImageError, OSError) as error:
        return _failure(job, error)
    unlike = restorer.differences(picture.frames[0].values)
    picture = dataclasses.replace(picture, notes=(*picture.notes, *unlike))
    if alpha == "drop":
        frames = tuple(frame.replace(frame.values, None) for frame in picture.frames)
        picture = dataclasses.replace(picture, frames=frames)
    return job, picture


def _outcome(write: Callable[..., tuple[str, ...]], job: Job, *args: Any) -> Done | Failure:
    """What became of a job.

    Args:
      write: writes the job's output and returns notes.
      job: the job.
      *args: what `write` takes after it.

    Raises:
      OSError: the disk is full.
    """
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        return Done(job, write(job, *args))
    except (ImageError, OSError) as error:
        if is_disk_full(error):
            raise
        return _failure(job, error)


def _write(
    job: Job, picture: Picture, restored: Sequence[np.ndarray], options: WriteOptions
) -> tuple[str, ...]:
    frames = tuple(
        frame.restored(values) for frame, values in zip(picture.frames, restored, strict=True)
    )
    if options.compare:
        # First, as a picture that exists is taken to have its comparison, too.
        before, after = picture.frames[0], frames[0]
        scale = after.values.shape[0] // before.values.shape[0]
        plain = before.values if scale == 1 else images.enlarged(before.values, scale)
        both = np.concatenate([plain, after.values], axis=1)
        comparison = Picture((after.replace(both, None),), "PNG")
        images.write_picture(comparison, job.comparison)
    whole = dataclasses.replace(picture, frames=frames)
    notes = images.write_picture(whole, job.target, quality=options.quality)
    return *picture.notes, *notes


def _restore_video(job: Job, restorer: Restorer) -> tuple[str, ...]:
    scale = restorer.network.scale
    frames = max(1, _VIDEO_FRAMES // scale**2)
    return videos.restore(job.source, job.target, restorer, batch_size=frames, scale=scale)
