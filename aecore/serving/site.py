"""A page with no server: a folder in which a visitor's browser computes everything."""

import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Mapping
from typing import Any

from etils import epath

from aecore.errors import ConfigError
from aecore.restoring import bulk, tiling
from aecore.saved import exported
from aecore.saved.trained import TrainedNetwork
from aecore.serving import PAGE
from aecore.storage import naming, reason, to_path, write_whole

PACKAGE = "onnxruntime-web-1.30.0.tgz"
"""The npm package of ONNX Runtime for browsers, as `npm pack onnxruntime-web@1.30.0` writes it."""

_ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/{PACKAGE}"
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
_RUNTIME = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_SCRIPTS = ("index.html", "page.css", "page.js", "viewer.js", "tiles.js", "worker.js")
_SECONDS = 60
"""How long npm may be silent."""

_TILE = 256
"""The least side of tiles. They become larger where the network sees far."""


def write(
    folder: epath.Path, trained: TrainedNetwork, *, name: str, package: str | None = None
) -> None:
    """Writes the page, the network and ONNX Runtime to a folder that any web server can serve.

    Args:
      folder: where to write; files of an earlier page are replaced.
      trained: the network.
      name: what the page calls it.
      package: path of `PACKAGE`; None to download it.

    Raises:
      ConfigError: the package can't be had, or the network can't be written as ONNX.
    """
    bulk.check_channels(trained.network.channels, name)
    runtime = read_runtime(download() if package is None else _read(to_path(package)))
    # Clipped by the page, after it has taken the mean of the channels of gray pictures.
    graph = exported.as_onnx(trained, clipped=False)
    (folder / "runtime").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "network.onnx", graph)
    for script in _SCRIPTS:
        write_whole(folder / script, (PAGE / script).read_bytes())
    write_whole(folder / "restore.js", (PAGE / "local.js").read_bytes())
    for file, data in runtime.items():
        write_whole(folder / "runtime" / file, data)
    write_whole(folder / "network.json", json.dumps(_described(trained, name)).encode())


def _described(trained: TrainedNetwork, name: str) -> Mapping[str, Any]:
    """What the page must know of a network."""
    network = trained.network
    field = network.receptive_field(trained.params)
    tile = None  # As the network looks at whole pictures.
    if field is not None:
        side = tiling.economical_tile(_TILE, field, network.stride)
        tile = -(-side // network.stride) * network.stride
    return {
        "name": name,
        "purpose": trained.about.get("purpose", ""),
        "limits": trained.about.get("limits", ""),
        "channels": network.channels,
        "stride": network.stride,
        "scale": network.scale,
        # Where it enlarges, the page has no interpolation to mix with.
        "strength": network.scale == 1,
        "tile": tile,
        "before": field.before if field else 0,
        "after": field.after if field else 0,
    }


def download() -> bytes:
    """The bytes of `PACKAGE`, from npm.

    Raises:
      ConfigError: npm can't be reached.
    """
    try:
        with urllib.request.urlopen(_ADDRESS, timeout=_SECONDS) as answer:
            return answer.read()
    except OSError as error:
        raise ConfigError(
            f"{_ADDRESS} can't be downloaded ({reason(error)}); where there is a network, run "
            "npm pack onnxruntime-web@1.30.0, and name its file with --runtime"
        ) from error


def _read(path: epath.Path) -> bytes:
    with naming(path):
        return path.read_bytes()


def read_runtime(package: bytes) -> Mapping[str, bytes]:
    """The files of `PACKAGE` that the page loads, by name.

    Raises:
      ConfigError: it is another package, or damaged.
    """
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != _SHA512:
        raise ConfigError(
            f"the runtime is not {PACKAGE}, or is damaged; get it with npm pack "
            "onnxruntime-web@1.30.0"
        )
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in _RUNTIME}
        return {name: member.read() for name, member in members.items() if member is not None}
