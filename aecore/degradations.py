"""Degradations: `(B, H, W, C)` float32 images in [0, 1] to the same, one definition for TF and JAX.

A degradation is written once against `Ops`, the few array operations that it needs, and is run
by whoever brings an implementation: `JaxOps` here, TensorFlow's in `aecore.data`. Calling a
degradation runs it with JAX, eagerly or under `jit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aecore.errors import ConfigError

Array = Any
Range = float | tuple[float, float]


class Ops(Protocol):
    """What a degradation may use besides Python's operators on arrays.

    Attributes:
      xp: a namespace with `exp`, `floor`, `maximum` and `minimum`.
    """

    xp: Any

    def einsum(self, equation: str, *operands: Array) -> Array:
        """Einstein summation, in full float32 precision."""

    def normal(self, images: Array) -> Array:
        """Independent standard normal values, shaped like `images`."""

    def uniform(self, images: Array, low: float, high: float) -> Array:
        """One value an image in [low, high), shape `(B, 1, 1, 1)`."""


class JaxOps:
    """`Ops` for JAX. Values drawn for an image depend on that image's key alone.

    Args:
      keys: `(B,)` PRNG keys, one an image; `None` where nothing is drawn.
    """

    xp = jnp

    def __init__(self, keys: jax.Array | None = None):
        self._keys = keys
        self._draws = 0

    def _next_keys(self) -> jax.Array:
        self._draws += 1
        return jax.vmap(lambda key: jax.random.fold_in(key, self._draws))(self._keys)

    def einsum(self, equation, *operands):
        # Without HIGHEST, a GPU or TPU would round the operands to tf32 or bfloat16.
        return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    def normal(self, images):
        return jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(self._next_keys())

    def uniform(self, images, low, high):
        draw = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))
        return draw(self._next_keys())[:, None, None, None]


REGISTRY: dict[str, type["Degradation"]] = {}


def register(cls: type["Degradation"]) -> type["Degradation"]:
    """Class decorator: lets checkpoints and JSON name `cls`, a frozen dataclass, by its name."""
    REGISTRY[cls.__name__] = cls
    return cls


@dataclasses.dataclass(frozen=True)
class Degradation:
    """Base class. Subclasses are frozen dataclasses that define `apply`."""

    noisy: ClassVar[bool] = False

    def apply(self, images: Array, ops: Ops) -> Array:
        """Degrades `(B, H, W, C)` float32 images in [0, 1]; H, W and C are known statically."""
        raise NotImplementedError

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a key: noise, or a parameter that is a range."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return self.noisy or any(isinstance(value, tuple) for value in values)

    def __call__(self, images: Array, key: jax.Array | None = None) -> jax.Array:
        """Degrades images with JAX.

        Args:
          images: `(B, H, W, C)` float in [0, 1].
          key: one PRNG key (each image then uses the key folded with its position), or `(B,)`
            keys, one an image. Needed only if `is_random`.

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


def _check_range(
    owner: str, name: str, value: Range, valid: Callable[[float], bool], bounds: str
) -> None:
    ends = value if isinstance(value, tuple) else (value, value)
    if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
        raise ConfigError(f"{owner}: {name} {value!r} is not a number or a (low, high) pair")
    if not all(valid(end) for end in ends):
        raise ConfigError(f"{owner}: {name} {value} is out of bounds; use {bounds}")
    if ends[0] > ends[1]:
        raise ConfigError(f"{owner}: {name} {value} has low above high; swap them")


def _draw(value: Range, images: Array, ops: Ops) -> Array:
    """The parameter itself, or `(B, 1, 1, 1)` values drawn from its range, one an image."""
    return ops.uniform(images, *value) if isinstance(value, tuple) else value


@register
@dataclasses.dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Adds independent Gaussian noise to each value, then clips to [0, 1]."""

    sigma: Range = 0.4
    """Standard deviation of the noise on the [0, 1] scale, at least 0; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        _check_range("GaussianNoise", "sigma", self.sigma, lambda s: 0 <= s < np.inf, "sigma >= 0")

    def apply(self, images, ops):
        return _clip(images + _draw(self.sigma, images, ops) * ops.normal(images), ops)


