"""Where a trained network comes from: a run directory, an exported file or folder, or aecore."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from aecore.errors import CheckpointError, ConfigError
from aecore.networks.network import LinenNetwork
from aecore.saved import exported, hub
from aecore.saved.descriptions import FILE_IN_CHECKPOINT
from aecore.saved.trained import TrainedNetwork
from aecore.storage import absolute, is_remote, reason


@dataclasses.dataclass(frozen=True)
class Card:
    """What someone who uses weights that ship with aecore should know of them."""

    sha256: str
    """Of their file."""
    purpose: str
    data: str
    """What they were trained on, and that data's terms."""
    limits: str
    """What they can't do."""
    benchmarks: str
    """Mean PSNR on test images, before and after."""
    licence: str = "MIT, as aecore; the training data have terms of their own"


_PHOTOGRAPHS = (
    "506 of 512 photographs: BSDS500 (Arbeláez et al., TPAMI 2011) without the 68 of CBSD68, for "
    "non-commercial research and education, and the originals of Sun-Hays80 (ICCP 2012)"
)

_LIMITS_OF_DENOISERS = (
    "the blocks of JPEG, blur, and noise whose grains are larger than a pixel, as in most "
    "compressed or resized photographs"
)

_LIMITS_OF_UPSCALERS = (
    "noisy or strongly compressed photographs, whose faults it enlarges; pictures that became "
    "small in other ways than by bicubic reduction are sharpened less"
)

CARDS: Mapping[str, Card] = {
    "fashion-mnist-denoise": Card(
        sha256="d9bde09ac9599da285bf5ff9ad6a85170a00abd4e6fe22b57907f82df5756217",
        purpose="removes Gaussian noise of σ = 0.4 from 28×28 pictures of clothes",
        data="Fashion-MNIST (Zalando SE, MIT licence), 60,000 pictures",
        limits="other noise, and pictures of anything else",
        benchmarks="10,000 test images: 10.72 and 18.85 dB",
    ),
    "lfw-enhance": Card(
        sha256="f7cecd0b9f41415a7509a5157b1ec6c9029edd93159624913b6c727c5c36cb72",
        purpose="sharpens 80×80 faces that were pixelated to 32×32",
        data="Labeled Faces in the Wild (Huang et al. 2007, a public research data set)",
        limits="pictures that are not pixelated, or telling who somebody is: it invents details",
        benchmarks="faces of people it has not seen: 23.16 and 28.62 dB",
    ),
    "photo-denoise": Card(
        sha256="4ab457d8ede30296bea8c7084ba53889805848c1b560ba3a417bdc210f741b05",
        purpose="removes Gaussian noise of any strength up to σ = 75 of 255 from photographs",
        data=_PHOTOGRAPHS,
        limits=f"gray photographs, for which there is photo-denoise-gray, {_LIMITS_OF_DENOISERS}",
        benchmarks="CBSD68 with σ = 15: 24.61 and 33.71 dB, σ = 25: 20.17 and 31.08 dB, σ = 50: "
        "14.15 and 27.89 dB",
    ),
    "photo-denoise-gray": Card(
        sha256="a98e1f566ffabc433b3603803a1f5cd167909795a1f0ea500078fab7ff106a39",
        purpose="removes Gaussian noise of any strength up to σ = 75 of 255 from gray photographs",
        data=_PHOTOGRAPHS,
        limits=f"colour, for which photo-denoise is better by 0.1 dB, {_LIMITS_OF_DENOISERS}",
        benchmarks="CBSD68 in gray with σ = 15: 24.61 and 31.11 dB, σ = 25: 20.17 and 28.73 dB, "
        "σ = 50: 14.15 and 25.90 dB",
    ),
    "photo-dejpeg": Card(
        sha256="df130ace0d0cdd03aa37a693c5e277605c873443a70abf0753a083d4cd40783a",
        purpose="removes what JPEG of quality 5 to 95 did to photographs, with and without halved "
        "colour",
        data=_PHOTOGRAPHS,
        limits="noise, blur, and pictures that were made smaller after they were compressed",
        benchmarks="LIVE1 with quality 10: 25.69 and 27.21 dB, 20: 28.06 and 29.52 dB, 40: "
        "30.28 and 31.72 dB",
    ),
    "photo-upscale-2x": Card(
        sha256="a4df93759788b32357b9a474628eca2387f27eb0f202fba84662229b484a2e45",
        purpose="makes photographs twice as large",
        data=_PHOTOGRAPHS,
        limits=_LIMITS_OF_UPSCALERS,
        benchmarks="luma, beside bicubic interpolation; Set5: 33.68 and 37.61 dB, Set14: 30.33 and "
        "33.16 dB",
    ),
    "photo-upscale-4x": Card(
        sha256="73d2ca890cbf340ec0095d6e080b48d40415eb30cf1b18d6dadea15d2f1c54f7",
        purpose="makes photographs four times as large",
        data=_PHOTOGRAPHS,
        limits=_LIMITS_OF_UPSCALERS,
        benchmarks="luma, beside bicubic interpolation; Set5: 28.43 and 31.73 dB, Set14: 26.09 and "
        "28.25 dB",
    ),
}
"""Weights that ship with aecore."""

