"""What a degradation is, and the array operations that it is written against.

A degradation maps `(B, H, W, C)` float32 images in [0, 1] to degraded ones. It is written once,
against `Ops`, and runs wherever there is an implementation of them: `JaxOps` here,
`aecore.data.ops.TensorFlowOps` inside tf.data.
"""

import dataclasses
import math
import zlib
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp

from aecore.errors import ConfigError

Array = Any
Range = float | tuple[float, float]
"""A number, or a range [low, high) from which each image draws its own."""
WholeRange = int | tuple[int, int]
"""A whole number, or a range from which each image draws its own; both ends are included."""


class Ops(Protocol):
    """What a degradation may use besides Python's operators on arrays.

    Whatever is drawn has a name, and what is drawn depends on the name, the key or seed, and the
    image, never on what else is drawn. The same name twice gives the same values.

    Attributes:
      xp: a namespace with `exp`, `floor`, `maximum`, `minimum`, `reshape`, `round` and `where`.
    """

    xp: Any

    def einsum(self, equation: str, *operands: Array) -> Array:
        """Einstein summation in full float32 precision."""
        ...

    def within(self, name: str) -> "Ops":
        """The same operations with random streams of their own: `name` comes before their names."""
        ...

    def normal(self, name: str, images: Array) -> Array:
        """Independent standard normal values, shaped like `images`."""
        ...

    def uniform(self, name: str, images: Array, low: float, high: float) -> Array:
        """One value per image in [low, high), shape `(B, 1, 1, 1)`."""
        ...

    def uniform_values(self, name: str, images: Array) -> Array:
        """Independent values in [0, 1), shaped like `images`."""
        ...

    def poisson(self, name: str, means: Array) -> Array:
        """Independent Poisson counts with these means, as float32."""
        ...


def stream(path: str) -> int:
    """The number below 2**32 that stands for a random stream's name, the same in all processes."""
    return zlib.crc32(path.encode())


class JaxOps:
    """`Ops` for JAX. The values drawn for an image depend on that image's key alone.

    Args:
      keys: `(B,)` PRNG keys, one per image; `None` if nothing is drawn.
      path: what comes before the names of random streams.
    """

    xp = jnp

    def __init__(self, keys: jax.Array | None = None, path: str = ""):
        self._keys = keys
        self._path = path

    def within(self, name):
        return JaxOps(self._keys, f"{self._path}{name}/")

    def _keys_of(self, name: str) -> jax.Array:
        number = stream(self._path + name)
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(self._keys)

    def einsum(self, equation, *operands):
        # Without HIGHEST, a GPU or TPU would round the operands to tf32 or bfloat16.
        return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    def normal(self, name, images):
        return jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(self._keys_of(name))

    def uniform(self, name, images, low, high):
        draw = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))
        return draw(self._keys_of(name))[:, None, None, None]

    def uniform_values(self, name, images):
        return jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(self._keys_of(name))

    def poisson(self, name, means):
        def draw(key, means):
            # JAX draws Poisson counts from threefry keys only, whatever kind `key` is.
            data = jax.random.bits(key, (2,), jnp.uint32)
            return jax.random.poisson(jax.random.wrap_key_data(data, impl="threefry2x32"), means)

        return jax.vmap(draw)(self._keys_of(name), means).astype(jnp.float32)


