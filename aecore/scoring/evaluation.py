"""Scores of a network over a dataset; every image counts exactly once."""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aecore import metrics
from aecore.data.batches import evaluation_batches
from aecore.data.grouping import Group, GroupedPictures
from aecore.data.indexed import Pairs, Source
from aecore.degradations import Degradation, PlacedJaxOps
from aecore.errors import ConfigError, DataError
from aecore.networks import layers
from aecore.steps import step
from aecore.steps.devices import Devices, in_background
from aecore.steps.step import Apply, degrading, degrading_pairs, score

# The noise in evaluations depends on an image's index only, so that all runs and models are scored
# on the same inputs.
_SEED = 20070607

# Pixel values per device and call: enough that the cost of a call doesn't matter, and on CPUs few
# enough that activations stay in their caches.
_VALUES, _VALUES_ON_CPU = 2**21, 2**17

Scores = dict[str, Any]
"""`images`, how many; the means `mse`, `psnr` (dB) and `ssim`; and `ci95`, the half width of each
mean's 95 % confidence interval, taking images as independent (absent for a single image)."""

PerImage = dict[str, np.ndarray]
"""`mse`, `psnr` and `ssim`, each `(N,)` float32."""


class Stopped(Exception):  # noqa: N818 as it is no error.
    """An evaluation was asked to stop."""


