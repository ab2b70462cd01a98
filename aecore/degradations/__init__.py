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
      xp: a namespace with `exp`, `floor`, `maximum`, `minimum`, `reshape`, `round` and `where`.
    """

    xp: Any

    def einsum(self, equation: str, *operands: Array) -> Array:
        """Einstein summation, in full float32 precision."""

    def normal(self, images: Array) -> Array:
        """Independent standard normal values, shaped like `images`."""

    def uniform(self, images: Array, low: float, high: float) -> Array:
        """One value an image in [low, high), shape `(B, 1, 1, 1)`."""

    def uniform_values(self, images: Array) -> Array:
        """Independent values in [0, 1), shaped like `images`."""

    def poisson(self, means: Array) -> Array:
        """Independent Poisson counts, as floats, with these means."""


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

    def uniform_values(self, images):
        return jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(self._next_keys())

    def poisson(self, means):
        def draw(key, means):
            # Which is only there for this kind of keys.
            data = jax.random.bits(key, (2,), jnp.uint32)
            return jax.random.poisson(jax.random.wrap_key_data(data, impl="threefry2x32"), means)

        return jax.vmap(draw)(self._next_keys(), means).astype(jnp.float32)


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


def _check_share(owner: str, name: str, value: Range) -> None:
    _check_range(owner, name, value, lambda share: 0 <= share <= 1, f"0 <= {name} <= 1")


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
class ShotNoise(Degradation):
    """Replaces each value by a Poisson count of photons, scaled back, then clips to [0, 1]."""

    peak: Range = 30.0
    """Mean count for a value of 1, above 0; fewer are noisier. Two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        _check_range("ShotNoise", "peak", self.peak, lambda p: 0 < p <= 1e6, "0 < peak <= 1e6")

    def apply(self, images, ops):
        peak = _draw(self.peak, images, ops)
        return _clip(ops.poisson(images * peak) / peak, ops)


@register
@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Degradation):
    """Sets a random share of the values to 0 or 1, either with equal probability."""

    amount: Range = 0.1
    """Probability that a value is replaced, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        _check_share("SaltAndPepper", "amount", self.amount)

    def apply(self, images, ops):
        amount = _draw(self.amount, images, ops)
        drawn = ops.uniform_values(images)
        peppered = ops.xp.where(drawn < amount / 2, 0.0, images)
        return ops.xp.where(drawn >= 1 - amount / 2, 1.0, peppered)


@register
@dataclasses.dataclass(frozen=True)
class Mask(Degradation):
    """Blanks random pixels and random boxes, in all channels at once."""

    pixels: Range = 0.0
    """Probability that a pixel is blanked, in [0, 1]; two numbers: a range."""
    boxes: int | tuple[int, int] = 1
    """Boxes an image; two numbers: a range, both included. They may overlap."""
    size: Range = 0.25
    """Sides of a box as a share of the image's sides, in [0, 1], rounded to whole pixels; two
    numbers: a range, from which each image draws one size."""
    value: Range = 0.0
    """What blanked pixels become, in [0, 1]; two numbers: a range."""

    noisy: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("pixels", "size", "value"):
            _check_share("Mask", name, getattr(self, name))
        _check_range(
            "Mask",
            "boxes",
            self.boxes,
            lambda n: isinstance(n, int) and n >= 0,
            "whole numbers >= 0",
        )

    def apply(self, images, ops):
        xp = ops.xp
        height, width = images.shape[1:3]
        rows = np.arange(height, dtype=np.float32)[:, None, None]
        columns = np.arange(width, dtype=np.float32)[None, :, None]
        blank = ops.uniform_values(images[..., :1]) < _draw(self.pixels, images, ops)
        size = _draw(self.size, images, ops)
        box = [_namespace(self.size, ops)[0].round(side * size) for side in (height, width)]
        few, most = self.boxes if isinstance(self.boxes, tuple) else (self.boxes, self.boxes)
        count = xp.floor(ops.uniform(images, few, most + 1))
        for index in range(most):
            top, left = (
                xp.floor(ops.uniform(images, 0.0, 1.0) * (side - extent + 1))
                for side, extent in zip((height, width), box, strict=True)
            )
            inside = (rows >= top) & (rows < top + box[0])
            inside = inside & (columns >= left) & (columns < left + box[1])
            blank = blank | (inside & (index < count))
        return xp.where(blank, _draw(self.value, images, ops), images)


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
        small = _kept(xp, size, scale)
        down = _area_overlap(xp, size, small, size)
        up = _area_overlap(xp, small, size, size)
        return einsum("...ij,...jk->...ik", up, down)


def enlarging(size: int, scale: float) -> np.ndarray:
    """`(size, small)`: how `Pixelate(scale)` brings a kept side back to `size` pixels."""
    small = int(_kept(np, size, _as_matrices(scale)))
    return _area_overlap(np, small, size, size)[:, :small]


def _kept(xp: Any, size: int, scale: Array) -> Array:
    """How many of `size` pixels pixelation keeps."""
    # The recipe truncates; the margin keeps 0.29 * 100 from becoming 28.
    return xp.maximum(xp.floor(size * scale + 1e-4), 1.0)


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
    # The weights of a mean add up to 1, but for rounding.
    return _clip(_separable(images, rows, columns, ops), ops)


def _separable(images: Array, rows: Array, columns: Array, ops: Ops) -> Array:
    """Multiplies heights and widths by `([B,] new, old)` matrices."""
    batch = "b" if len(rows.shape) == 3 else ""
    images = ops.einsum(f"{batch}ij,bjwc->biwc", rows, images)
    return ops.einsum(f"{batch}ij,bhjc->bhic", columns, images)


# Annex K of ITU-T T.81 (JPEG): the example tables for luminance and chrominance, which encoders
# use and scale.
_LUMINANCE = """
    16 11 10 16  24  40  51  61   12 12 14 19  26  58  60  55
    14 13 16 24  40  57  69  56   14 17 22 29  51  87  80  62
    18 22 37 56  68 109 103  77   24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99
