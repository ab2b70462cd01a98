"""A network in one file, to be run without Flax and orbax.

The file is a ZIP archive without compression: `description.json`; `params/NAME`, each parameter's
bytes; and `functions/NAME`, the network's functions as StableHLO for CPUs, GPUs and TPUs, for any
number of images of any size. It may lack the functions; the model must then be in the registry.
Everything in it is data: nothing is unpickled, no path is taken from it, and StableHLO that calls
out of itself is refused.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from aecore.errors import CheckpointError
from aecore.networks.network import LinenNetwork, Network
from aecore.networks.receptive_field import ReceptiveField
from aecore.saved.descriptions import Description
from aecore.saved.trained import TrainedNetwork
from aecore.storage import write_whole

SUFFIX = ".aecore"
"""The usual ending of such files."""

_FORMAT = 1
_PLATCOMPILED_BY = ("cpu", "cuda", "tpu")
_FUNCTIONS = ("apply", "apply_within", "encode", "decode")
_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": jnp.dtype(jnp.bfloat16)}
_MOST_BYTES = 2**32
# A check of the exporter's own, which does nothing but fail.
_CALLS_ALLOWED = frozenset({"shape_assertion"})
# Operations that reach out of a program.
_EFFECTS = re.compile(r"stablehlo\.(infeed|outfeed|send|recv|create_token|after_all)\b")


def save(path: epath.Path, trained: TrainedNetwork, *, with_functions: bool = True) -> None:
    """Writes a network to a file, which appears whole or not at all.

    Args:
      path: where to write it.
      trained: what to write.
      with_functions: whether to write the functions too.
    """
    network, params = trained.network, trained.params
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in _flatten(params).items()}
    members = {f"params/{name}": array.tobytes() for name, array in arrays.items()}
    field = network.receptive_field(params)
    head = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "network": {
            "name": network.name,
            "channels": network.channels,
            "stride": network.stride,
            "receptive_field": None if field is None else dataclasses.asdict(field),
        },
        "params": {
            name: {"dtype": str(array.dtype), "shape": array.shape}
            for name, array in arrays.items()
        },
        "description": trained.description.without_places().to_json(),
    }
    if with_functions:
        members |= {f"functions/{name}": data for name, data in _exported(network, params).items()}
    head["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    members = {"description.json": json.dumps(head, indent=1).encode(), **members}

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            # With a fixed time, so that equal networks give equal files.
            archive.writestr(zipfile.ZipInfo(name), data)
    write_whole(path, file.getvalue())


def _exported(network: Network, params: Any) -> dict[str, bytes]:
    scope = export.SymbolicScope()

    def spec(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)

    stride = network.stride
    images = spec(f"b, {stride}*h, {stride}*w, {network.channels}")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    args = {
        "apply": (images,),
        "apply_within": (images, spec("b, 2", jnp.int32)),
        "encode": (images,),
        "decode": (jax.eval_shape(network.encode, params, images),),
    }
    return {
        name: bytes(
            export.export(jax.jit(getattr(network, name)), platforms=_PLATCOMPILED_BY)(
                params, *args[name]
            ).serialize()
        )
        for name in _FUNCTIONS
    }


def export_onnx(path: epath.Path, trained: TrainedNetwork) -> None:
    """Writes a network as an ONNX graph, which keeps its description as metadata.

    Args:
      path: where to write it.
      trained: what to write.

    Raises:
      ConfigError: onnx is not installed, or the network does what can't be written.
    """
    from aecore.saved import onnx

    graph = onnx.convert(
        functools.partial(trained.network.apply, trained.params),
        channels=trained.network.channels,
        stride=trained.network.stride,
        metadata={"aecore": json.dumps(trained.description.without_places().to_json())},
    )
    write_whole(path, graph.SerializeToString())


class ExportedNetwork:
    """The functions of a file as an `aecore.networks.Network`."""

    def __init__(self, head: Mapping[str, Any], functions: Mapping[str, bytes]):
        self._parts = head, functions
        described = head["network"]
        self.name = described["name"]
        if not self.name.isidentifier():
            raise ValueError(f"{self.name!r} is no name of a network")
        self.channels = _count(described["channels"])
        self.stride = _count(described["stride"])
        field = described["receptive_field"]
        self._field = field and ReceptiveField(
            before=_count(field["before"], 0), after=_count(field["after"], 0)
        )
        for name in _FUNCTIONS:
            try:
                exported = _deserialize(name, functions[name])
            except jax.errors.JaxRuntimeError as error:
                raise ValueError(
                    f"JAX {jax.__version__} can't read what JAX {head.get('jax')!s:.20} wrote"
                ) from error
            setattr(self, name, exported.call)

    def __reduce__(self):
        # What is pickled is the functions as they were written, as they are now can't be.
        return ExportedNetwork, self._parts

    def receptive_field(self, params):
        del params
        return self._field


def _deserialize(name: str, data: bytes) -> export.Exported:
    exported = export.deserialize(bytearray(data))
    module = exported.mlir_module()
    calls = {
        line.split("custom_call", 1)[1].split("@", 1)[-1].split("(", 1)[0].strip()
        for line in module.splitlines()
        if "custom_call" in line
    }
    reaching_out = sorted((calls - _CALLS_ALLOWED) | set(_EFFECTS.findall(module)))
    if reaching_out:
        raise ValueError(f"{name} calls {', '.join(reaching_out)}")
    return exported


def load(path: epath.Path, *, sha256: str | None = None, model: Any = None) -> TrainedNetwork:
    """Reads a file that `save` wrote.

    Args:
      path: the file.
      sha256: what its checksum must be.
      model: used in place of the described one where the file holds no functions.

    Raises:
      CheckpointError: the file is not one, is damaged, or names a model that is not registered.
    """
    try:
        return _load(path, sha256, model)
    except CheckpointError:
        raise
    except Exception as error:  # Damage shows in many ways, here and within the deserializer.
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is no exported network, or damaged ({reason:.200})"
        ) from error


def _load(path: epath.Path, sha256: str | None, model: Any) -> TrainedNetwork:
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not {sha256}; install aecore anew"
        )
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        head = json.loads(_member(archive, "description.json"))
        if head["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {head['format']!r}, not {_FORMAT}; use the version of aecore "
                "that wrote it"
            )

        def read(name):
            data = _member(archive, name)
            if hashlib.sha256(data).hexdigest() != head["sha256"][name]:
                raise ValueError(f"the checksum of {name} is wrong")
            return data

        arrays = {
            name: _array(read(f"params/{name}"), **leaf) for name, leaf in head["params"].items()
        }
        functions = {
            name: read(f"functions/{name}")
            for name in _FUNCTIONS
            if f"functions/{name}" in head["sha256"]
        }
    params = _unflatten(arrays)
    description = Description.from_json(head["description"])
    if functions:
        network = ExportedNetwork(head, functions)
        _check_params(network, params)
        return TrainedNetwork(network, params, description)
    return TrainedNetwork(_linen(path, params, description, model), params, description)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MOST_BYTES:
        raise ValueError(f"{name} is compressed or too large")
    return archive.read(info)


def _array(data: bytes, dtype: str, shape: Any) -> np.ndarray:
    shape = tuple(_count(side, 0) for side in shape)
    if math.prod(shape) * _DTYPES[dtype].itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {dtype} array of shape {shape}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _check_params(network: ExportedNetwork, params: Any) -> None:
    """Refuses parameters that the functions don't take, and functions that are not a network's."""
    shape = (1, 2 * network.stride, 2 * network.stride, network.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    restored = jax.eval_shape(network.apply, params, images)
    within = jax.eval_shape(network.apply_within, params, images, sizes)
    codes = jax.eval_shape(network.encode, params, images)
    decoded = jax.eval_shape(network.decode, params, codes)
    if {(leaf.shape, str(leaf.dtype)) for leaf in (restored, within, decoded)} != {
        (shape, "float32")
    }:
        raise ValueError("its functions don't map images to images")


def _linen(path: epath.Path, params: Any, description: Description, model: Any) -> LinenNetwork:
    from aecore.errors import ConfigError
    from aecore.steps import state

    try:
        model = description.build_model() if model is None else model
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    size = (8 * model.stride, 8 * model.stride, model.channels)
    expected = _flatten(state.abstract_params(model, size))
    given = _flatten(params)
    for name in sorted(expected.keys() | given.keys()):
        shapes = [tree[name].shape if name in tree else None for tree in (expected, given)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: {name} has shape {shapes[1]}, in {type(model).__name__} {shapes[0]}"
            )
    return LinenNetwork(model)


def _count(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 2**31:
        raise ValueError(f"{value!r} is no count")
    return value


def _flatten(params: Any) -> dict[str, Any]:
    """Nested dictionaries as one, with names such as `encoder_0/kernel`."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat["/".join(str(key.key) for key in path)] = leaf
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)[last] = leaf
    return params