@register
@dataclasses.dataclass(frozen=True)
class Pixelate(Degradation):
    """Area-resizes to a fraction of the size and back, as OpenCV's `INTER_AREA` does both ways."""

    scale: Range = 0.4
    """Fraction of height and width that is kept, in (0, 1]; two numbers: a range."""

    def __post_init__(self):
        _check_range("Pixelate", "scale", self.scale, lambda s: 0 < s <= 1, "0 < scale <= 1")

    def apply(self, images, ops):
        return _apply_separable(images, self.scale, self._matrix, ops)

    @staticmethod
    def _matrix(size: int, scale: Array, ops: Ops) -> Array:
        xp, einsum = _namespace(scale, ops)
        scale = _as_matrices(scale)
        # The recipe truncates the small size; the margin keeps 0.29 * 100 from becoming 28.
        small = xp.maximum(xp.floor(size * scale + 1e-4), 1.0)
        down = _area_overlap(xp, size, small, size)
        up = _area_overlap(xp, small, size, size)
        return einsum("...ij,...jk->...ik", up, down)


def _area_overlap(xp: Any, size_in: Array, size_out: Array, rows: int) -> Array:
    """`(..., rows, rows)` weights of an area resize from `size_in` to `size_out` values.

    Output value i covers [i, i + 1) * size_in / size_out of the input and is the mean of what it
    covers. Both sizes may be below `rows`: the weights beyond them are zero. In units of
    1 / size_out all ends are integers, so that float32 has no rounding before the division.
    """
    i = np.arange(rows, dtype=np.float32)[:, None]
    j = np.arange(rows, dtype=np.float32)[None, :]
    start = xp.maximum(i * size_in, j * size_out)
    end = xp.minimum((i + 1) * size_in, (j + 1) * size_out)
    return xp.maximum(end - start, 0.0) / size_in


@register
@dataclasses.dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Convolves with a Gaussian; the image is mirrored at its edges, edge pixels repeated."""

    sigma: Range = 1.0
    """Standard deviation of the Gaussian in pixels, at least 0; two numbers: a range."""

    def __post_init__(self):
        _check_range("GaussianBlur", "sigma", self.sigma, lambda s: 0 <= s < np.inf, "sigma >= 0")

    def apply(self, images, ops):
        return _apply_separable(images, self.sigma, self._matrix, ops)

    @staticmethod
    def _matrix(size: int, sigma: Array, ops: Ops) -> Array:
        xp, einsum = _namespace(sigma, ops)
        # At 1e-3 the neighbours' weights underflow to 0: sigma 0 is the identity.
        sigma = xp.maximum(_as_matrices(sigma), 1e-3)
        i = np.arange(size, dtype=np.float32)[:, None]
        j = np.arange(size, dtype=np.float32)[None, :]
        weights = 0.0
        for period in range(-2, 3):
            for mirrored in (j + 2 * size * period, 2 * size * period - 1 - j):
                weights = weights + xp.exp(-0.5 * ((i - mirrored) / sigma) ** 2)
        return weights / einsum("...ij,jk->...ik", weights, np.ones((size, 1), np.float32))


def _namespace(parameter: Array, ops: Ops) -> tuple[Any, Callable]:
    """NumPy for a plain number, so that its matrix is a constant; else the ops' own."""
    return (np, np.einsum) if isinstance(parameter, (int, float)) else (ops.xp, ops.einsum)


def _as_matrices(parameter: Array) -> Array:
    """`(B, 1, 1, 1)` values as `(B, 1, 1)`, to broadcast against matrices."""
    return np.float32(parameter) if isinstance(parameter, (int, float)) else parameter[..., 0]


def _apply_separable(
    images: Array, parameter: Range, matrix: Callable[[int, Array, Ops], Array], ops: Ops
) -> Array:
    """Applies a linear operator along the height and along the width of the images.

    `matrix` makes it, `([B,] size, size)`, of a size and the parameter that was drawn.
    """
    parameter = _draw(parameter, images, ops)
    rows, columns = (matrix(size, parameter, ops) for size in images.shape[1:3])
    batch = "b" if len(rows.shape) == 3 else ""
    images = ops.einsum(f"{batch}ij,bjwc->biwc", rows, images)
    images = ops.einsum(f"{batch}ij,bhjc->bhic", columns, images)
    # The weights of a mean add up to 1, but for rounding.
    return _clip(images, ops)


def _clip(images: Array, ops: Ops) -> Array:
    return ops.xp.minimum(ops.xp.maximum(images, 0.0), 1.0)


@register
@dataclasses.dataclass(frozen=True)
class Compose(Degradation):
    """Applies degradations in order."""

    parts: tuple[Degradation, ...] = ()
    """The degradations, first to last."""

    def __post_init__(self):
        if not (
            isinstance(self.parts, tuple)
            and all(isinstance(part, Degradation) for part in self.parts)
        ):
            raise ConfigError(f"Compose: {self.parts!r} is not a tuple of degradations")

    @property
    def is_random(self):
        return any(part.is_random for part in self.parts)

    def apply(self, images, ops):
        for part in self.parts:
            images = part.apply(images, ops)
        return images
