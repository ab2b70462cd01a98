"""Classical image restoration, without learning, as a yardstick for networks.

Each method's settings are tuned by MSE on training images only; then it is scored on the same
degraded images as the network.
"""

import collections
import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from aecore.data.sources import Dataset, whole_array
from aecore.degradations import Compose, Degradation, Pixelate, enlarging
from aecore.errors import ConfigError
from aecore.scoring import evaluation

_log = logging.getLogger(__name__)

_TUNED_ON = 100
"""Training images used to tune settings."""

_BATCH_BYTES = 8 * 2**20
"""Size of the images restored and scored at a time, as float32."""

_CURVE_POINTS = 32
"""Points of the curve that calibrates a method."""

CALIBRATED = ", calibrated"
"""Suffix of a method's name when its output goes through the calibration curve."""


class Method(NamedTuple):
    """A way to restore one image, `(H, W, C)` float32 in [0, 1]."""

    restore: Callable[..., np.ndarray]
    """`(image, **settings) -> image`."""
    grid: Mapping[str, Sequence[Any]]
    """Values to try for each setting; every combination is tried."""
    package: str | None = None
    """Import name of a package that must be installed in addition to aecore's dependencies."""
    threads: bool = True
    """Whether several threads may restore images at once."""

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every combination."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def _median(image, size):
    import scipy.ndimage

    return scipy.ndimage.median_filter(image, (size, size, 1))


def _gaussian(image, sigma):
    import scipy.ndimage

    return scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0))


def _total_variation(image, weight):
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(image, weight, channel_axis=-1)


def _non_local_means(image, h, patch_size):
    from skimage.restoration import denoise_nl_means

    restored = denoise_nl_means(image, patch_size, patch_distance=6, h=h, channel_axis=-1)
    return restored.reshape(image.shape)  # scikit-image drops an axis of one channel.


def _bm3d(image, sigma):
    import bm3d  # pyright: ignore[reportMissingImports]  # Not on every platform.

    restore = bm3d.bm3d_rgb if image.shape[2] == 3 else bm3d.bm3d
    return restore(image, sigma).reshape(image.shape)


def _bicubic(image, scale):
    """Recovers the small image behind the pixelation and enlarges it by bicubic interpolation."""
    rows, columns = (_reducing(side, scale) for side in image.shape[:2])
    small = np.einsum("ih,hwc,jw->ijc", rows, image, columns, dtype=np.float32)
    return np.asarray(jax.image.resize(small, image.shape, "bicubic", antialias=False))


@functools.lru_cache(maxsize=32)
def _reducing(size: int, scale: float) -> np.ndarray:
    """`(small, size)`: matrix from an enlarged side back to the kept pixels."""
    return np.linalg.pinv(enlarging(size, scale))


def _opencv_non_local_means(image, h):
    import cv2  # pyright: ignore[reportMissingImports]  # Nothing else here needs it.

    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    if image.shape[2] == 1:
        restored = cv2.fastNlMeansDenoising(pixels, None, h, 7, 21)
    else:
        restored = cv2.fastNlMeansDenoisingColored(pixels, None, h, h, 7, 21)
    return restored.reshape(image.shape).astype(np.float32) / 255


def _enlarged(image, scale, method):
    height, width, channels = image.shape
    shape = (scale * height, scale * width, channels)
    return np.asarray(jax.image.resize(image, shape, method, antialias=False))


_STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)

METHODS: dict[str, Method] = {
    "median": Method(_median, {"size": (3, 5, 7)}),
    "gaussian": Method(_gaussian, {"sigma": (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 2.5)}),
    "total variation": Method(
        _total_variation, {"weight": (0.01, 0.03, *_STRENGTHS, 1.0, 1.3)}, "skimage"
    ),
    "non-local means": Method(
        _non_local_means, {"h": (0.01, 0.03, *_STRENGTHS), "patch_size": (3, 5, 7)}, "skimage"
    ),
    "non-local means (OpenCV)": Method(
        _opencv_non_local_means, {"h": (2, 3, 5, 7, 10, 13, 17, 22, 28, 35, 45, 60)}, "cv2"
    ),
    # bm3d has threads of its own, and ends the process if it is called from several.
    "bm3d": Method(_bm3d, {"sigma": (0.02, *_STRENGTHS)}, "bm3d", threads=False),
}