class Evaluator:
    """Scores a network on images. Compiles once for each shape; call it as often as needed.

    Images are an array `(N, H, W, C)` uint8, N at least 1, or a source of pictures of several
    sizes. Those are put into arrays of a few shapes, mirrored beyond their edges; pixels beyond
    don't count, and the noise doesn't depend on the arrays' shapes.

    Args:
      apply: `(params, images) -> images`, on `(B, H, W, C)` float32.
      degradation: applied to the images, with noise that depends on their index.
      devices: the devices to use.
      batch_size: images per call, rounded up to a multiple of the devices; None: a fast number.
      multiple: what the originals' sides must be multiples of.
    """

    def __init__(
        self,
        apply: Apply,
        degradation: Degradation,
        devices: Devices,
        batch_size: int | None = None,
        multiple: int = 1,
    ):
        whole = degrading(degradation)
        placed = degrading(degradation, ops_of=PlacedJaxOps)
        pairs = degrading_pairs(degradation, PlacedJaxOps)

        def of_images(params, images, indices):
            return step.eval_step(params, images, keys(indices), apply=apply, prepare=whole)

        def of_pictures(params, batch, indices):
            original, degraded, sizes = batch
            scores = step.eval_step(
                params,
                original if degraded is None else (degraded, original),
                keys(indices),
                apply=apply,
                prepare=placed if degraded is None else pairs,
                sizes=sizes,
            )
            return {**scores, "index": indices, "is_counted": sizes[:, 0] > 0}

        self._devices = devices
        self._batch_size = batch_size
        self._multiple = multiple
        self._of_images = devices.compile_eval_step(of_images)
        self._of_pictures = devices.compile_eval_step(of_pictures)
        self._compiled = None
        self._last_grouped: tuple[Source, GroupedPictures] | None = None

    def compile_ahead(self, params: Any, images: np.ndarray | Source) -> None:
        """Starts to compile, in the background, the programs for a call with these arguments.

        Args:
          params: the network's parameters, or their shapes, dtypes and shardings.
          images: what will be scored; only shapes matter.
        """
        sharding = self._devices.sharded

        def abstract(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def compile_all():
            if isinstance(images, np.ndarray):
                size = self._size_of_batches(len(images), images.shape[1:])
                batch = abstract((size, *images.shape[1:]), np.uint8)
                self._of_images.lower(params, batch, abstract((size,), np.int32)).compile()
                return
            pictures = self._grouped(images)
            for group in pictures.groups:
                size = self._size_of_group(group)
                original, degraded = pictures.batch_shapes(group, size)
                batch = (
                    abstract(original, np.uint8),
                    None if degraded is None else abstract(degraded, np.uint8),
                    abstract((size, 2), np.int32),
                )
                self._of_pictures.lower(params, batch, abstract((size,), np.int32)).compile()

        self._compiled = in_background(compile_all)

    def _grouped(self, source: Source) -> GroupedPictures:
        """The same source is looked at once."""
        if self._last_grouped is None or self._last_grouped[0] is not source:
            pictures = GroupedPictures(source, multiple=self._multiple, least=metrics.SSIM_WINDOW)
            self._last_grouped = source, pictures
        return self._last_grouped[1]

    def _size_of_batches(self, count: int, shape: Sequence[int]) -> int:
        if self._batch_size is not None:
            return self._devices.round_up(self._batch_size)
        values = _VALUES_ON_CPU if self._devices.platform == "cpu" else _VALUES
        most = max(1, values // math.prod(shape)) * self._devices.device_count
        batches = -(-count // most)
        return self._devices.round_up(-(-count // batches))

    def _size_of_group(self, group: Group) -> int:
        return self._size_of_batches(len(group.members), group.shape)

    def __call__(
        self,
        params: Any,
        images: np.ndarray | Source,
        stop: Callable[[], bool] = lambda: False,
    ) -> Scores:
        """Mean scores over all images; arguments and errors as for `per_image`."""
        return summarize(self.per_image(params, images, stop))

    def per_image(
        self,
        params: Any,
        images: np.ndarray | Source,
        stop: Callable[[], bool] = lambda: False,
    ) -> PerImage:
        """Scores of each image, or of each picture that isn't broken.

        Args:
          params: the network's parameters.
          images: the originals.
          stop: called before each batch; returns whether to stop the evaluation.

        Returns:
          `mse`, `psnr` in dB and `ssim`, each `(N,)`.

        Raises:
          Stopped: `stop` said so.
          DataError: no picture can be scored.
        """
        if self._compiled:
            self._compiled()  # JAX keeps the compiled program.
        values = []
        running = collections.deque()

        def collect():
            results = jax.device_get(running.popleft())
            is_counted = results.pop("is_counted")
            values.append({name: v[is_counted] for name, v in results.items()})

        launched = self._launch(params, images)
        while not stop():
            if (results := next(launched, None)) is None:
                break
            running.append(results)
            # Starts the next batch before waiting for this one.
            if len(running) > 1:
                collect()
        else:
            raise Stopped
        while running:
            collect()
        if not sum(len(part["mse"]) for part in values):
            raise DataError("none of the pictures for validation can be scored; use others")
        joined = concatenate(values)
        order = np.argsort(joined.pop("index"))
        return {name: value[order] for name, value in joined.items()}

    def _launch(
        self, params: Any, images: np.ndarray | Source
    ) -> Iterator[dict[str, jax.Array | np.ndarray]]:
        """Scores batch after batch, without waiting for results."""
        shard, share = self._devices.shard, self._devices.share
        if isinstance(images, np.ndarray):
            size = self._size_of_batches(len(images), images.shape[1:])
            for batch in evaluation_batches(images, size):
                rows = share(size)
                placed = shard((batch.images[rows], batch.indices[rows]))
                is_counted = np.arange(size) < batch.count
                scores = self._of_images(params, *placed)
                yield {**scores, "index": batch.indices, "is_counted": is_counted}
            return
        for batch in self._grouped(images).batches(self._size_of_group, share):
            arrays = batch.original, batch.degraded, batch.sizes
            yield self._of_pictures(params, *shard((arrays, batch.indices)))


def concatenate(parts: Sequence[PerImage]) -> PerImage:
    """Joins the scores of several groups of images."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarize(values: PerImage) -> Scores:
    """Means and their confidence intervals, from the scores of each image."""
    count = len(values["mse"])
    means = {name: float(v.mean(dtype=np.float64)) for name, v in values.items()}
    if count == 1:
        return {"images": count, **means}
    # By the central limit theorem.
    deviations = {name: float(v.std(dtype=np.float64, ddof=1)) for name, v in values.items()}
    half = {name: 1.96 * deviation / count**0.5 for name, deviation in deviations.items()}
    return {"images": count, **means, "ci95": half}


def image_scores(restored: np.ndarray, originals: np.ndarray) -> PerImage:
    """Scores of images that were restored elsewhere.

    Args:
      restored: `(N, H, W, C)` float32.
      originals: `(N, H, W, C)` uint8.
    """
    return jax.device_get(_score(*jax.device_put((restored, originals))))


@jax.jit
def _score(restored: jax.Array, originals: jax.Array) -> dict[str, jax.Array]:
    return score(restored, originals.astype(np.float32) / 255)


def keys(indices: jax.Array) -> jax.Array:
    """PRNG keys with which evaluations degrade the images at these `(N,)` indices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(_SEED), indices)


def degraded(degradation: Degradation, images: np.ndarray, first: int = 0) -> np.ndarray:
    """Degrades images exactly as evaluations do.

    Args:
      degradation: applied to the images.
      images: successive images of a dataset, `(N, H, W, C)` uint8.
      first: index of the first of them.

    Raises:
      ConfigError: the degradation, which may be one's own, makes arrays of another size than it
        says, or values that are NaN or infinite.
    """
    return degraded_at(degradation, images, np.arange(first, first + len(images)))


def degraded_at(degradation: Degradation, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The same of any images of a dataset, `(N, H, W, C)` uint8, at `(N,)` indices."""
    arguments = jax.device_put((images, indices.astype(np.int32)))
    results = jax.device_get(_degrade(degradation)(*arguments))
    factor = degradation.reduction
    count, height, width, channels = images.shape
    expected = (count, height // factor, width // factor, channels)
    if np.shape(results) != expected:
        raise ConfigError(
            f"{degradation} makes arrays of shape {np.shape(results)} of images of shape "
            f"{images.shape}; with its reduction {factor} they must be {expected}"
        )
    if not np.isfinite(results).all():
        raise ConfigError(f"{degradation} makes values that are NaN or infinite; keep them finite")
    return results


@functools.lru_cache(maxsize=8)
def _degrade(degradation: Degradation) -> Callable[[jax.Array, jax.Array], jax.Array]:
    prepare = degrading(degradation)
    return jax.jit(lambda images, indices: prepare(images, keys(indices))[0])


def baseline(
    degradation: Degradation,
    devices: Devices,
    images: np.ndarray | Source,
    batch_size: int | None = None,
) -> Scores:
    """Scores of the degraded images themselves, enlarged by bicubic interpolation if smaller."""
    scale = degradation.reduction * (images.scale if isinstance(images, Pairs) else 1)
    return Evaluator(
        lambda _, degraded: layers.enlarged(degraded, scale),
        degradation,
        devices,
        batch_size,
        multiple=scale,
    )({}, images)


def table(
    evaluation: Scores, baseline: Scores, classical: Mapping[str, Scores] | None = None
) -> str:
    """Scores before and after, and of classical methods, worst first, as a table in text."""
    others = sorted((classical or {}).items(), key=lambda item: -item[1]["mse"])
    rows = {"degraded": baseline, **dict(others), "restored": evaluation}
    width = max(map(len, rows)) + 2
    columns = [
        column
        for column in (
            ("PSNR in dB", "psnr", 2, 16),
            ("SSIM", "ssim", 4, 18),
            ("MSE", "mse", 5, 20),
            ("PSNR, Y", "psnr_y", 2, 16),
            ("SSIM, Y", "ssim_y", 4, 18),
        )
        if column[1] in evaluation
    ]

    def entry(scores, name, digits):
        # Runs by earlier versions have no intervals.
        half = scores.get("ci95", {}).get(name)
        return f"{scores[name]:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")

    heads = "".join(f"{title:>{size}}" for title, _, _, size in columns)
    lines = [
        f"{name:{width}}"
        + "".join(f"{entry(scores, key, digits):>{size}}" for _, key, digits, size in columns)
        for name, scores in rows.items()
    ]
    return "\n".join([f"{'':{width}}{heads}", *lines])


def ranked(psnr: np.ndarray, count: int = 3) -> dict[str, np.ndarray]:
    """Indices of the images with the highest, median and lowest PSNR.

    Args:
      psnr: `(N,)`, of each image.
      count: how many of each kind; fewer if an image would otherwise come twice.
    """
    order = np.argsort(-psnr, kind="stable")
    if len(order) < 3:
        return {"best": order[:1], "worst": order[1:]}
    count = min(count, len(order) // 3)
    middle = (len(order) - count) // 2
    return {"best": order[:count], "median": order[middle:][:count], "worst": order[-count:]}
