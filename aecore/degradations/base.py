"""What a degradation is, and the array operations that it is written against.

A degradation maps `(B, H, W, C)` float32 images in [0, 1] to degraded ones. It is written once,
against `Ops`, and runs wherever there is an implementation of them: `JaxOps` here,
`aecore.data.ops.TensorFlowOps` inside tf.data.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from aecore.errors import ConfigError, ImageError

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
      xp: a namespace with `abs`, `cos`, `exp`, `floor`, `maximum`, `minimum`, `reshape`, `round`,
        `sin`, `sqrt`, `transpose` and `where`.
    """

    xp: Any

    def einsum(self, equation: str, *operands: Array) -> Array:
        """Einstein summation in full float32 precision."""
        ...

    def convolve(self, images: Array, kernels: Array) -> Array:
        """Each image weighted by its own kernel, as in `scipy.ndimage.correlate`.

        Beyond their edges the images are mirrored, edge pixels repeated.

        Args:
          images: `(B, H, W, C)`.
          kernels: `(B, K, K)`, or `(1, K, K)` for all images; K is odd.
        """
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


def mirrored(size: int, radius: int) -> np.ndarray:
    """Indices of a side that goes on by `radius` at both ends, mirrored, edge pixels repeated."""
    return np.pad(np.arange(size), radius, "symmetric")


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
        return type(self)(self._keys, f"{self._path}{name}/")

    def _keys_of(self, name: str) -> jax.Array:
        if self._keys is None:
            raise ConfigError(
                f"{self._path}{name} is drawn, but there is no key; pass key=jax.random.key(seed), "
                "and if the degradation is your own, set noisy = True in its class"
            )
        number = stream(self._path + name)
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(self._keys)

    def einsum(self, equation, *operands):
        # Without HIGHEST, a GPU or TPU would round the operands to tf32 or bfloat16.
        return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    def convolve(self, images, kernels):
        height, width = images.shape[1:3]
        side = kernels.shape[1]
        padded = images[:, mirrored(height, side // 2)][:, :, mirrored(width, side // 2)]

        # XLA's convolutions with a kernel per image are 15 times slower on CPUs.
        def add_row(total, row):
            rows = jax.lax.dynamic_slice_in_dim(padded, row, height, 1)
            weights = kernels[:, row, :, None, None, None]
            return total + sum(weights[:, i] * rows[:, :, i : i + width] for i in range(side)), None

        return jax.lax.scan(add_row, jnp.zeros_like(images), jnp.arange(side))[0]

    def _each(
        self, name: str, function: Callable[[jax.Array, jax.Array], jax.Array], images: jax.Array
    ) -> jax.Array:
        """`function(key, values)` for each image, whose `(H W C,)` values are in one row.

        The numbers drawn don't depend on the shape. XLA takes up to ten times as long to compile
        generators for shapes with short rows for CPUs, and what it makes of them is slower.
        """
        rows = images.reshape(images.shape[0], -1)
        return jax.vmap(function)(self._keys_of(name), rows).reshape(images.shape)

    def normal(self, name, images):
        return self._each(name, lambda key, values: jax.random.normal(key, values.shape), images)

    def uniform(self, name, images, low, high):
        draw = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))
        return draw(self._keys_of(name))[:, None, None, None]

    def uniform_values(self, name, images):
        return self._each(name, lambda key, values: jax.random.uniform(key, values.shape), images)

    def poisson(self, name, means):
        def draw(key, means):
            # JAX draws Poisson counts from threefry keys only, whatever kind `key` is.
            data = jax.random.bits(key, (2,), jnp.uint32)
            return jax.random.poisson(jax.random.wrap_key_data(data, impl="threefry2x32"), means)

        return self._each(name, draw, means).astype(jnp.float32)


class PlacedJaxOps(JaxOps):
    """`JaxOps` where what is drawn for a pixel depends on its row and column, not on the size.

    A picture has the same noise however far its array reaches beyond it.
    """

    def _each(self, name, function, images):
        rows = images.reshape(*images.shape[:2], -1)
        number = jnp.arange(rows.shape[1])

        def of_image(key, rows):
            return jax.vmap(function)(jax.vmap(jax.random.fold_in, (None, 0))(key, number), rows)

        return jax.vmap(of_image)(self._keys_of(name), rows).reshape(images.shape)