def methods(degradation: Degradation, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods that apply to a degradation.

    Args:
      degradation: bicubic interpolation is only offered for pixelation.
      names: methods to use; by default all whose packages are installed.

    Raises:
      ConfigError: a name is unknown, or its package is not installed.
    """
    if degradation.reduction > 1:
        known = {
            "lanczos": Method(
                _enlarged, {"scale": (degradation.reduction,), "method": ("lanczos3",)}
            )
        }
    else:
        known = dict(METHODS)
    parts = degradation.parts if isinstance(degradation, Compose) else (degradation,)
    for part in parts:
        if isinstance(part, Pixelate):
            ends = part.scale if isinstance(part.scale, tuple) else (part.scale,)
            known["bicubic"] = Method(
                _bicubic, {"scale": np.unique(np.linspace(ends[0], ends[-1], 5)).tolist()}
            )
    missing = {
        name: method.package
        for name, method in known.items()
        if method.package and importlib.util.find_spec(method.package) is None
    }
    if names is None:
        if "skimage" in missing.values():
            _log.warning(
                "total variation and non-local means are skipped, as they need scikit-image; "
                'install it with pip install "aecore[classical]"'
            )
        return {name: method for name, method in known.items() if name not in missing}
    for name in names:
        if name not in known:
            raise ConfigError(f"no classical method {name!r} here; use {', '.join(known)}")
        if name in missing:
            raise ConfigError(f"{name} needs the package {missing[name]}; install it")
    return {name: known[name] for name in names}


def tuned(
    chosen: Mapping[str, Method], examples: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Methods with the settings that have the least MSE on some examples.

    Args:
      chosen: the methods, from `methods`.
      examples: degraded and original images, `(H, W, C)` float32 in [0, 1].

    Returns:
      For each method `degraded image -> restored image`.
    """

    def error(restore: Callable[[np.ndarray], np.ndarray]) -> float:
        return sum(float(((restore(given) - image) ** 2).mean()) for given, image in examples)

    def best(method: Method) -> Callable[[np.ndarray], np.ndarray]:
        tries = [functools.partial(method.restore, **settings) for settings in method.settings()]
        return tries[0] if len(tries) == 1 else min(tries, key=error)

    return {name: best(method) for name, method in chosen.items()}


def scores(
    chosen: Mapping[str, Method],
    degradation: Degradation,
    dataset: Dataset,
    *,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Scores classical methods on a dataset's validation images.

    Clipped noise has a bias: black becomes gray on average. Filters keep it, networks learn to undo
    it. For a fair comparison, the best method is scored a second time after a calibration curve,
    fitted on training images.

    Args:
      chosen: the methods, from `methods`.
      degradation: applied to the images.
      dataset: settings and the curve are chosen on its first training images.
      progress: whether to show a progress bar.

    Returns:
      For each method its scores, as from `evaluation.Evaluator`, and its `settings`; the same for
      the best calibrated method, whose name ends with `CALIBRATED`.
    """
    validation = whole_array(dataset.validation)
    tuned_on, count = whole_array(dataset.train)[:_TUNED_ON], len(validation)
    tries = sum(len(list(method.settings())) for method in chosen.values())
    with (
        ThreadPoolExecutor() as pool,
        tqdm(
            desc="classical methods",
            total=tries * len(tuned_on) + (len(chosen) + 1) * count,
            unit=" images",
            delay=2,
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):

        def restored(method, settings, degraded):
            restore = functools.partial(method.restore, **settings)
            images = list((pool.map if method.threads else map)(restore, degraded))
            bar.update(len(images))
            return np.stack(images, dtype=np.float32)

        # With indices beyond the validation images', so that the noise is different.
        degraded = evaluation.degraded(degradation, tuned_on, count)
        best, curves, errors = {}, {}, {}
        for name, method in chosen.items():
            tried = []
            for settings in method.settings():
                images = restored(method, settings, degraded)
                curve = _fitted_curve(images, tuned_on)
                tried.append(
                    (_mse(images, tuned_on), _mse(curve(images), tuned_on), settings, curve)
                )
            best[name] = min(tried, key=lambda entry: entry[0])[2]
            _, errors[name], *curves[name] = min(tried, key=lambda entry: entry[1])
        calibrated = min(errors, key=lambda name: errors[name])

        values = collections.defaultdict(list)
        batch = max(1, _BATCH_BYTES // (4 * validation[0].size))
        for start in range(0, count, batch):
            originals = validation[start : start + batch]
            degraded = evaluation.degraded(degradation, originals, start)
            for name, method in chosen.items():
                images = restored(method, best[name], degraded)
                values[name].append(evaluation.image_scores(images, originals))
            settings, curve = curves[calibrated]
            images = curve(restored(chosen[calibrated], settings, degraded))
            values[calibrated + CALIBRATED].append(evaluation.image_scores(images, originals))
    best[calibrated + CALIBRATED] = curves[calibrated][0]
    return {
        name: {**evaluation.summarize(evaluation.concatenate(parts)), "settings": best[name]}
        for name, parts in values.items()
    }


def _mse(restored: np.ndarray, originals: np.ndarray) -> float:
    return float(evaluation.image_scores(restored, originals)["mse"].mean())


def _fitted_curve(
    restored: np.ndarray, originals: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The mean original value as a function of the restored value, piecewise linear."""
    values, targets = restored.ravel(), originals.ravel() / 255
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _CURVE_POINTS + 1)))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    counts = np.maximum(np.bincount(bins), 1)
    x, y = (np.bincount(bins, weights) / counts for weights in (values, targets))
    filled = np.bincount(bins) > 0
    return lambda images: np.interp(images, x[filled], y[filled]).astype(np.float32)
