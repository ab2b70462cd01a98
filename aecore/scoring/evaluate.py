"""Scores a run on its own images, or any network on any pictures."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from aecore.data import sources
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.restoring.engine import is_count
from aecore.restoring.restorer import Restorer
from aecore.restoring.tensors import scalar
from aecore.restoring.tiled import in_tiles
from aecore.scoring import classical as classical_methods
from aecore.scoring import evaluation, reports
from aecore.scoring import pictures as any_pictures
from aecore.steps.devices import Devices
from aecore.storage import to_path, write_json

_log = logging.getLogger(__name__)


def evaluate(
    run: str,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
    model: Any = None,
    degradation: Degradation | None = None,
    classical: bool | Sequence[str] = False,
    save: bool = False,
    csv: str | None = None,
    pictures: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores the best checkpoint of a run on its validation images, or any network on any pictures.

    A run's own images are scored as training does it: MSE of the outputs as they are, PSNR and SSIM
    of the outputs within [0, 1], so that the two differ where outputs leave that range. Pictures
    are scored as papers do: each is degraded and restored whole, at its own size; see `protocol` in
    what is returned.

    Args:
      run: a run directory; for pictures, also an exported file, or the name of weights that ship
        with aecore.
      data: a folder of pictures, or of pairs in its folders `degraded` and `original`.
      data_dir: where the run's data are now, if they have moved.
      batch_size: images per call; None: a fast number.
      model: needed if the checkpoint's model is not in `aecore.models.REGISTRY`.
      degradation: applied to the images; by default that of the run, and none for pairs.
      classical: whether to score classical methods too; or the names of methods to score. They are
        tuned on training images; for pictures, on the middles of the first of them, which favours
        them.
      save: whether to add the scores to the run's `summary.json` and, of whole images, to write
        `ranked.png` with the best, median and worst results by PSNR.
      csv: for pictures, a file to write the scores of each to.
      pictures: for pictures, a PNG file to show the best, median and worst results in.
      progress: whether to show a progress bar.

    Returns:
      `evaluation` and `baseline`, as in `summary.json`; if asked for, `classical`: scores of each
      method, and on the run's own images its `settings`. For pictures also `psnr_y` and `ssim_y`,
      on luma, and `protocol`, a text.

    Raises:
      CheckpointError: there is no usable checkpoint.
      ConfigError: `batch_size` is less than 1; the images or the degradation don't fit the run; a
        classical method is unknown or not installed; or the scores to save are not those of the
        run's own images.
      DataError: the data can't be loaded.
    """
    batch_size = scalar(batch_size)
    if batch_size is not None and not is_count(batch_size, least=1):
        raise ConfigError(f"batch_size {batch_size!r} is not possible; use 1 or more")
    methods = (classical,) if isinstance(classical, str) else classical
    if data is None:
        if csv is not None or pictures is not None:
            raise ConfigError(
                "csv and pictures are for scoring pictures; name their folder with data"
            )
        return _evaluate_own(
            run,
            data_dir=data_dir,
            batch_size=batch_size,
            model=model,
            degradation=degradation,
            methods=methods,
            save=save,
            progress=progress,
        )
    if save or data_dir is not None:
        raise ConfigError(
            "save and data_dir are for a run's own images only; leave out data, or these"
        )
    return any_pictures.evaluate(
        Restorer.load(run, model=model, batch_size=batch_size, in_range=False),
        data,
        degradation,
        methods=methods,
        csv_file=csv,
        picture_file=pictures,
        progress=progress,
    )


def _evaluate_own(
    run: str,
    *,
    data_dir: str | None,
    batch_size: int | None,
    model: Any,
    degradation: Degradation | None,
    methods: bool | Sequence[str],
    save: bool,
    progress: bool,
) -> dict[str, Any]:
    """Scores a run on its validation images."""
    restorer = Restorer.load(run, model=model)
    experiment = restorer.description.experiment(model=model)
    places = (experiment.data.data_dir, data_dir)
    if experiment.data.dataset in ("folder", "pairs") and places == (None, None):
        raise ConfigError(f"{run} doesn't say where its pictures are; name some with data (--data)")
    own = degradation in (None, experiment.degradation)
    degradation = degradation or experiment.degradation
    if degradation.reduction != experiment.degradation.reduction:
        raise ConfigError(
            f"{degradation!r} makes images {degradation.reduction} times smaller, the degradation "
            f"of the training {experiment.degradation.reduction} times; use one that does so too"
        )
    experiment = dataclasses.replace(experiment, degradation=degradation)
    chosen = {}
    if methods and experiment.data.crop is not None:
        _log.warning(
            "classical methods are left out, as %s was trained on crops; to score them, name a "
            "folder of pictures",
            run,
        )
    elif methods:
        chosen = classical_methods.methods(degradation, None if methods is True else methods)
    directory = to_path(run)
    summary = _read_summary(directory) if save else {}
    settings = experiment.data
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    dataset = sources.load(settings)
    experiment.check_images(*dataset.image_shape, dataset.scale)
    if dataset.fingerprint() != restorer.description.fingerprint:
        own = False
        _log.warning("these are not the images that %s was trained on", run)
    if save and not own:
        raise ConfigError(
            "a run's summary holds scores on the run's own images and degradation only; "
            "leave out save"
        )
    validation = dataset.to_validate()
    devices = Devices()
    multiple = restorer.network.stride * restorer.network.scale
    evaluator = evaluation.Evaluator(
        in_tiles(restorer.network), degradation, devices, batch_size, multiple
    )
    values = evaluator.per_image(devices.replicate(restorer.trained.params), validation)
    scores = {
        "evaluation": {"step": restorer.description.step, **evaluation.summarize(values)},
        "baseline": evaluation.baseline(degradation, devices, validation, batch_size),
    }
    if chosen:
        scores["classical"] = classical_methods.scores(
            chosen, degradation, dataset, progress=progress
        )
    if save:
        merged = summary.get("classical", {}) | scores.get("classical", {})
        summary |= scores | ({"classical": merged} if merged else {})
        write_json(directory / "summary.json", summary)
        if isinstance(validation, np.ndarray):
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


def _save_ranked(
    directory: epath.Path,
    restorer: Restorer,
    degradation: Degradation,
    validation: np.ndarray,
    psnr: np.ndarray,
) -> None:
    chosen = evaluation.ranked(psnr)
    indices = np.concatenate(list(chosen.values()))
    noisy = evaluation.degraded_at(degradation, validation[indices], indices)
    reports.save_samples(
        {
            "degraded": noisy,
            "restored": restorer(noisy),
            "original": validation[indices].astype(np.float32) / 255,
        },
        directory / "ranked.png",
        [f"{name}, {psnr[i]:.1f} dB" for name, part in chosen.items() for i in part],
    )