"""
_CHROMINANCE = """
    17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99
    24 26 56 99 99 99 99 99   47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
"""
_TABLES = [
    np.array(table.split(), np.float32).reshape(8, 8) for table in (_LUMINANCE, _CHROMINANCE)
]

# RGB to luminance and two chrominances around 0, from JFIF (ITU-T T.871).
_TO_YCC = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ],
    np.float32,
)
_FROM_YCC = np.linalg.inv(_TO_YCC.astype(np.float64)).astype(np.float32)

# The orthonormal discrete cosine transform of 8 values.
_DCT = np.sqrt(0.25) * np.cos(np.pi / 8 * np.arange(8)[:, None] * (np.arange(8) + 0.5))
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)


@register
@dataclasses.dataclass(frozen=True)
class JPEG(Degradation):
    """What JPEG loses: colour at half the size (4:2:0), and the 8×8 blocks' cosine coefficients.

    As libjpeg does it, up to rounding within its transforms, for gray and RGB images.
    """

    quality: Range = 50
    """libjpeg's quality, in 1 to 100; two numbers: a range."""

    def __post_init__(self):
        _check_range("JPEG", "quality", self.quality, lambda q: 1 <= q <= 100, "1 to 100")

    def apply(self, images, ops):
        height, width, channels = images.shape[1:]
        if channels not in (1, 3):
            raise ConfigError(f"JPEG takes 1 or 3 channels, not {channels}")
        if isinstance(self.quality, tuple):
            quality = ops.xp.floor(ops.uniform(images, *self.quality))
            scale = ops.xp.where(quality < 50, ops.xp.floor(5000 / quality), 200 - 2 * quality)
            scale = scale[..., None, None]  # To broadcast against blocks.
        else:
            quality = int(self.quality)
            scale = float(5000 // quality if quality < 50 else 200 - 2 * quality)
        levels = ops.xp.round(images * 255.0)
        if channels == 1:
            result = _through_blocks(levels - 128.0, _TABLES[0], scale, ops) + 128.0
            return _clip(ops.xp.round(result) / 255.0, ops)
        ycc = ops.xp.round(ops.einsum("bhwc,kc->bhwk", levels, _TO_YCC))
        luminance = ycc[..., :1] - 128.0
        small = _separable(ycc[..., 1:], _halving(height), _halving(width), ops)
        luminance = _through_blocks(luminance, _TABLES[0], scale, ops)
        small = _through_blocks(ops.xp.round(small), _TABLES[1], scale, ops)
        chrominance = _separable(small, _doubling(height), _doubling(width), ops)
        result = 128.0 + ops.einsum("bhwc,kc->bhwk", luminance, _FROM_YCC[:, :1])
        result = result + ops.einsum("bhwc,kc->bhwk", chrominance, _FROM_YCC[:, 1:])
        return _clip(ops.xp.round(result) / 255.0, ops)


def _through_blocks(planes: Array, table: np.ndarray, scale: Array, ops: Ops) -> Array:
    """Quantises the cosine coefficients of each 8×8 block, and goes back to whole levels."""
    height, width, channels = planes.shape[1:]
    # A last block that is not full repeats the last row and column, as libjpeg does.
    whole = [_last_repeated(side, -(-side // 8) * 8) for side in (height, width)]
    planes = _separable(planes, *whole, ops)
    rows, columns = planes.shape[1] // 8, planes.shape[2] // 8
    blocks = ops.xp.reshape(planes, (-1, rows, 8, columns, 8, channels))
    xp = np if isinstance(scale, float) else ops.xp  # A table for all images is a constant.
    steps = xp.floor((table[:, None, :, None] * scale + 50.0) / 100.0)
    steps = xp.minimum(xp.maximum(steps, 1.0), 255.0)
    coefficients = ops.einsum("ui,vj,bricjk->brucvk", _DCT, _DCT, blocks)
    coefficients = ops.xp.round(coefficients / steps) * steps
    blocks = ops.einsum("ui,vj,brucvk->bricjk", _DCT, _DCT, coefficients)
    planes = ops.xp.reshape(blocks, (-1, 8 * rows, 8 * columns, channels))
    planes = ops.xp.round(planes[:, :height, :width])
    return ops.xp.minimum(ops.xp.maximum(planes, -128.0), 127.0)


def _last_repeated(size: int, padded: int) -> np.ndarray:
    """`(padded, size)`: the identity, its last row repeated."""
    return np.eye(size, dtype=np.float32)[np.minimum(np.arange(padded), size - 1)]


def _halving(size: int) -> np.ndarray:
    """`(size / 2 rounded up, size)`: means of pairs; an odd last one is paired with itself."""
    half = -(-size // 2)
    return _last_repeated(size, 2 * half).reshape(half, 2, size).mean(1)


def _doubling(size: int) -> np.ndarray:
    """`(size, size / 2 rounded up)`: linear interpolation between the pairs' centres."""
    half = -(-size // 2)
    near = np.arange(size) // 2
    far = np.clip(near + np.where(np.arange(size) % 2, 1, -1), 0, half - 1)
    eye = np.eye(half, dtype=np.float32)
    return 0.75 * eye[near] + 0.25 * eye[far]


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
