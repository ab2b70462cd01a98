"""A trained network in one file, which runs without Flax and orbax.

The file is a ZIP archive without compression. It holds `description.json`; `params/NAME`, the bytes
of each parameter; and `functions/NAME`, the network's functions as StableHLO for CPUs, GPUs and
TPUs, for any number of images of any size. The functions may be missing; then the model must be in
the registry, or be given.

A file may come from anywhere, so everything in it is data: nothing is unpickled, no path is taken
from it, and StableHLO that calls anything outside itself is refused.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from aecore.errors import CheckpointError, ConfigError
from aecore.networks.network import LinenNetwork, Network, Precision
from aecore.networks.receptive_field import ReceptiveField
from aecore.saved.descriptions import Description
from aecore.saved.parameters import fitting, flatten, registered, unflatten
from aecore.saved.trained import TrainedNetwork
from aecore.storage import write_whole

SUFFIX = ".aecore"
"""The usual ending of these files."""

_FORMAT = 1
_PLATFORMS = ("cpu", "cuda", "tpu")
_FUNCTIONS = ("apply", "apply_within", "encode", "decode")
_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": jnp.dtype(jnp.bfloat16)}
_MOST_BYTES = 2**32
# Whatever reaches out of a program. `shape_assertion` is a check that JAX itself exports; it does
# nothing but fail.
_REACHING_OUT = re.compile(
    r"stablehlo\.(?:infeed|outfeed|send|recv|create_token|after_all)\b"
    r"|custom_call(?! @shape_assertion\()[^(\n]*"
)


def save(
    path: epath.Path,
    trained: TrainedNetwork,
    *,
    with_functions: bool = True,
    parameters: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Writes a network to a file, which appears whole or not at all. Equal networks, equal files.

    Args:
      path: where to write it.
      trained: what to write.
      with_functions: whether to write the functions too. Without them, the file is small and lasts
        longer than JAX promises to read StableHLO, but only aecore can read it.
      parameters: their number format in the file; bfloat16 makes it half as large. None: as they
        are.

    Raises:
      ConfigError: the network's functions are those of a file, and take another number format.
    """
    network = trained.network
    params = trained.params
    if parameters is not None:
        other = {str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {parameters}
        if with_functions and other and isinstance(network, ExportedNetwork):
            raise ConfigError(
                f"the compiled functions of {network.name} take parameters of {other.pop()}, not "
                f"of {parameters}; leave out --parameters, or export the run that it was made from"
            )
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, parameters), params)
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(params).items()}
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
            # Left out where it is 1, as it was before networks could enlarge.
            **({} if network.scale == 1 else {"scale": network.scale}),
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
    sizes = spec("b, 2", jnp.int32)
    codes = jax.eval_shape(network.encode, params, images)

    def exported(function, *args):
        exporter = export.export(jax.jit(function), platforms=_PLATFORMS)
        return bytes(exporter(params, *args).serialize())

    return {
        "apply": exported(network.apply, images),
        "apply_within": exported(network.apply_within, images, sizes),
        "encode": exported(network.encode, images),
        "decode": exported(network.decode, codes),
    }


def export_onnx(path: epath.Path, trained: TrainedNetwork) -> None:
    """Writes what `as_onnx` gives to a file.

    Raises:
      ConfigError: as `as_onnx`.
    """
    write_whole(path, as_onnx(trained))


def as_onnx(trained: TrainedNetwork, *, clipped: bool = True) -> bytes:
    """A network as an ONNX graph, with its description as metadata.

    The graph takes images of any size and gives what a `Restorer` gives.

    Args:
      trained: the network.
      clipped: whether the graph clips what it gives to [0, 1].

    Returns:
      The content of an ONNX file.

    Raises:
      ConfigError: onnx is not installed, or the network can't be written.
    """
    try:
        from aecore.saved.onnx.conversion import convert
    except ImportError as error:
        raise ConfigError(
            'writing ONNX needs the package onnx: pip install "aecore[onnx]"'
        ) from error
    network, params = trained.network, trained.params
    if isinstance(network, ExportedNetwork):
        raise ConfigError(
            "an exported file that holds compiled functions can't be written as ONNX; export the "
            "run that it was made from"
        )

    def restore(images):
        restored = network.apply(params, images)
        return jnp.clip(restored, 0.0, 1.0) if clipped else restored

    graph = convert(
        restore,
        channels=network.channels,
        stride=network.stride,
        scale=network.scale,
        metadata={"aecore": json.dumps(trained.description.without_places().to_json())},
    )
    return graph.SerializeToString()


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedNetwork:
    """The `networks.network.Network` that a file's functions are; checks what the file says."""

    name: str
    channels: int
    stride: int
    scale: int
    field: ReceptiveField | None
    functions: Mapping[str, export.Exported] = dataclasses.field(repr=False)
    """By the names of the methods that call them."""

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"{self.name!r} can't be the name of a network")
        _check_count(self.channels)
        _check_count(self.stride)
        _check_count(self.scale)
        if self.field is not None:
            _check_count(self.field.before, least=0)
            _check_count(self.field.after, least=0)

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        return self.functions["apply"].call(params, images)

    def apply_within(self, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        return self.functions["apply_within"].call(params, images, sizes)

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        return self.functions["encode"].call(params, images)

    def decode(self, params: Any, codes: jax.Array) -> jax.Array:
        return self.functions["decode"].call(params, codes)

    def receptive_field(self, params: Any) -> ReceptiveField | None:
        del params
        return self.field

    def in_precision(self, precision: Precision) -> "ExportedNetwork":
        del precision
        return self

    def __reduce__(self):
        # The functions are pickled as they are written to files.
        written = {name: bytes(f.serialize()) for name, f in self.functions.items()}
        fields = (self.name, self.channels, self.stride, self.scale, self.field)
        return _unpickled, (fields, written)


def _unpickled(fields: tuple, written: Mapping[str, bytes]) -> ExportedNetwork:
    read = {name: export.deserialize(bytearray(data)) for name, data in written.items()}
    return ExportedNetwork(*fields, functions=read)


def load(path: epath.Path, *, sha256: str | None = None, model: Any = None) -> TrainedNetwork:
    """Reads a file that `save` wrote.

    Args:
      path: an `epath.Path`.
      sha256: what the file's checksum must be; None for anything.
      model: a Linen module. Needed if the file holds no functions and its model is not in
        `aecore.models.REGISTRY`; not used if it holds functions.

    Raises:
      CheckpointError: the file can't be read, is damaged or not one that `save` wrote, or its
        parameters don't fit the model; or the model is not known.
      ConfigError: a package that is needed to read it is not installed.
    """
    with reading(path, "is not an exported network"):
        data = read(path)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"damaged: its SHA-256 is not {sha256}; install aecore again")
        if path.suffix.lower() == ".onnx" and not zipfile.is_zipfile(io.BytesIO(data)):
            raise CheckpointError(
                "ONNX files are for other programs; name the run, or what `aecore export` writes "
                "in another format"
            )
        return _parse(data, model)


