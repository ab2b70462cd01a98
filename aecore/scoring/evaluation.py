"""Scores of a network over a dataset; every image counts exactly once."""

import collections
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from aecore.data import sources
from aecore.data.batches import evaluation_batches
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.restoring.restorer import Restorer
from aecore.scoring import reports
from aecore.steps import step
from aecore.steps.devices import Devices
from aecore.steps.step import Apply, degrading, score
from aecore.storage import to_path, write_json

_log = logging.getLogger(__name__)

# The noise in evaluations depends on an image's index only, so that all runs and models are scored
# on the same inputs.
_SEED = 20070607

# Pixel values per device and call: enough that the cost of a call doesn't matter, and on CPUs few
# enough that activations stay in their caches.
_VALUES, _VALUES_ON_CPU = 2**18, 2**17

Scores = dict[str, Any]
"""`images`, how many; the means `mse`, `psnr` (dB) and `ssim`; and `ci95`, the half width of each
mean's 95 % confidence interval, taking images as independent (absent for a single image)."""

PerImage = dict[str, np.ndarray]
"""`mse`, `psnr` and `ssim`, each `(N,)` float32."""


class Stopped(Exception):  # noqa: N818 as it is no error.
    """An evaluation was asked to stop."""


class Evaluator:
    """Scores a network on images. Compiles once; call it as often as needed.

    Args:
      apply: `(params, images) -> images`, on `(B, H, W, C)` float32.
      degradation: applied to the images, with noise that depends on their index.
      devices: the devices to use.
      batch_size: images per call, rounded up to a multiple of the devices; None: a fast number.
    """

    def __init__(
        self,
        apply: Apply,
        degradation: Degradation,
        devices: Devices,
        batch_size: int | None = None,
    ):
        prepare = degrading(degradation)

        def eval_step(params, images, indices):
            return step.eval_step(params, images, keys(indices), apply=apply, prepare=prepare)

        self._devices = devices
        self._batch_size = batch_size
        self._eval_step = devices.compile_eval_step(eval_step)
        self._compiled = None

    def compile_ahead(self, params: Any, array: np.ndarray) -> None:
        """Starts to compile, in the background, the program for a call with these arguments.

        Args:
          params: the network's parameters, or their shapes, dtypes and shardings.
          array: `(N, H, W, C)` uint8; only its shape matters.
        """
        size = self._size_of_batches(array)
        sharding = self._devices.sharded
        arguments = (
            params,
            jax.ShapeDtypeStruct((size, *array.shape[1:]), np.uint8, sharding=sharding),
            jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
        )
        executor = ThreadPoolExecutor(1)
        self._compiled = executor.submit(lambda: self._eval_step.lower(*arguments).compile())
        executor.shutdown(wait=False)

    def _size_of_batches(self, array: np.ndarray) -> int:
        if self._batch_size is not None:
            return self._devices.round_up(self._batch_size)
        values = _VALUES_ON_CPU if self._devices.platform == "cpu" else _VALUES
        most = max(1, values // math.prod(array.shape[1:])) * self._devices.device_count
        count = -(-len(array) // most)
        return self._devices.round_up(-(-len(array) // count))

    def __call__(
        self, params: Any, array: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> Scores:
        """Mean scores over all images; arguments and errors as for `per_image`."""
        return summarize(self.per_image(params, array, stop))

    def per_image(
        self, params: Any, array: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> PerImage:
        """Scores of each image.

        Args:
          params: the network's parameters.
          array: `(N, H, W, C)` uint8 originals, N at least 1.
          stop: called before each batch; returns whether to stop the evaluation.

        Returns:
          `mse`, `psnr` in dB and `ssim`, each `(N,)`.

        Raises:
          Stopped: `stop` said so.
        """
        size = self._size_of_batches(array)
        if self._compiled:
            self._compiled.result()  # JAX keeps the compiled program.
        values = []
        running = collections.deque()

        def collect():
            results, count = running.popleft()
            values.append({name: v[:count] for name, v in jax.device_get(results).items()})

        share = self._devices.share(size)
        for batch in evaluation_batches(array, size):
            if stop():
                raise Stopped
            placed = self._devices.shard((batch.images[share], batch.indices[share]))
            running.append((self._eval_step(params, *placed), batch.count))
            # Starts the next batch before waiting for this one.
            if len(running) > 1:
                collect()
        while running:
            collect()
        return concatenate(values)


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
    deviations = {
        name: float(v.std(dtype=np.float64, ddof=count > 1)) for name, v in values.items()
    }
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
    """
    return _degraded_at(degradation, images, np.arange(first, first + len(images)))


def _degraded_at(degradation: Degradation, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    arguments = jax.device_put((images, indices.astype(np.int32)))
    return jax.device_get(_degrade(degradation)(*arguments))


@functools.lru_cache(maxsize=8)
def _degrade(degradation: Degradation) -> Callable[[jax.Array, jax.Array], jax.Array]:
    prepare = degrading(degradation)
    return jax.jit(lambda images, indices: prepare(images, keys(indices))[0])


def baseline(
    degradation: Degradation,
    devices: Devices,
    array: np.ndarray,
    batch_size: int | None = None,
) -> Scores:
    """Scores of the degraded images themselves."""
    return Evaluator(lambda _, images: images, degradation, devices, batch_size)({}, array)


def table(
    evaluation: Scores, baseline: Scores, classical: Mapping[str, Scores] | None = None
) -> str:
    """Scores before and after, and of classical methods, worst first, as a table in text."""
    others = sorted((classical or {}).items(), key=lambda item: -item[1]["mse"])
    rows = {"degraded": baseline, **dict(others), "restored": evaluation}
    width = max(map(len, rows)) + 2

    def entry(scores, name, digits):
        # Runs by earlier versions have no intervals.
        half = scores.get("ci95", {}).get(name)
        return f"{scores[name]:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")

    return "\n".join(
        [f"{'':{width}}{'PSNR in dB':>14}{'SSIM':>18}{'MSE':>20}"]
        + [
            f"{name:{width}}{entry(scores, 'psnr', 2):>14}{entry(scores, 'ssim', 4):>18}"
            f"{entry(scores, 'mse', 5):>20}"
            for name, scores in rows.items()
        ]
    )


def evaluate(
    run: str,
    *,
    data_dir: str | None = None,
    batch_size: int | None = None,
    model: Any = None,
    degradation: Degradation | None = None,
    classical: bool | Sequence[str] = False,
    save: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores the best checkpoint of a run on its validation images, as training does.

    Args:
      run: a run directory.
      data_dir: where the data are now, if they have moved.
      batch_size: images per call; None: a fast number.
      model: needed if the checkpoint's model is not in `aecore.models.REGISTRY`.
      degradation: applied to the images; by default that of the run.
      classical: whether to score classical methods too, tuned on training images; or the names of
        methods to score.
      save: whether to add the scores to the run's `summary.json` and to write `ranked.png` with the
        best, median and worst results by PSNR.
      progress: whether to show a progress bar for the classical methods.

    Returns:
      `evaluation` and `baseline`, as in `summary.json`; if asked for, `classical`: scores and
      `settings` of each method.

    Raises:
      CheckpointError: there is no usable checkpoint.
      ConfigError: `batch_size` is less than 1; the images don't fit the run; a classical method is
        unknown or not installed; or the scores to save are not those of the run's own images.
      DataError: the data can't be loaded.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is less than 1; use 1 or more")
    restorer = Restorer.load(run, model=model)
    experiment = restorer.description.experiment(model=model)
    own = degradation in (None, experiment.degradation)
    degradation = degradation or experiment.degradation
    from aecore.scoring import classical as classical_methods

    names = (classical,) if isinstance(classical, str) else classical
    methods = {}
    if names:
        methods = classical_methods.methods(degradation, None if names is True else names)
    directory = to_path(run)
    summary = _read_summary(directory) if save else {}
    settings = experiment.data
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    dataset = sources.load(settings)
    experiment.check_images(*dataset.image_shape)
    if dataset.fingerprint() != restorer.description.fingerprint:
        own = False
        _log.warning("these are not the images that %s was trained on", run)
    if save and not own:
        raise ConfigError(
            "a run's summary holds scores on the run's own images and degradation only; "
            "leave out save"
        )
    validation = sources.whole_array(dataset.validation)
    devices = Devices()
    evaluator = Evaluator(
        restorer.network.apply,
        degradation,
        devices,
        batch_size,
    )
    values = evaluator.per_image(devices.replicate(restorer.params), validation)
    scores = {
        "evaluation": {"step": restorer.description.step, **summarize(values)},
        "baseline": baseline(degradation, devices, validation, batch_size),
    }
    if methods:
        scores["classical"] = classical_methods.scores(
            methods, degradation, dataset, progress=progress
        )
    if save:
        merged = summary.get("classical", {}) | scores.get("classical", {})
        summary |= scores | ({"classical": merged} if merged else {})
        write_json(directory / "summary.json", summary)
        _save_ranked(directory, restorer, degradation, validation, values["psnr"])
    return scores


def _read_summary(directory: epath.Path) -> dict[str, Any]:
    path = directory / "summary.json"
    try:
        summary = json.loads(path.read_text())
        if not isinstance(summary.get("classical", {}), dict):
            raise ValueError("classical is no object")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} can't be read ({error}); finish the training of this run first"
        ) from error
    return summary


def ranked(psnr: np.ndarray, count: int = 3) -> dict[str, np.ndarray]:
    """Indices of the images with the highest, median and lowest PSNR, `count` each."""
    order = np.argsort(-psnr, kind="stable")
    middle = (len(order) - count) // 2
    return {"best": order[:count], "median": order[middle:][:count], "worst": order[-count:]}


def _save_ranked(
    directory: epath.Path,
    restorer: Restorer,
    degradation: Degradation,
    validation: np.ndarray,
    psnr: np.ndarray,
) -> None:
    chosen = ranked(psnr)
    indices = np.concatenate(list(chosen.values()))
    noisy = _degraded_at(degradation, validation[indices], indices)
    reports.save_samples(
        {
            "degraded": noisy,
            "restored": restorer(noisy),
            "original": validation[indices].astype(np.float32) / 255,
        },
        directory / "ranked.png",
        [f"{name}, {psnr[i]:.1f} dB" for name, part in chosen.items() for i in part],
    )
