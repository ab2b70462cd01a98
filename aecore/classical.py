"""Classical methods that restore images without learning, to judge a network by.

Each has a few settings, the best of which, by MSE, is found on training images alone; then it is
scored on the same degraded images as a network.
"""

import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from aecore import evaluation
from aecore.data import Dataset
from aecore.degradations import Degradation, Pixelate
from aecore.errors import ConfigError

_log = logging.getLogger(__name__)

_TUNED_ON = 100
"""Training images on which settings are compared."""

_BATCH = 500
"""Images restored and scored at a time."""


class Method(NamedTuple):
    """A way to restore one image, `(H, W, C)` float32 in [0, 1]."""

    restore: Callable[..., np.ndarray]
    """`(image, **settings) -> image`."""
    grid: Mapping[str, Sequence[Any]]
    """Values of its settings, of which every combination is tried."""
    package: str | None = None
    """What must be installed besides aecore's own dependencies, as it is imported."""
    threads: bool = True
    """Whether several images may be restored at once."""

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
    return restored.reshape(image.shape)  # It drops an axis of one channel.


def _bm3d(image, sigma):
    import bm3d

    return bm3d.bm3d(image, sigma).reshape(image.shape)


def _bicubic(image, scale):
    """Area-resized to the size that pixelation kept, and up again by bicubic interpolation."""
    height, width = image.shape[:2]
    small = tuple(max(int(side * scale + 1e-4), 1) for side in (width, height))
    channels = [
        Image.fromarray(channel)
        .resize(small, Image.Resampling.BOX)
        .resize((width, height), Image.Resampling.BICUBIC)
        for channel in np.moveaxis(image, 2, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


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
    # Its threads are its own, and it ends the process if it is called from several.
    "bm3d": Method(_bm3d, {"sigma": (0.02, *_STRENGTHS)}, "bm3d", threads=False),
}


def methods(degradation: Degradation, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods that can be used against a degradation.

    Args:
      degradation: bicubic interpolation is for pixelation alone.
      names: which to use; by default all whose packages are installed.

    Raises:
      ConfigError: one of the names is unknown, or its package is not installed.
    """
    known = dict(METHODS)
    if isinstance(degradation, Pixelate):
        scales = degradation.scale if isinstance(degradation.scale, tuple) else None
        grid = np.linspace(*scales, 5).tolist() if scales else [degradation.scale]
        known["bicubic"] = Method(_bicubic, {"scale": grid})
    missing = {
        name: method.package
        for name, method in known.items()
        if method.package and importlib.util.find_spec(method.package) is None
    }
    if names is None:
        if "skimage" in missing.values():
            _log.warning(
                "scikit-image is not installed: total variation and non-local means are left out; "
                'pip install "aecore[classical]" brings it'
            )
        return {name: method for name, method in known.items() if name not in missing}
    for name in names:
        if name not in known:
            raise ConfigError(f"no classical method {name!r} here; use {', '.join(known)}")
        if name in missing:
            raise ConfigError(f"{name} needs the package {missing[name]}; install it")
    return {name: known[name] for name in names}


def scores(
    degradation: Degradation,
    dataset: Dataset,
    names: Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """What classical methods reach on a dataset's validation images.

    Args:
      degradation: what is done to the images.
      dataset: settings are chosen on its first training images.
      names: which methods; by default all whose packages are installed.
      progress: whether to show a progress bar.

    Returns:
      For each method scores as `evaluation.Evaluator` gives them, and `settings`.
    """
    chosen = methods(degradation, names)
    tuned_on, count = dataset.train[:_TUNED_ON], len(dataset.validation)
    tries = sum(len(list(method.settings())) for method in chosen.values())
    with (
        ThreadPoolExecutor() as pool,
        tqdm(
            desc="classical methods",
            total=tries * len(tuned_on) + len(chosen) * count,
            unit=" images",
            disable=not progress,
        ) as bar,
    ):

        def score(method, settings, originals, degraded):
            restore = functools.partial(method.restore, **settings)
            restored = (pool.map if method.threads else map)(restore, degraded)
            values = evaluation.image_scores(np.stack(list(restored), dtype=np.float32), originals)
            bar.update(len(originals))
            return values

        # Noise that no validation image gets.
        degraded = evaluation.degraded(degradation, tuned_on, count)
        best = {
            name: min(
                method.settings(),
                key=lambda settings: score(method, settings, tuned_on, degraded)["mse"].mean(),
            )
            for name, method in chosen.items()
        }
        values = {name: [] for name in chosen}
        for start in range(0, count, _BATCH):
            originals = dataset.validation[start : start + _BATCH]
            degraded = evaluation.degraded(degradation, originals, start)
            for name, method in chosen.items():
                values[name].append(score(method, best[name], originals, degraded))
    return {
        name: {**evaluation.summarize(evaluation.concatenate(values[name])), "settings": best[name]}
        for name in chosen
    }
