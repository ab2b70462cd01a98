"""A trained network as a folder that model hubs show and share: safetensors, JSON, a model card.

The folder holds `model.safetensors`, the parameters alone; `config.json`, the network's description
and checksums; and `README.md`, which says what the network is for. Like an exported file, it may
come from anywhere: everything in it is data, and the model is looked up in the registry.
"""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from aecore.errors import CheckpointError, ConfigError
from aecore.networks.network import LinenNetwork
from aecore.saved.descriptions import Description
from aecore.saved.exported import read, reading
from aecore.saved.parameters import fitting, flatten, registered, unflatten
from aecore.saved.trained import TrainedNetwork
from aecore.storage import write_json, write_whole

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

_FORMAT = 1
_ABOUT = ("purpose", "data", "limits", "benchmarks", "licence")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(
            'safetensors need the package safetensors: pip install "aecore[safetensors]"'
        ) from error
    return safetensors.numpy


def holds(folder: epath.Path) -> bool:
    """Whether a folder was written by `save`, as far as its files' names say."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def save(folder: epath.Path, trained: TrainedNetwork) -> None:
    """Writes a network to a folder. Equal networks, equal files.

    Args:
      folder: new, or empty.
      trained: what to write. The parameters become float32.

    Raises:
      ConfigError: the folder holds something, or safetensors is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; name a new one")
    arrays = {
        name: np.asarray(jax.device_get(leaf), np.float32)
        for name, leaf in flatten(trained.params).items()
    }
    weights = _safetensors().save(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / CARD, _card(folder.name, trained, arrays).encode())
    config = {
        "library_name": "aecore",
        "format": _FORMAT,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "about": {name: trained.about[name] for name in _ABOUT if name in trained.about},
        "description": trained.description.without_places().to_json(),
    }
    # The last one, by which the folder is recognised.
    write_json(folder / CONFIG, config)


def load(folder: epath.Path, *, model: Any = None) -> TrainedNetwork:
    """Reads what `save` wrote.

    Args:
      folder: an `epath.Path`; a local snapshot of a hub, whose files may be links.
      model: needed if the model is not in `aecore.models.REGISTRY`.

    Raises:
      CheckpointError: it is damaged or not such a folder, its parameters don't fit the model, or
        the model is not known.
      ConfigError: a package that is needed is not installed.
    """
    safetensors = _safetensors()
    with reading(folder, "is no folder that `aecore export --format safetensors` wrote"):
        config = json.loads(read(folder / CONFIG))
        if config.get("library_name") != "aecore" or config["format"] != _FORMAT:
            raise CheckpointError(
                f"its {CONFIG} is not of aecore, or of another version; use the one that wrote it"
            )
        weights = read(folder / WEIGHTS)
        if hashlib.sha256(weights).hexdigest() != config["sha256"]:
            raise CheckpointError(f"{WEIGHTS} is damaged: its SHA-256 is not that of {CONFIG}")
        description = Description.from_json(config["description"])
        arrays = safetensors.load(weights)
        if any(array.dtype != np.float32 for array in arrays.values()):
            raise CheckpointError("its parameters are not float32; export it again")
        params = unflatten(arrays)
        network = LinenNetwork(fitting(model or registered(description), params))
        about = {name: str(config["about"][name]) for name in _ABOUT if name in config["about"]}
    return TrainedNetwork(network, params, description, about)


def _card(name: str, trained: TrainedNetwork, arrays: dict[str, np.ndarray]) -> str:
    """The text of the model card, with what hubs read at its top."""
    description, about = trained.description, trained.about
    metadata = {
        "library_name": "aecore",
        "pipeline_tag": "image-to-image",
        "tags": ["image-restoration", "jax", "flax"],
    }
    # JSON is YAML too, and quotes what needs quoting.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()), "---", ""]
    lines += [f"# {name}", ""]
    count = sum(array.size for array in arrays.values())
    what = f"{trained.network.name}, {count:,} parameters"
    lines += [f"A network of [aecore](https://pypi.org/project/aecore/): {what}.", ""]
    facts = {
        "What it is for": about.get("purpose"),
        "What it was trained on": about.get("data") or (description.data or {}).get("dataset"),
        "What it is not for": about.get("limits"),
        "Benchmarks": about.get("benchmarks"),
        "Licence": about.get("licence"),
        "What it learned to undo": description.degradation and _one_line(description.degradation),
        "Steps of training": description.step,
    }
    lines += [f"- {fact}: {value}" for fact, value in facts.items() if value is not None]
    if description.metrics is not None:
        scores = description.metrics
        lines += [
            "",
            f"Scores on {scores['images']:,} validation images: PSNR {scores['psnr']:.2f} dB, "
            f"SSIM {scores['ssim']:.4f}, MSE {scores['mse']:.5f}.",
        ]
    lines += [
        "",
        "```python",
        "import aecore",
        "",
        "restorer = aecore.Restorer.load(FOLDER)  # where these files are",
        "restored = restorer(image)",
        "```",
        "",
        "    aecore restore IN -o OUT -m FOLDER",
        "",
    ]
    return "\n".join(lines)


def _one_line(degradation: Any) -> str:
    return f"`{json.dumps(degradation)}`"
