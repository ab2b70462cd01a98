"""Scores of a network over a dataset, each image counted exactly once."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from aecore import config, data, steps
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.parallel import DataParallel
from aecore.restoration import Restorer

_log = logging.getLogger(__name__)

# The noise of evaluation depends on an image's index and on nothing that a run can choose, so
# that every run and every model is scored on the same inputs.
_SEED = 20070607

Scores = dict[str, float]


class Evaluator:
    """Scores a network on images; compiles once and can be called many times.

    Args:
      apply: `(params, images) -> images`, on `(B, H, W, C)` float32.
      degradation: what is done to the images first, with noise that depends on their index.
      parallel: the devices to use.
      batch_size: images at a time, rounded up to what the devices can divide.
    """

    def __init__(
        self,
        apply: steps.Apply,
        degradation: Degradation,
        parallel: DataParallel,
        batch_size: int,
    ):
        prepare = steps.degrading(degradation)

        def eval_step(params, images, indices):
            return steps.eval_step(params, images, keys(indices), apply=apply, prepare=prepare)

        self._parallel = parallel
        self._batch_size = parallel.round_up(batch_size)
        self._eval_step = parallel.compile_eval_step(eval_step)

    def __call__(
        self, params: Any, array: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> Scores | None:
        """The means over all images.

        Args:
          params: the network's parameters.
          array: `(N, H, W, C)` uint8 originals, N at least 1.
          stop: asked before each batch; when it says yes, the evaluation is given up.

        Returns:
          `images` (N), `mse`, `psnr` in dB and `ssim`; None if it was given up.
        """
        values = collections.defaultdict(list)
        running = collections.deque()

        def collect():
            results, count = running.popleft()
            for name, per_image in jax.device_get(results).items():
                values[name].append(per_image[:count])

        for batch in data.evaluation_batches(array, self._batch_size):
            if stop():
                return None
            share = self._parallel.share(self._batch_size)
            placed = self._parallel.place((batch.images[share], batch.indices[share]))
            running.append((self._eval_step(params, *placed), batch.count))
            # The next batch starts before this one is waited for.
            if len(running) > 1:
                collect()
        while running:
            collect()
        means = {n: float(np.concatenate(v).mean(dtype=np.float64)) for n, v in values.items()}
        return {"images": len(array), **means}


def keys(indices: jax.Array) -> jax.Array:
    """The PRNG keys with which the images at `(N,)` indices are degraded for evaluation."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(_SEED), indices)


def degraded(degradation: Degradation, images: np.ndarray) -> np.ndarray:
    """The first images of a dataset, `(N, H, W, C)` uint8, degraded as they are for evaluation."""
    prepare = jax.jit(lambda images, indices: steps.degrading(degradation)(images, keys(indices)))
    indices = np.arange(len(images), dtype=np.int32)
    return jax.device_get(prepare(*jax.device_put((images, indices)))[0])


def baseline(degradation: Degradation, parallel: DataParallel, batch_size: int, array: np.ndarray):
    """The scores of the degraded images themselves."""
    return Evaluator(lambda _, images: images, degradation, parallel, batch_size)({}, array)


def table(evaluation: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """The scores before and after, as lines of text."""
    rows = [("degraded", baseline), ("restored", evaluation)]
    return "\n".join(
        [f"{'':10}{'PSNR':>10}{'SSIM':>9}{'MSE':>10}"]
        + [
            f"{name:10}{scores['psnr']:7.2f} dB{scores['ssim']:9.4f}{scores['mse']:10.5f}"
            for name, scores in rows
        ]
    )


def evaluate(
    run: str,
    *,
    data_dir: str | None = None,
    batch_size: int | None = None,
    model: Any = None,
) -> dict[str, Scores]:
    """Scores a run's best checkpoint on its validation images, as training did.

    Args:
      run: a run directory.
      data_dir: where the data are now, if they have moved.
      batch_size: images at a time; as in training by default.
      model: needed if the checkpoint's model is not in `aecore.models.REGISTRY`.

    Returns:
      `evaluation` and `baseline`, as in `summary.json`.

    Raises:
      CheckpointError: there is no usable checkpoint.
      ConfigError: `batch_size` is less than 1, or the images are not of the run's kind.
      DataError: the data can't be loaded.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} is less than 1; use 1 or more")
    restorer = Restorer.load(run, model=model)
    experiment = config.from_json(restorer.description, model=restorer.model)
    settings = experiment.data
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    dataset = data.load(settings)
    experiment.check_images(*dataset.image_shape)
    if dataset.fingerprint() != restorer.description["fingerprint"]:
        _log.warning("these are not the images that %s was trained on", run)
    parallel = DataParallel()
    batch_size = batch_size or experiment.training.batch_size
    evaluator = Evaluator(
        restorer.network.apply,
        experiment.degradation,
        parallel,
        batch_size,
    )
    params = parallel.replicate(restorer.params)
    step = restorer.description["step"]
    return {
        "evaluation": {"step": step, **evaluator(params, dataset.validation)},
        "baseline": baseline(experiment.degradation, parallel, batch_size, dataset.validation),
    }
