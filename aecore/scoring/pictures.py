"""Scores a network on pictures of any sizes, the way papers on image restoration do.

A picture is degraded at its own size, restored as `Restorer` does it, and compared with the
original in RGB and, for colour, on its luma. Where a network enlarges, the original is first cut to
a multiple of the scale, and `scale` pixels at its border don't count.
"""

import csv
import functools
import io
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from aecore import metrics
from aecore.config import Data
from aecore.data import crops, sources
from aecore.data.ahead import results_ahead
from aecore.data.files import picture_files
from aecore.data.headers import readable_shapes
from aecore.data.indexed import FileSource, Pairs, Source
from aecore.degradations import Compose, Degradation, JaxOps
from aecore.errors import ConfigError, DataError, ImageError
from aecore.media.images import enlarged
from aecore.restoring.restorer import Restorer
from aecore.scoring import classical, evaluation, reports
from aecore.storage import check_writable, exists, is_stream, resolved, to_path, write_report

_log = logging.getLogger(__name__)

_TUNED_ON = 6
"""Pictures whose middles the settings of classical methods are tuned on."""

_MIDDLE = 128
"""Side of those middles, and of the pictures in a file of the best and worst results."""

_ROUNDED_TO = 128
"""What the sides of the arrays that are scored are multiples of. For each size one program is
compiled, in 0.7 s, where scoring a picture of 480x320 takes 0.1 s."""

DEGRADED, RESTORED = "degraded", "restored"


class PictureScores(NamedTuple):
    """Scores of one picture."""

    place: int
    """Its index in the source."""
    name: str
    """Its file, from the folder of pictures on."""
    height: int
    width: int
    values: dict[str, dict[str, float]]
    """For `degraded`, `restored` and each classical method: `psnr`, `ssim` and `mse`, and for
    colour `psnr_y` and `ssim_y`."""


class ScoringJob(NamedTuple):
    """What is to be scored."""

    source: Source
    folder: epath.Path
    """Where the pictures lie; of pairs, the originals."""
    degradation: Degradation
    scale: int
    """How many times larger the originals are than the degraded pictures."""


def find(data: str, degradation: Degradation | None, restorer: Restorer) -> ScoringJob:
    """The pictures in a folder, or pairs of them, and what is done to them.

    Args:
      data: a folder of pictures; if it holds the folders `degraded` and `original`, of pairs.
      degradation: by default that of the network's training; nothing for pairs.
      restorer: the network.

    Raises:
      ConfigError: it isn't known what to do to the pictures, or the scales don't fit.
      DataError: there are no pictures.
    """
    folder = to_path(data)
    is_pairs = all((folder / name).is_dir() for name in ("degraded", "original"))
    channels = restorer.network.channels
    if channels not in (1, 3):
        raise ConfigError(f"the network is for {channels} channels; pictures have 1 or 3")
    source = sources.pictures(
        Data("pairs" if is_pairs else "folder", data, channels=1 if channels == 1 else 3)
    )
    if degradation is None:
        degradation = Compose() if is_pairs else _own(restorer)
    scale = degradation.reduction * (source.scale if isinstance(source, Pairs) else 1)
    if scale != restorer.network.scale:
        raise ConfigError(
            f"the degraded pictures are {scale} times smaller, but the network enlarges them "
            f"{restorer.network.scale} times; use a degradation with the network's scale"
        )
    return ScoringJob(source, folder / "original" if is_pairs else folder, degradation, scale)


def _own(restorer: Restorer) -> Degradation:
    try:
        return restorer.description.build_degradation()
    except ConfigError as error:
        raise ConfigError(
            f"{error}; say what to do to the pictures with degradation= (--degradation), such as "
            "'GaussianNoise(25 / 255)'"
        ) from error