def make_plain(settings: Any, name: str) -> Any:
    """Makes a field of a frozen dataclass what JSON would give back, and returns it.

    NumPy's numbers become Python's, and lists and arrays tuples, which can be hashed and compared.
    """

    def plain(value):
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        return tuple(map(plain, value)) if isinstance(value, list | tuple) else value

    value = plain(getattr(settings, name))
    object.__setattr__(settings, name, value)
    return value


_VALUES = "aecore.degradations.values"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a parameter that is a number, or a range of numbers, may be."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    whole: bool = False
    single: bool = False
    """Whether it can't be a range."""
    of_values: bool = False
    """Whether it is measured on the scale of images' values, which many papers count to 255."""

    def check(self, owner: str, name: str, value: Any) -> None:
        is_range = isinstance(value, tuple) and not self.single
        ends: tuple[Any, ...] = value if is_range else (value, value)
        if len(ends) != 2 or not all(map(self._is_number, ends)):
            number = "whole number" if self.whole else "number"
            pair = "" if self.single else " or a (low, high) pair"
            raise ConfigError(f"{owner}: {name} {value!r} is not a {number}{pair}")
        if not all(map(self._has, ends)):
            hint = self._other_scale(ends) if self.of_values and max(ends) > self.at_most else ""
            raise ConfigError(
                f"{owner}: {name} {value} is out of bounds; use {self._text(name)}{hint}"
            )
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

    def _other_scale(self, ends: tuple[float, ...]) -> str:
        fractions = (f"{end:g} / 255 = {end / 255:.3g}" for end in dict.fromkeys(ends))
        return f", as values are in [0, 1]; did you mean {' to '.join(fractions)}?"

    def _text(self, name: str) -> str:
        low = f"{self.above:.9g} <" if self.above > -math.inf else f"{self.at_least:.9g} <="
        return f"{low} {name}" + (f" <= {self.at_most:.9g}" if self.at_most < math.inf else "")


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a parameter that is one of several words, or a tuple of such, may be."""

    options: tuple[str, ...]

    def check(self, owner: str, name: str, value: Any) -> None:
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(each in self.options for each in values):
            known = ", ".join(self.options)
            raise ConfigError(f"{owner}: {name} {value!r} is unknown; use any of {known}")


def real(
    default: Range | None,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> Any:
    """A dataclass field for a number, or a range [low, high), with bounds.

    If the default is None, None is allowed.
    """
    return _field(default, Bounds(at_least, above, at_most))


def on_scale_of_values(default: Range) -> Any:
    """A dataclass field for a number in [0, 1], or a range, as images' values are measured."""
    return _field(default, Bounds(at_least=0, at_most=1, of_values=True))


def whole(default: WholeRange, *, at_least: int, at_most: float = math.inf) -> Any:
    """A dataclass field for a whole number, or a range of both ends included, with bounds."""
    return _field(default, Bounds(at_least, at_most=at_most, whole=True))


PROBABILITY = Bounds(at_least=0, at_most=1, single=True)


def probability(default: float) -> Any:
    """A dataclass field for a number in [0, 1], the same for all images."""
    return _field(default, PROBABILITY)


def choice(default: str | tuple[str, ...], *, options: tuple[str, ...]) -> Any:
    """A dataclass field for one of `options`, or several from which each image draws one."""
    return _field(default, _Options(options))


