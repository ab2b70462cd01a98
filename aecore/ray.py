"""Pictures restored by many workers at once, on one machine or on a cluster, with Ray Data."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from etils import epath

from aecore.errors import AecoreError, ConfigError
from aecore.media import images
from aecore.restoring import bulk, files
from aecore.restoring.files import Failure, Job
from aecore.storage import REQUESTS, exists, reason, to_path

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

_DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"num_cpus": 1},
    "gpu": {"num_gpus": 1},
    "tpu": {"resources": {"TPU": 1}},
}
"""What Ray sets aside for a worker."""


def restore(
    data: str | os.PathLike | Sequence[str | os.PathLike] | Dataset,
    run: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    recursive: bool = False,
    suffix: str = "",
    extension: str = "auto",
    if_exists: Literal["skip", "overwrite"] = "skip",
    alpha: Literal["keep", "drop"] = "keep",
    quality: int | None = None,
    device: Literal["cpu", "gpu", "tpu"] = "cpu",
    workers: int | tuple[int, int] | None = None,
    at_a_time: int = 256,
    **settings: Any,
) -> Dataset:
    """Restores pictures as `aecore restore` does, by workers that each hold the network.

    A picture that can't be restored becomes a row that says why; the others continue. If a worker
    dies, another one does its pictures again. Files appear whole or not at all, and those that
    exist are skipped, so that whatever stopped is continued by the same call.

    Args:
      data: files, folders and patterns, as for `aecore restore`; all workers must see them under
        the same names. Or a dataset whose column `bytes` holds the contents of picture files, such
        as `ray.data.read_parquet` gives.
      run: a run directory, an exported file, or the name of weights that ship with aecore.
      output: a folder; for a single file, also a file. Of a dataset, the column `path` names the
        files within the folder: `gs://bucket/a.png` becomes `bucket/a.png` there. None: the column
        `bytes` is restored instead, in the format that the column `path` says, or else as PNG.
      recursive: whether folders within folders are searched.
      suffix: appended to the stems of files in the output folder.
      extension: the ending of outputs, without the dot; or `auto` for the input's own.
      if_exists: whether output files that exist are left alone, or written again.
      alpha: whether alpha channels are kept as they are, or dropped.
      quality: of JPEG, WebP and AVIF, 1 to 100; None for the input's, as far as it is known.
      device: what each worker has to itself: a CPU core, a GPU, or a chip of a TPU host.
      workers: how many, or the fewest and the most; None for as many as there are devices, though
        one CPU core is left for reading.
      at_a_time: pictures that a worker takes at a time.
      **settings: of the network, as for `Restorer.load`, such as `tile` and `strength`.

    Returns:
      A row for each picture: `source`, or what columns the dataset had; `target`, where there is an
      output; `status`, which is `restored`, `skipped` or `failed`; `reason`, why it failed; and
      `notes`, what was changed besides. With an output, all is done when this returns. Without
      one, pictures are restored when rows are asked for, as by `write_parquet`.

    Raises:
      ConfigError: Ray is missing, or an argument can't work.
      CheckpointError: there is no such network.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("aecore.ray needs Ray: pip install 'aecore[ray]'") from error
    naming = {"suffix": suffix, "extension": extension}
    written = bulk.WriteOptions(alpha=alpha, quality=quality)
    failed = None
    if isinstance(data, ray.data.Dataset):
        files.check_naming(**naming)
        _check_columns(data, ["bytes"] if output is None else ["bytes", "path"])
        found = data
    elif output is None:
        raise ConfigError("no output; name a file or a folder")
    else:
        paths = [data] if isinstance(data, (str, os.PathLike)) else data
        jobs, failures = files.find(
            [os.fspath(path) for path in paths], os.fspath(output), recursive=recursive, **naming
        )
        files.check(jobs, comparing=False, overwrite=if_exists == "overwrite", report=None)
        found, failed = _dataset(jobs, at_a_time), _failed(failures)
    settings = {"device": device, "devices": 1, **settings}
    _check_network(run, settings, device)
    if workers is None:
        workers = _room(device)
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    options = _Options(
        run=os.fspath(run),
        settings=settings,
        output=None if output is None else os.fspath(to_path(output)),
        naming=naming,
        overwrite=if_exists == "overwrite",
        written=written,
    )
    rows = found.map_batches(
        _Worker,
        fn_constructor_args=[options],
        batch_format="pyarrow",
        batch_size=at_a_time,
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        **_DEVICES[device],
    )
    if failed is not None:
        rows = rows.union(failed)
    return rows if output is None else rows.materialize()


def _check_columns(data: Dataset, needed: Sequence[str]) -> None:
    columns = data.columns() or []
    for name in needed:
        if name not in columns:
            raise ConfigError(f"the dataset has no column {name}, but {', '.join(columns)}")


def _check_network(run: Any, settings: dict[str, Any], device: str) -> None:
    """Loads the network once where a worker would run; in this process, it might take a device."""
    import ray
    import ray.exceptions

    def load():
        bulk.load(run, **settings)

    try:
        ray.get(ray.remote(**_DEVICES[device])(load).remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AecoreError):
            raise error.cause from None
        raise


def _room(device: str) -> int:
    """How many workers the cluster has room for."""
    import ray

    available = ray.cluster_resources()
    count = {"cpu": available.get("CPU", 0) - 1, "gpu": available.get("GPU", 0)}
    return max(1, int(count.get(device, available.get("TPU", 0))))