def score(
    job: ScoringJob,
    restorer: Restorer,
    methods: Mapping[str, classical.Method],
    progress: bool = False,
) -> Iterator[PictureScores]:
    """Scores pictures in the order that is fastest. Broken ones are skipped with a warning.

    Args:
      job: the pictures.
      restorer: made with `in_range=False` if the degradation leaves [0, 1].
      methods: classical methods to score too.
      progress: whether to show a progress bar.
    """
    sizes = {}
    for index, shape in readable_shapes(job.source.shape, range(len(job.source))):
        height, width = (side // job.scale for side in shape[:2])
        if min(height, width) * job.scale < metrics.SSIM_WINDOW + 2 * job.scale:
            _log.warning("skipped: %s is too small to be scored", _name(job, index))
            continue
        sizes[index] = height, width
    known = tune(job, list(sizes), methods)

    def pair(index):
        try:
            return index, degraded_pair(job, index)
        except ImageError as error:
            _log.warning("skipped: %s", error)
            return index, None

    waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(order: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        with ThreadPoolExecutor(1) as pool:
            for index, made in results_ahead(lambda index: pool.submit(pair, index), order):
                if made is not None:
                    waiting[index] = made
                    yield index, made[0]

    with tqdm(
        total=len(sizes), unit=" pictures", delay=2, leave=False, disable=None if progress else True
    ) as bar:
        for index, restored in restorer.many(sizes, read):
            given, original = waiting.pop(index)
            results = {DEGRADED: _plain(given, job.scale), RESTORED: restored}
            results |= {name: restore(given) for name, restore in known.items()}
            bar.update()
            height, width = original.shape[:2]
            yield PictureScores(
                index,
                _name(job, index),
                height,
                width,
                {
                    name: _scores(_as_in_file(result), original, job.scale)
                    for name, result in results.items()
                },
            )


def degraded_pair(job: ScoringJob, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture degraded, and the original, `(H, W, C)` float32; noise depends on the index.

    Noise of a gray picture is gray too, as it would be in a file.
    """
    original = job.source[index]
    height, width = (side // job.scale * job.scale for side in original.shape[:2])
    original = original[:height, :width]
    given = original
    if isinstance(job.source, Pairs):
        given = job.source.degraded[index]
    channels = given.shape[2]
    if (given == given[..., :1]).all():
        given = given[..., :1]
    degraded = np.asarray(_degrade(job.degradation)(jax.device_put(given), index))
    degraded = degraded.repeat(channels // degraded.shape[2], axis=2)
    return _as_in_file(degraded), original.astype(np.float32) / 255


def _as_in_file(image: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits; with noise beyond [0, 1], which no file could hold, as it is."""
    if image.min() < 0 or image.max() > 1:
        return image
    return np.rint(image * 255) / np.float32(255)


@functools.lru_cache(maxsize=8)
def _degrade(degradation: Degradation) -> Callable[[jax.Array, int], jax.Array]:
    @jax.jit
    def degrade(image, index):
        ops = JaxOps(evaluation.keys(jnp.asarray(index)[None]))
        return degradation.apply(image[None].astype(jnp.float32) / 255, ops)[0]

    return degrade


def _plain(given: np.ndarray, scale: int) -> np.ndarray:
    # By Pillow, for which nothing is compiled for each size.
    return given if scale == 1 else enlarged(given, scale)


def tune(
    job: ScoringJob, indices: Iterable[int], methods: Mapping[str, classical.Method]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Classical methods, tuned on the middles of some of the pictures themselves."""
    if not methods:
        return {}
    examples = []
    for index in itertools.islice(indices, _TUNED_ON):
        try:
            given, original = degraded_pair(job, index)
        except ImageError:
            continue  # A warning names it when its turn comes.
        side = _MIDDLE // job.scale * job.scale
        examples.append((_middle(given, side // job.scale), _middle(original, side)))
    return classical.tuned(methods, examples)


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = (max(0, own - side) // 2 for own in image.shape[:2])
    return image[top : top + side, left : left + side]


def _scores(restored: np.ndarray, original: np.ndarray, scale: int) -> dict[str, float]:
    border = scale if scale > 1 else 0
    inside = slice(border, -border or None)
    images = restored[inside, inside], original[inside, inside]
    size = np.array(images[0].shape[:2], np.int32)
    rounded = (size + -size % _ROUNDED_TO).tolist()
    padded = [crops.pad(image, *rounded) for image in images]
    arguments = jax.device_put((*padded, size))
    return {name: float(v) for name, v in jax.device_get(_score(*arguments)).items()}


@jax.jit
def _score(restored: jax.Array, original: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
    restored, original, sizes = restored[None], original[None], size[None]
    scores = {
        "psnr": metrics.psnr_within(restored, original, sizes),
        "ssim": metrics.ssim_within(restored, original, sizes),
        "mse": metrics.mse_within(restored, original, sizes),
    }
    if original.shape[3] == 3:
        restored, original = metrics.luma(restored), metrics.luma(original)
        scores["psnr_y"] = metrics.psnr_within(restored, original, sizes)
        scores["ssim_y"] = metrics.ssim_within(restored, original, sizes)
    return {name: value[0] for name, value in scores.items()}


def _name(job: ScoringJob, index: int) -> str:
    files = job.source.original if isinstance(job.source, Pairs) else job.source
    assert isinstance(files, FileSource)
    return str(epath.Path(files.name(index)).relative_to(job.folder))


def protocol(job: ScoringJob) -> str:
    """What was done, for people."""
    noise = "noise depends on a picture's place in the order of names; "
    unclipped = ", but noise beyond [0, 1] is kept" if job.degradation.is_random else ""
    lines = [
        f"degraded by {job.degradation!r}"
        if job.degradation != Compose()
        else "degraded beforehand",
        f"{noise if job.degradation.is_random else ''}degraded and restored pictures are rounded "
        f"to 8 bits{unclipped}",
        "PSNR, SSIM and MSE in all channels"
        + ("; Y: on luma (BT.601)" if job.source.channels == 3 else ""),
    ]
    if job.scale > 1:
        lines.append(
            f"originals cut to multiples of {job.scale}, {job.scale} pixels of the border left "
            "out; degraded: enlarged by bicubic interpolation"
        )
    return "\n".join(lines)


def summarize(found: Sequence[PictureScores]) -> dict[str, evaluation.Scores]:
    """Means over pictures, and their 95 % intervals, of each row."""
    return {
        row: evaluation.summarize(
            {
                name: np.array([picture.values[row][name] for picture in found])
                for name in found[0].values[row]
            }
        )
        for row in found[0].values
    }


def write_csv(found: Sequence[PictureScores], file: epath.PathLike) -> None:
    """A line for each picture and row, in order of the pictures' names."""
    text = io.StringIO()
    names = list(found[0].values[RESTORED])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "height", "width", "result", *names])
    for picture in sorted(found, key=lambda picture: picture.place):
        for row, values in picture.values.items():
            numbers = [f"{values[name]:.6g}" for name in names]
            writer.writerow([picture.name, picture.height, picture.width, row, *numbers])
    write_report(to_path(file), text.getvalue())


def save_ranked(
    found: Sequence[PictureScores], job: ScoringJob, restorer: Restorer, file: epath.PathLike
) -> None:
    """A picture of the best, median and worst results: their middles."""
    psnr = np.array([picture.values[RESTORED]["psnr"] for picture in found])
    ranked = evaluation.ranked(psnr)
    rows: dict[str, list[np.ndarray]] = {DEGRADED: [], RESTORED: [], "original": []}
    titles = []
    for label, chosen in ranked.items():
        for number in chosen.tolist():
            given, original = degraded_pair(job, found[number].place)
            results = (_plain(given, job.scale).clip(0, 1), restorer(given), original)
            for row, image in zip(rows.values(), results, strict=True):
                row.append(crops.pad(_middle(image, _MIDDLE), _MIDDLE, _MIDDLE))
            titles.append(f"{label}, {psnr[number]:.1f} dB")
    sheet = {name: np.stack(row) for name, row in rows.items()}
    reports.save_samples(sheet, to_path(file), titles)


def check_outputs(data: str, outputs: Iterable[epath.PathLike | None]) -> None:
    """Refuses files to write scores to that are pictures to be scored, or each other.

    Args:
      data: the folder of pictures.
      outputs: the files; None for those that aren't wanted.

    Raises:
      ConfigError: names the file; also if it can't be written.
    """
    paths = [to_path(file) for file in outputs if file is not None]
    # Several may go to one device or pipe.
    paths = [path for path in paths if not is_stream(path)]
    for path in paths:
        check_writable(path)
    taken = set()
    # A file that doesn't exist is no input, and to list a large folder takes time.
    if any(map(exists, paths)):
        taken = {resolved(picture) for picture in picture_files(to_path(data))}
    for path in paths:
        if resolved(path) in taken:
            raise ConfigError(f"{path} is an input or an output; choose another file")
        taken.add(resolved(path))


def evaluate(
    restorer: Restorer,
    data: str,
    degradation: Degradation | None = None,
    *,
    methods: bool | Sequence[str] = False,
    csv_file: epath.PathLike | None = None,
    picture_file: epath.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a network on pictures; see `aecore.evaluate`."""
    check_outputs(data, (csv_file, picture_file))
    job = find(data, degradation, restorer)
    chosen = {}
    if methods:
        chosen = classical.methods(job.degradation, None if methods is True else methods)
    found = list(score(job, restorer, chosen, progress))
    if not found:
        raise DataError(f"none of the pictures in {data} can be scored; name a folder of others")
    scores = summarize(found)
    if csv_file is not None:
        write_csv(found, csv_file)
    if picture_file is not None:
        save_ranked(found, job, restorer, picture_file)
    return {
        "evaluation": {"step": restorer.description.step, **scores.pop(RESTORED)},
        "baseline": scores.pop(DEGRADED),
        **({"classical": scores} if chosen else {}),
        "protocol": protocol(job),
    }