_FOLDER = epath.resource_path("aecore.saved") / "pretrained"


def load(source: str | os.PathLike, *, model: Any = None) -> TrainedNetwork:
    """Loads a trained network; the parameters of a run are put on the default device.

    Args:
      source: a run directory, local or `gs://`; an exported file or folder; or one of `CARDS`,
        unless a file, or a folder that holds a network, has its name.
      model: needed if the model is not in `aecore.models.REGISTRY`, except for exported files that
        hold the network's functions.

    Raises:
      CheckpointError: there is nothing usable, or its model is not registered.
      ConfigError: the model is no network.
    """
    if model is not None:
        from aecore.networks import base  # Flax; exported files do without.

        base.check_module(model)
    path = _path(source)
    if str(source) in CARDS and not _holds_network(path):
        shipped, card = _FOLDER / f"{source}{exported.SUFFIX}", CARDS[str(source)]
        trained = exported.load(shipped, sha256=card.sha256)
        return dataclasses.replace(trained, about=dataclasses.asdict(card))
    if path.is_file():
        return exported.load(path, model=model)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} does not exist; name a run directory, a file that `aecore export` wrote, "
            f"or one of {', '.join(CARDS)}"
        )
    return hub.load(path, model=model) if hub.holds(path) else _of_run(path, model)


def _path(source: str | os.PathLike) -> epath.Path:
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise CheckpointError(
            f"{source!r:.60} is not a run directory, an exported file, or a name of weights"
        )
    return absolute(source)


def _holds_network(path: epath.Path) -> bool:
    """Whether there is a file, or a folder in which a network is expected by its files' names."""
    return path.is_file() or (path / "checkpoints").is_dir() or hub.holds(path)


class Version(NamedTuple):
    """Tells whether what `load` gave for a path may have changed since."""

    path: str
    files: tuple[tuple[str, int, int], ...]
    """Name, time of change and size of the file, or of each of a folder's files or checkpoints."""


def version(source: str | os.PathLike) -> Version:
    """The version of a network, without loading it; that of shipped weights never changes."""
    path = _path(source)
    if not _holds_network(path):
        return Version(str(source), ())
    if path.is_file():
        files = [path]
    elif hub.holds(path):
        files = [path / hub.CONFIG, path / hub.WEIGHTS]
    else:
        folders = [*(path / "checkpoints").glob("*")]
        # A checkpoint's description, which says how good it is, may be written after its folder.
        files = [*folders, *(folder / FILE_IN_CHECKPOINT for folder in folders)]
    # A run that is being trained replaces and removes checkpoints.
    stamps = filter(None, map(_stamp, files))
    return Version(str(path), tuple(sorted(stamps)))


def _stamp(path: epath.Path) -> tuple[str, int, int] | None:
    """Name, time of change and size; None: it is gone."""
    try:
        if is_remote(path):
            remote = path.stat()
            return path.name, remote.mtime, remote.length
        # Finer than the seconds that epath knows.
        local = pathlib.Path(path).stat()
        return path.name, local.st_mtime_ns, local.st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _of_run(run: epath.Path, model: Any) -> TrainedNetwork:
    from aecore.networks.base import abstract_params
    from aecore.saved import checkpoints

    def build_model(description):
        try:
            return description.build_model() if model is None else model
        except ConfigError as error:
            raise CheckpointError(f"{run}: {error}") from error

    def abstract(description):
        shape = (*description.image_size, description.channels)
        network = build_model(description)
        try:
            params = abstract_params(network, shape)
        except Exception as error:  # Of somebody's module, any.
            if model is None:
                raise
            raise checkpoints.UnfitError(
                f"{type(network).__name__} can't take images of {shape}: {reason(error)}"
            ) from error
        # Arrays of the host: which devices are to have them is not known here.
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), params)

    params, description = checkpoints.load(run, abstract, model)
    return TrainedNetwork(LinenNetwork(build_model(description)), params, description)