def _dataset(jobs: Sequence[Job], at_a_time: int) -> Dataset:
    """A row for each job, in blocks that a worker takes as a whole."""
    import pyarrow
    import ray.data

    rows = {name: [str(getattr(job, name)) for job in jobs] for name in Job._fields}
    table = pyarrow.table(rows, pyarrow.schema(dict.fromkeys(rows, pyarrow.string())))
    starts = range(0, max(1, len(jobs)), at_a_time)
    return ray.data.from_arrow([table.slice(start, at_a_time) for start in starts])


def _failed(failures: Sequence[Failure]) -> Dataset | None:
    """Rows of inputs in which there is nothing to restore."""
    import pyarrow
    import ray.data

    if not failures:
        return None
    sources = [str(failure.source) for failure in failures]
    results = [_Result("failed", failure.reason) for failure in failures]
    table = pyarrow.table({"source": sources, "target": [""] * len(sources)})
    return ray.data.from_arrow(_with(table, results))


@dataclasses.dataclass(frozen=True)
class _Options:
    """What all workers know."""

    run: str
    settings: dict[str, Any]
    output: str | None
    naming: dict[str, str]
    """How outputs are called, as for `files.output_path`."""
    overwrite: bool
    written: bulk.WriteOptions


@dataclasses.dataclass(frozen=True)
class _Result:
    """What became of a picture."""

    status: Literal["restored", "skipped", "failed"]
    reason: str = ""
    notes: str = ""


class _Worker:
    """A process that holds the network, and restores the pictures of one table after another."""

    def __init__(self, options: _Options):
        images.silence_pillow()
        self._options = options
        self._restorer = bulk.load(options.run, **options.settings)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        if "bytes" in table.column_names:
            return self._contents(table)
        pairs = zip(*(table[name].to_pylist() for name in Job._fields), strict=True)
        return _with(table, self._restored([Job(*map(epath.Path, pair)) for pair in pairs]))

    def _contents(self, table: pyarrow.Table) -> pyarrow.Table:
        """Restores the column `bytes`, by way of temporary files."""
        import pyarrow

        contents = table["bytes"].to_pylist()
        paths: list[str | None] = [None] * len(contents)
        if "path" in table.column_names:
            paths = table["path"].to_pylist()
        place = table.column_names.index("bytes")
        with tempfile.TemporaryDirectory() as name:
            folder = epath.Path(name)
            jobs = []
            for index, (content, path) in enumerate(zip(contents, paths, strict=True)):
                named = epath.Path(f"{index}.png" if path is None else _without_root(path))
                source = folder / f"{index}{named.suffix}"
                source.write_bytes(content or b"")
                within = folder / "restored" / source.name
                if self._options.output is not None:
                    within = to_path(self._options.output) / named
                jobs.append(Job(source, files.output_path(within, **self._options.naming)))
            results = self._restored(jobs)
            if self._options.output is not None:
                targets = pyarrow.array([str(job.target) for job in jobs])
                return _with(table.remove_column(place).append_column("target", targets), results)
            restored = [
                job.target.read_bytes() if result.status == "restored" else None
                for job, result in zip(jobs, results, strict=True)
            ]
        column = pyarrow.array(restored, pyarrow.large_binary())
        return _with(table.set_column(place, "bytes", column), results)

    def _restored(self, jobs: Sequence[Job]) -> list[_Result]:
        results: dict[tuple[epath.Path, epath.Path | None], _Result] = {}  # By jobs.

        def collect(outcome: bulk.Done | Failure) -> None:
            if isinstance(outcome, Failure):
                results[outcome.source, outcome.target] = _Result("failed", outcome.reason)
            else:
                results[outcome.job] = _Result("restored", notes="; ".join(outcome.notes))

        with ThreadPoolExecutor(REQUESTS) as pool:
            for job, settled in zip(jobs, pool.map(self._settled, jobs), strict=True):
                if settled is not None:
                    results[job] = settled
        unfinished = ""
        try:
            remaining = [job for job in jobs if job not in results]
            for outcome in bulk.restore(
                remaining, self._restorer, self._options.written, more_follow=True, late=collect
            ):
                collect(outcome)
        except Exception as error:  # Such as a full disk. Whatever it is, other pictures follow.
            unfinished = reason(error)
        return [results.get(job, _Result("failed", unfinished)) for job in jobs]

    def _settled(self, job: Job) -> _Result | None:
        """What is known of a picture before it is read."""
        output = self._options.output
        if output is not None and not _lies_in(job.target, to_path(output)):
            return _Result("failed", f"{job.target} leads out of the output folder")
        try:
            if not self._options.overwrite and exists(job.target):
                return _Result("skipped")
        except OSError as error:
            return _Result("failed", f"{job.target}: {reason(error)}")
        return None


def _without_root(path: str) -> str:
    """A path, or an address such as `gs://bucket/a.png`, as one that folders can have within."""
    return (path.partition("://")[2] or path).lstrip("/")


def _lies_in(path: epath.Path, folder: epath.Path) -> bool:
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def _with(table: pyarrow.Table, results: Sequence[_Result]) -> pyarrow.Table:
    """A table with a column for each field of its rows' results."""
    import pyarrow

    for field in dataclasses.fields(_Result):
        values = [getattr(result, field.name) for result in results]
        table = table.append_column(field.name, pyarrow.array(values, pyarrow.string()))
    return table
