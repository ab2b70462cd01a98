"""Layers of the networks: Linen modules on `(B, H, W, C)` arrays, and what is known of each.

Masking (`masking.apply_within`) must know which layers look at neighbouring pixels, and summaries
(`summary.layers`) how often a layer's kernel is multiplied. aecore's own layers say so by the
methods of `Layer`. Flax's layers and those of other modules are known through the functions
`looks_around` and `kernel_uses`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from aecore.networks.lowering import convolution
from aecore.networks.lowering.operations import add_bias, relu
from aecore.networks.lowering.phases import merge_phases
from aecore.networks.lowering.platforms import by_platform
from aecore.networks.lowering.products import with_batch_last

Shape = tuple[int, ...]


class Layer(nn.Module):
    """Base of the layers whose outputs depend on neighbouring pixels.

    A layer is used by calling it with one array. It must treat what lies beyond the array as
    zeros: `masking.apply_within` puts zeros where an image ends inside its array.
    """

    def merged(self, outputs: jax.Array) -> jax.Array:
        """What the layer gave, as images `(B, H, W, C)`; phases are put together."""
        return outputs

    def kernel_uses(self, given: Shape, result: Shape) -> int:
        """How often one image is multiplied by the whole kernel.

        Args:
          given: shape of what went in.
          result: shape of what came out, after `merged`.
        """
        return math.prod(result[1:-1])


def looks_around(module: nn.Module) -> bool:
    """Whether a module itself, not only one inside it, looks at neighbouring pixels."""
    return isinstance(module, Layer | nn.Conv | nn.ConvTranspose)


@contextlib.contextmanager
def taking(dtype: Any) -> Iterator[None]:
    """Within it, modules with parameters of their own cast the array that they take to `dtype`."""

    def cast(function, args, kwargs, context):
        if context.method_name == "__call__" and args and own_parameters(context.module):
            first, *others = args
            args = (first.astype(dtype), *others)
        return function(*args, **kwargs)

    with nn.intercept_methods(cast):
        yield


def own_parameters(module: nn.Module) -> list[jax.Array]:
    """The parameters of a bound module itself, without those of modules inside it."""
    params = module.variables.get("params", {})
    return [leaf for leaf in params.values() if not isinstance(leaf, Mapping)]


def kernel_uses(module: nn.Module, given: Shape, result: Shape) -> int:
    """How often one image is multiplied by the whole kernel of a module; see `Layer.kernel_uses`.

    Modules that aren't known are taken to multiply each output position by their kernels, as
    `nn.Dense` and `nn.Conv` do, the latter with any stride and any number of groups.
    """
    if isinstance(module, Layer):
        return module.kernel_uses(given, result)
    # A transposed convolution spreads each pixel that goes in, times the kernel, over the result.
    return math.prod((given if isinstance(module, nn.ConvTranspose) else result)[1:-1])


for_relu = nn.initializers.he_normal()
"""Initial kernels that keep the variance of what a ReLU gave (He et al., "Delving deep into
rectifiers", ICCV 2015)."""

for_linear = nn.initializers.lecun_normal()
"""Initial kernels that keep the variance of what didn't pass a ReLU."""

for_transposed = nn.initializers.variance_scaling(4.0, "fan_in", "truncated_normal")
"""As `for_linear`, for `ConvTranspose`: on average, a quarter of the kernel meets an output."""


class _Convolution(Layer):
    """Base of the 3×3 convolutions with bias.

    Initialised as Keras does, with Glorot's uniform kernels and biases of zero, unless told
    otherwise.
    """

    features: int
    activation: Callable[[jax.Array], jax.Array] | None = None
    """Applied to each number that comes out, such as `nn.relu`."""
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    """Draws the initial kernel."""

    def _weights(self, images: jax.Array, channels: int) -> list[jax.Array]:
        """The images, the kernel for this many channels and the bias, in one dtype."""
        # Flax looks at the initializer's shape in each call, for which drawing would be traced.
        kernel_init = self.kernel_init if self.is_initializing() else _zeros
        kernel = self.param("kernel", kernel_init, (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _varying_alike(*promote_dtype(images, kernel, bias))

    def _finish(self, features: jax.Array, bias: jax.Array, batch_last: bool) -> jax.Array:
        return _finishing(self.activation, batch_last)(features, bias)


@functools.lru_cache(maxsize=64)
def _finishing(activation: Callable[[jax.Array], jax.Array] | None, batch_last: bool) -> Callable:
    """Adds a bias `(K,)` to `(B, H, W, K)` features, and applies the activation."""
    activation = activation or (lambda features: features)

    def finish(features, bias):
        return activation(add_bias(features, bias))

    def finish_batch_last(features, bias):
        return activation(features + bias[:, None, None, None])

    if batch_last:
        return by_platform(finish, with_batch_last(finish_batch_last))
    return finish


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, of which within `jax.shard_map` each varies over the axes over which any does.

    The operations' gradients have the axes of the images; this has them summed for the parameters.
    """
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))
    if not axes:
        return list(arrays)
    return [
        jax.lax.pcast(array, tuple(axes - jax.typeof(array).mat.varying), to="varying")
        for array in arrays
    ]


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.zeros(shape)


class Conv(_Convolution):
    """A convolution: `(B, H, W, C)` to `(B, H / stride, W / stride, features)`, rounded up."""

    stride: int = 1
    batch_last: bool = False
    """Whether CPUs compute with the batch last: for layers that have few channels and follow one
    another directly. Layers of phases always do."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        images, kernel, bias = self._weights(images, images.shape[-1])
        features = convolution.conv(images, kernel, self.stride, self.batch_last)
        return self._finish(features, bias, self.batch_last)


class ConvOnRepeated(_Convolution):
    """`Conv` of an image whose pixels are each repeated 2×2: nearest up-sampling, then a
    convolution. `(B, H, W, C)` to `(B, 2 H, 2 W, features)`."""

    def kernel_uses(self, given, result):
        # Four of nine products: those with taps that meet the same pixel are one.
        return math.prod(result[1:-1]) * 4 // 9

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        images, kernel, bias = self._weights(images, images.shape[-1])
        return self._finish(convolution.conv_on_repeated(images, kernel), bias, False)


class ConvTranspose(_Convolution):
    """A transposed convolution of stride 2: `(B, H, W, C)` to `(B, 2 H, 2 W, features)`."""

    batch_last: bool = False
    """As for `Conv`."""

    def kernel_uses(self, given, result):
        return math.prod(given[1:-1])

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        images, kernel, bias = self._weights(images, images.shape[-1])
        features = convolution.conv_transpose(images, kernel, self.batch_last)
        return self._finish(features, bias, self.batch_last)


class ConvTransposeToPhases(_Convolution):
    """`ConvTranspose` that gives its result's phases: `(B, H, W, C)` to `(B, H, W, 4 features)`."""

    def merged(self, outputs):
        return merge_phases(outputs)

    def kernel_uses(self, given, result):
        return math.prod(given[1:-1])

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        images, kernel, bias = self._weights(images, images.shape[-1])
        phases = convolution.conv_transpose_to_phases(images, kernel)
        return self._finish(phases, jnp.tile(bias, 4), True)


class ConvOnPhases(_Convolution):
    """`Conv` of stride 1 on a larger image's phases: `(B, H, W, 4 C)` to `(B, H, W, 4 features)`.

    The same kernel and bias as for the image itself.
    """

    def merged(self, outputs):
        return merge_phases(outputs)

    @nn.compact
    def __call__(self, phases: jax.Array) -> jax.Array:
        phases, kernel, bias = self._weights(phases, phases.shape[-1] // 4)
        return self._finish(convolution.conv_on_phases(phases, kernel), jnp.tile(bias, 4), True)


class Enlarge(nn.Module):
    """Bicubic interpolation: `(B, H, W, C)` to `(B, scale H, scale W, C)`, without parameters.

    Keys's kernel with a = -0.5 ("Cubic convolution interpolation for digital image processing",
    IEEE TASSP 29, 1981). Where it reaches beyond the border, the weights of the other pixels are
    made to add up to 1, as in Pillow and `jax.image.resize`.
    """

    scale: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        weighted_sum = _CubicSum(self.scale)
        # Of ones, it is the sum of the weights: more than 0.4 in an image, but 0 far outside it.
        total = weighted_sum(jnp.ones_like(images[:1, :, :, :1]))
        return weighted_sum(images) / jnp.where(total > 0.25, total, 1)


def enlarged(images: jax.Array, scale: int) -> jax.Array:
    """Images enlarged as `Enlarge` does it."""
    return images if scale == 1 else jnp.asarray(Enlarge(scale).apply({}, images))


class _CubicSum(Layer):
    """Sums of pixels weighted by Keys's kernel; see `Enlarge`."""

    scale: int

    def __call__(self, images: jax.Array) -> jax.Array:
        weights = _cubic_weights(self.scale)
        padding = [(2, 2) if axis in (1, 2) else (0, 0) for axis in range(4)]
        padded = jnp.pad(images, padding)
        height, width = images.shape[1:3]
        # Not convolutions, which GPUs and TPUs would compute with fewer bits.
        shifted = [padded[:, n:][:, :height] for n in range(5)]
        phases = []
        for row in weights:
            rows = _weighted_sum(row, shifted)
            columns = [rows[:, :, n:][:, :, :width] for n in range(5)]
            phases += [_weighted_sum(column, columns) for column in weights]
        return merge_phases(jnp.concatenate(phases, axis=3), self.scale)


def _weighted_sum(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    terms = [weight * array for weight, array in zip(weights, arrays, strict=True) if weight]
    return functools.reduce(jnp.add, terms)


def _cubic_weights(scale: int) -> list[list[float]]:
    """For each phase of an enlarged axis, the weights of the five pixels around it."""
    places = (np.arange(scale) + 0.5) / scale - 0.5
    x = np.abs(np.subtract.outer(places, np.arange(-2, 3)))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.select([x <= 1, x < 2], [near, far]).tolist()


class ResidualBlock(nn.Module):
    """Two convolutions, whose result is added to what went in.

    Initially the second kernel is zero and the block passes on what went in, so that values stay
    in bounds however many blocks follow each other (Zhang et al., "Fixup initialization", ICLR
    2019).
    """

    features: int
    norm: str = "none"
    """none, or group: GroupNorm before each convolution."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        change = images
        for kernel_init in (for_relu, nn.initializers.zeros):
            if self.norm == "group":
                change = nn.GroupNorm(num_groups=math.gcd(self.features, 8))(change)
            change = Conv(self.features, kernel_init=kernel_init)(relu(change))
        return images + change
