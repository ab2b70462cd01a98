"""What all networks have in common: their base class, their registry and checks of their fields."""

import dataclasses
import functools
import math
import types
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from aecore.errors import ConfigError

REGISTRY: dict[str, type[nn.Module]] = {}
"""The networks that checkpoints and JSON name by their class names."""

_Class = TypeVar("_Class", bound=type[nn.Module])


def register(cls: _Class) -> _Class:
    """Class decorator: lets checkpoints and JSON name the model `cls` by its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def hyperparameters(model: nn.Module) -> dict[str, Any]:
    """The fields that describe a model, without those that Linen adds to every module."""
    names = [field.name for field in dataclasses.fields(model)]
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


class Autoencoder(nn.Module):
    """Base of the networks: `decode(encode(images))`, on `(B, H, W, C)` float32 in [0, 1].

    Besides these methods, a network has these attributes, as fields or properties:

    - `channels`: C, of what goes in and of what comes out;
    - `stride`: H and W must be multiples of it;
    - `scale`: how many times larger what comes out is than what goes in; 1 unless a network says
      otherwise.
    """

    # Without annotations, which would make them fields of every network.
    scale = 1
    unsaid = types.MappingProxyType({})
    """Values of fields that came later, for descriptions from before them."""

    def encode(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` images to `(B, H / stride, W / stride, K)` codes."""
        raise NotImplementedError

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes to `(B, scale H, scale W, C)` images."""
        raise NotImplementedError

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in hyperparameters(self).items())
        return f"{type(self).__name__}({given})"


def check_module(model: Any) -> None:
    """Raises ConfigError unless a model is a Linen module with all that a network needs."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {model!r:.80} is not a network; use one such as NoiseReducer()")
    needed = ("encode", "decode", "__call__", "channels", "stride")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} lacks {', '.join(missing)}; a network needs "
            f"{', '.join(needed)}, as aecore.models.Autoencoder describes them"
        )


def check_numbers(model: nn.Module, *names: str) -> None:
    """Checks fields of a network that count something.

    Args:
      model: the network.
      names: of its fields: whole numbers, or `features`, a tuple of them.

    Raises:
      ConfigError: a number isn't a whole one of at least 1, or there are no features.
    """
    for name in names:
        value = getattr(model, name)
        is_tuple = name == "features"
        numbers = value if is_tuple else (value,)
        # To Python, booleans are whole numbers too.
        are_numbers = isinstance(numbers, tuple) and all(type(n) is int and n >= 1 for n in numbers)
        if not are_numbers or not numbers:
            wanted = "one or more whole numbers" if is_tuple else "a whole number"
            raise ConfigError(
                f"{type(model).__name__} can't have {name} {value!r}; use {wanted} of at least 1"
            )


def check_choice(model: nn.Module, name: str, *choices: Any) -> None:
    """Raises ConfigError unless a field of a network is one of some values, and of its type."""
    value = getattr(model, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        known = " or ".join(map(str, choices))
        raise ConfigError(f"{type(model).__name__} can't have {name} {value!r}; use {known}")


@functools.lru_cache(maxsize=16)  # Tracing takes a tenth of a second, and trainings ask often.
def abstract_params(model: Any, image_shape: tuple[int, int, int]) -> Any:
    """The shapes and dtypes of a model's parameters.

    Raises:
      ConfigError: it needs other variables too, such as the statistics of `nn.BatchNorm`.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)
    params = variables.get("params", {})
    others = sorted(variables.keys() - {"params"})
    if others:
        try:  # What it only notes, as by `sow`, isn't needed.
            jax.eval_shape(
                lambda *given: model.apply({"params": given[0]}, given[1]), params, images
            )
        except FlaxError as error:
            raise ConfigError(
                f"{type(model).__name__} needs {', '.join(others)} besides parameters; use layers "
                "without, such as nn.GroupNorm for nn.BatchNorm"
            ) from error
    return params


def parameter_bytes(model: Any) -> int:
    """How many bytes a network's parameters take, found without allocating them.

    Args:
      model: a network.
    """
    shapes = abstract_params(model, (model.stride, model.stride, model.channels))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def check_memory(model: Any, available: float, copies: int = 1) -> None:
    """Refuses a network whose parameters can't be allocated, before JAX ends the process.

    Args:
      model: a network.
      available: bytes of memory of the device, or of the host.
      copies: how many arrays of each parameter's size are needed; 4 for training with Adam, which
        keeps two more and computes the gradient.

    Raises:
      ConfigError: they need more memory; names the field that holds the largest number.
    """
    try:
        needed = copies * parameter_bytes(model)
    except OverflowError:  # A side of an array has more than 64 bits.
        needed = math.inf
    if needed > available:
        fields = hyperparameters(model)
        largest = max(fields, key=lambda name: _largest_number(fields[name]))
        raise ConfigError(
            f"{type(model).__name__} with {largest} {fields[largest]} needs {needed / 1e9:,.1f} GB "
            f"for its parameters, of {available / 1e9:,.1f} GB there are; use smaller numbers"
        )


def _largest_number(value: Any) -> float:
    values = value if isinstance(value, tuple) else (value,)
    return max((number for number in values if isinstance(number, int)), default=0)