def _field(default: Any, values: Bounds | _Options) -> Any:
    return dataclasses.field(default=default, metadata={_VALUES: values})


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
            value = getattr(self, field.name)
            values = field.metadata.get(_VALUES)
            # Lists and arrays elsewhere are left to whoever wrote the class.
            if values or isinstance(value, np.generic):
                value = make_plain(self, field.name)
            if values and not (value is None and field.default is None):
                values.check(type(self).__name__, field.name, value)
            if field.type is bool and not isinstance(value, bool):
                raise ConfigError(
                    f"{type(self).__name__}: {field.name} {value!r} is not True or False"
                )

    def apply(self, images: Array, ops: Ops) -> Array:
        """Degrades `(B, H, W, C)` float32 images in [0, 1]; H, W and C are known statically.

        The name of whatever is drawn begins with the `label`, as in
        `ops.normal(f"{self.label}.noise", images)`.
        """
        raise ConfigError(
            f"{type(self).__name__} has no apply; define apply(self, images, ops) in its class"
        )

    @property
    def reduction(self) -> int:
        """The whole factor by which height and width become smaller."""
        return 1

    @property
    def grid(self) -> int:
        """Period in pixels of the blocks of JPEG, which start at the image's corner; 1: none.

        A crop of an image that was degraded whole has its blocks where a crop that is degraded
        itself has them, if its offsets are multiples of this.
        """
        return 1

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
        bounds = type(self).__dataclass_fields__[name].metadata.get(_VALUES, Bounds())
        if bounds.whole:
            # The minimum is for a value just below high + 1 that rounding made high + 1.
            drawn = ops.uniform(stream_name, images, low, high + 1)
            return ops.xp.minimum(ops.xp.floor(drawn), high)
        return ops.uniform(stream_name, images, low, high)

    def choose(
        self, name: str, images: Array, ops: Ops, make: Callable[[str], Array], use: str = ""
    ) -> Array:
        """What `make` makes of a choice, or of one of several that each image draws.

        Args:
          name: of the parameter.
          images: `(B, H, W, C)`.
          ops: draws.
          make: from an option to an array with 3 or 4 axes, the first of which is B or 1.
          use: what the choice is for, if it is drawn several times.
        """
        options = getattr(self, name)
        if not isinstance(options, tuple):
            options = (options,)
        if len(options) == 1:
            return make(options[0])
        return pick(
            ops.uniform(f"{self.label}.{name}{use and ' '}{use}", images, 0.0, 1.0),
            [1 / len(options)] * len(options),
            [make(option) for option in options],
            ops,
        )

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a key: it is noisy, or a parameter is a range."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return self.noisy or any(isinstance(value, tuple) and len(value) > 1 for value in values)

    def __call__(self, images: Array, key: jax.Array | None = None) -> jax.Array:
        """Degrades images with JAX, eagerly or under `jit`.

        Args:
          images: `(B, H, W, C)` float in [0, 1].
          key: `(B,)` PRNG keys, one per image, or one key, which is folded with each image's
            position; of `jax.random.key` or of `jax.random.PRNGKey`. Only used if `is_random`.

        Returns:
          `(B, H / reduction, W / reduction, C)` float32 in [0, 1], unless an option says that it
          isn't clipped.

        Raises:
          ConfigError: the degradation is random and `key` is missing, or is no such key.
          ImageError: the images have another dtype or shape.
        """
        images = _floats(images)
        if key is None and self.is_random:
            raise ConfigError(f"{self} is random; pass key=jax.random.key(seed)")
        return self.apply(images, JaxOps(None if key is None else _keys(key, images.shape[0])))


def _floats(images: Any) -> jax.Array:
    """Images as float32; raises ImageError unless they are `(B, H, W, C)` floats."""
    try:
        array = jnp.asarray(images)
    except (TypeError, ValueError) as error:
        raise ImageError(f"images can't be degraded, as they are no array: {error}") from error
    if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ImageError(
            f"images of dtype {getattr(images, 'dtype', array.dtype)} and shape {array.shape} "
            "can't be degraded; pass (N, H, W, C) floats in [0, 1]"
        )
    return array.astype(jnp.float32)


def _keys(key: Any, count: int) -> jax.Array:
    """`(count,)` keys: those given, or the one given, folded with each image's position."""
    try:
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        keys = key if is_typed else jax.random.wrap_key_data(key)
    except (AttributeError, TypeError):
        keys = None
    if keys is None or keys.shape not in ((), (count,)):
        is_array = isinstance(key, jax.Array | np.ndarray)
        what = f"of dtype {key.dtype} and shape {key.shape}" if is_array else repr(key)
        raise ConfigError(
            f"key {what} can't be used for {count} images; pass jax.random.key(seed), or a key per "
            f"image, such as jax.random.split(jax.random.key(seed), {count})"
        )
    if keys.shape:
        return keys
    return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(count))


def pick(drawn: Array, weights: Sequence[float], results: Sequence[Array], ops: Ops) -> Array:
    """For each image one of several results, with probabilities proportional to `weights`.

    Args:
      drawn: `(B, 1, 1, 1)` uniform values in [0, 1).
      weights: one per result.
      results: each with 3 or 4 axes, the first of which is B or 1.
      ops: selects.
    """
    ends = np.cumsum(weights) / np.sum(weights)
    picked = results[-1]
    for end, result in zip(ends[-2::-1], results[-2::-1], strict=True):
        value = drawn if len(result.shape) == 4 else drawn[..., 0]
        picked = ops.xp.where(value < float(end), result, picked)
    return picked


def clip(images: Array, ops: Ops) -> Array:
    """Values below 0 become 0, those above 1 become 1."""
    return ops.xp.minimum(ops.xp.maximum(images, 0.0), 1.0)