def read(path: epath.Path) -> bytes:
    """The bytes of a file; refuses one that is too large to be a network."""
    if path.stat().length > _MOST_BYTES:
        raise CheckpointError("too large for a file that `aecore export` wrote; name another")
    return path.read_bytes()


@contextlib.contextmanager
def reading(path: epath.Path, otherwise: str) -> Iterator[None]:
    """Turns whatever fails while a network is read into one line.

    Args:
      path: what is read.
      otherwise: what it is if it isn't damaged, such as "is not an exported network".

    Raises:
      CheckpointError, ConfigError: as for `load`.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror or error}); check that it is there and that "
            "you may read it"
        ) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path}: there is not enough memory to load it; free some, or use another machine"
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"{path} needs a package that can't be imported ({error}); install it with pip"
        ) from error
    except Exception as error:  # Damage shows in many ways, here and within the deserializer.
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} {otherwise}, or is damaged ({reason:.200}); export it again"
        ) from error


def _parse(data: bytes, model: Any) -> TrainedNetwork:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        head = json.loads(_member(archive, "description.json"))
        if head["format"] != _FORMAT:
            raise CheckpointError(
                f"its format is {head['format']!r:.20}, not {_FORMAT}; use the version of aecore "
                "that wrote it"
            )
        description = Description.from_json(head["description"])

        def read(name):
            data = _member(archive, name)
            if hashlib.sha256(data).hexdigest() != head["sha256"][name]:
                raise ValueError(f"the checksum of {name} is wrong")
            return data

        params = unflatten(
            {name: _array(read(f"params/{name}"), **leaf) for name, leaf in head["params"].items()}
        )
        functions = {
            name: read(f"functions/{name}")
            for name in _FUNCTIONS
            if f"functions/{name}" in head["sha256"]
        }
    if functions:
        network = _network(head, functions)
        _check_functions(network, params)
    else:
        network = LinenNetwork(fitting(model or registered(description), params))
        params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    return TrainedNetwork(network, params, description)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(info)


def _array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    for side in shape:
        _check_count(side, least=0)
    if math.prod(shape) * _DTYPES[dtype].itemsize != len(data):
        raise ValueError(f"{len(data)} bytes can't be a {dtype} array of shape {shape}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _check_count(value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 2**31:
        raise ValueError(f"{value!r:.40} is not a count")


def _network(head: Mapping[str, Any], functions: Mapping[str, bytes]) -> ExportedNetwork:
    try:
        exported = {name: _deserialize(name, functions[name]) for name in _FUNCTIONS}
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"JAX {jax.__version__} can't read what JAX {head.get('jax')!s:.20} wrote"
        ) from error
    described = head["network"]
    field = described["receptive_field"]
    return ExportedNetwork(
        name=described["name"],
        channels=described["channels"],
        stride=described["stride"],
        scale=described.get("scale", 1),
        field=None if field is None else ReceptiveField(**field),
        functions=exported,
    )


def _deserialize(name: str, data: bytes) -> export.Exported:
    exported = export.deserialize(bytearray(data))
    reaching_out = sorted(set(_REACHING_OUT.findall(exported.mlir_module())))
    if reaching_out:
        raise ValueError(f"{name} reaches out of itself by {', '.join(reaching_out)}")
    return exported


def _check_functions(network: ExportedNetwork, params: Any) -> None:
    """Refuses parameters that the functions don't take, and functions that are not a network's."""
    shape = (1, 2 * network.stride, 2 * network.stride, network.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    restored = jax.eval_shape(network.apply, params, images)
    within = jax.eval_shape(network.apply_within, params, images, sizes)
    codes = jax.eval_shape(network.encode, params, images)
    decoded = jax.eval_shape(network.decode, params, codes)
    enlarged = (1, *(network.scale * side for side in shape[1:3]), network.channels)
    if {(leaf.shape, str(leaf.dtype)) for leaf in (restored, within, decoded)} != {
        (enlarged, "float32")
    }:
        raise ValueError("its functions don't map images to images")