_BOUNDS = "aecore.degradations.bounds"


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """What a parameter that is a number, or a range of numbers, may be."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    whole: bool = False

    def check(self, owner: str, name: str, value: Any) -> None:
        ends = value if isinstance(value, tuple) else (value, value)
        if len(ends) != 2 or not all(map(self._is_number, ends)):
            number = "whole number" if self.whole else "number"
            raise ConfigError(f"{owner}: {name} {value!r} is not a {number} or a (low, high) pair")
        if not all(map(self._has, ends)):
            raise ConfigError(f"{owner}: {name} {value} is out of bounds; use {self._text(name)}")
        if ends[0] > ends[1]:
            raise ConfigError(f"{owner}: {name} {value} has low above high; swap them")

    def _is_number(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        # Checkpoints written when JPEG's quality was a real number hold 50.0.
        return not self.whole or value == value // 1

    def _has(self, value: float) -> bool:
        return (
            math.isfinite(value) and self.at_least <= value <= self.at_most and value > self.above
        )

    def _text(self, name: str) -> str:
        low = f"{self.above:.9g} <" if self.above > -math.inf else f"{self.at_least:.9g} <="
        return f"{low} {name}" + (f" <= {self.at_most:.9g}" if self.at_most < math.inf else "")


def real(default: Range, **bounds: float) -> Any:
    """A dataclass field for a parameter of type `Range`.

    Args:
      default: the field's default.
      **bounds: any of `at_least`, `above` and `at_most`.
    """
    return dataclasses.field(default=default, metadata={_BOUNDS: _Bounds(whole=False, **bounds)})


def whole(default: WholeRange, **bounds: int) -> Any:
    """A dataclass field for a parameter of type `WholeRange`, with bounds as in `real`."""
    return dataclasses.field(default=default, metadata={_BOUNDS: _Bounds(whole=True, **bounds)})


REGISTRY: dict[str, type["Degradation"]] = {}


Class = TypeVar("Class", bound=type["Degradation"])


def register(cls: Class) -> Class:
    """Class decorator that lets checkpoints and JSON name `cls`, a frozen dataclass."""
    REGISTRY[cls.__name__] = cls
    return cls


@dataclasses.dataclass(frozen=True)
class Degradation:
    """Base class of all degradations. Subclasses are frozen dataclasses that define `apply`."""

    noisy: ClassVar[bool] = False
    """Whether the result is random even if no parameter is a range."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if bounds := field.metadata.get(_BOUNDS):
                bounds.check(type(self).__name__, field.name, getattr(self, field.name))

    def apply(self, images: Array, ops: Ops) -> Array:
        """Degrades `(B, H, W, C)` float32 images in [0, 1]; H, W and C are known statically.

        The name of whatever is drawn begins with the `label`, as in
        `ops.normal(f"{self.label}.noise", images)`.
        """
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What names of random streams begin with: the class's name."""
        return type(self).__name__

    def draw(self, name: str, images: Array, ops: Ops) -> Array:
        """The parameter `name` itself, or `(B, 1, 1, 1)` values drawn from its range."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return value
        low, high = value
        stream_name = f"{self.label}.{name}"
        if type(self).__dataclass_fields__[name].metadata[_BOUNDS].whole:
            # The minimum is for a value just below high + 1 that rounding made high + 1.
            drawn = ops.uniform(stream_name, images, low, high + 1)
            return ops.xp.minimum(ops.xp.floor(drawn), high)
        return ops.uniform(stream_name, images, low, high)

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a key: it is noisy, or a parameter is a range."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return self.noisy or any(isinstance(value, tuple) for value in values)

    def __call__(self, images: Array, key: jax.Array | None = None) -> jax.Array:
        """Degrades images with JAX, eagerly or under `jit`.

        Args:
          images: `(B, H, W, C)` float in [0, 1].
          key: `(B,)` PRNG keys, one per image, or one key, which is folded with each image's
            position. Only needed if `is_random`.

        Returns:
          `(B, H, W, C)` float32 in [0, 1].

        Raises:
          ConfigError: the degradation is random and `key` is missing.
        """
        images = jnp.asarray(images, jnp.float32)
        if self.is_random:
            if key is None:
                raise ConfigError(f"{self} is random; pass key=jax.random.key(seed)")
            if not key.shape:
                key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
        return self.apply(images, JaxOps(key))


def clip(images: Array, ops: Ops) -> Array:
    """Values below 0 become 0, those above 1 become 1."""
    return ops.xp.minimum(ops.xp.maximum(images, 0.0), 1.0)
