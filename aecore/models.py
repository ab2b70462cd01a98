"""Flax Linen networks, `(B, H, W, C)` float32 in [0, 1] to the same shape, and their registry.

Every network has `encode` and `decode`, `channels` (the C that it takes) and `stride` (H and W
must be multiples of it).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aecore.convolution import Conv, ConvTranspose, merge_phases
from aecore.errors import ConfigError

REGISTRY: dict[str, type[nn.Module]] = {}


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: lets checkpoints and JSON name the model `cls` by its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def hyperparameters(model: nn.Module) -> dict[str, Any]:
    """The fields that describe a model, without those that Linen adds to every module."""
    fields = type(model).__dataclass_fields__
    return {name: getattr(model, name) for name in fields if name not in ("parent", "name")}


def apply_within(model: nn.Module, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """A network on images that fill the first rows and columns of their arrays alone.

    What goes into each convolution is set to zero outside the image, as if the array ended there
    and were padded. This is exact for networks that look at neighbours in convolutions that pad
    with zeros, and in pooling over blocks.

    Args:
      model: a network.
      params: its parameters.
      images: `(B, H, W, C)`.
      sizes: `(B, 2)` int32, the images' heights and widths, multiples of the model's stride.

    Returns:
      `(B, H, W, C)`, of which what lies outside the images means nothing.
    """

    def inside(array):
        within = True
        for axis in (1, 2):
            # Not a Python number, since it may be symbolic where the network is exported.
            scale = jnp.asarray(images.shape[axis] // array.shape[axis])
            end = sizes[:, axis - 1] // scale
            shape = [-1 if i == axis else 1 for i in range(4)]
            place = jnp.arange(array.shape[axis]).reshape(shape)
            within &= place < end.reshape(-1, 1, 1, 1)
        return jnp.where(within, array, 0)

    def intercept(function, args, kwargs, context):
        convolves = isinstance(context.module, (Conv, nn.Conv, nn.ConvTranspose))
        if convolves and context.method_name in ("__call__", "on_phases", "to_phases"):
            args = (inside(args[0]), *args[1:])
        return function(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, images)


class Autoencoder(nn.Module):
    """Base of the networks: `decode(encode(images))`."""

    def encode(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` images to `(B, H / s, W / s, K)` codes."""
        raise NotImplementedError

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes to `(B, H, W, C)` images."""
        raise NotImplementedError

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images))


def _check_features(owner: str, features: tuple[int, ...], channels: int) -> None:
    if not isinstance(features, tuple) or not features or min((*features, channels)) < 1:
        raise ConfigError(
            f"{owner} can't have features {features} and {channels} channels; "
            "use 1 or more features, all numbers at least 1"
        )


@register
class NoiseReducer(Autoencoder):
    """Strided convolutions down, transposed convolutions up, sigmoid output.

    With the default features, the denoise recipe's network: 3,217 parameters for one channel.
    """

    features: tuple[int, ...] = (16, 8)
    """Features of the encoder's layers; the decoder's are the same in reverse."""
    channels: int = 1
    """Channels of the images."""

    def __post_init__(self):
        _check_features("NoiseReducer", self.features, self.channels)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2 ** len(self.features)

    def setup(self):
        self.encoder = [Conv(features, stride=2) for features in self.features]
        self.decoder = [ConvTranspose(features) for features in self.features[::-1]]
        self.output = Conv(self.channels)

    def encode(self, images):
        for layer in self.encoder:
            images = nn.relu(layer(images))
        return images

    def decode(self, codes):
        *before, last = self.decoder
        for layer in before:
            codes = nn.relu(layer(codes))
        # In phases, the widest activations need not be put together at full size.
        phases = nn.relu(last.to_phases(codes))
        return nn.sigmoid(merge_phases(self.output.on_phases(phases)))


@register
class ResolutionEnhancer(Autoencoder):
    """Convolutions around one 2×2 max-pooling and one nearest up-sampling, linear output.

    With the default features, the enhance recipe's network: 788,867 parameters for three channels.
    """

    features: tuple[int, ...] = (256, 128, 64)
    """Features of the encoder's layers, the last one after pooling; the decoder's in reverse."""
    channels: int = 3
    """Channels of the images."""

    def __post_init__(self):
        _check_features("ResolutionEnhancer", self.features, self.channels)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2

    def setup(self):
        self.encoder = [Conv(features) for features in self.features]
        self.decoder = [Conv(features) for features in self.features[::-1]]
        self.output = Conv(self.channels)

    def encode(self, images):
        *before, last = self.encoder
        for layer in before:
            images = nn.relu(layer(images))
        return nn.relu(last(nn.max_pool(images, (2, 2), (2, 2))))

    def decode(self, codes):
        first, *after = self.decoder
        codes = nn.relu(first(codes))
        codes = codes.repeat(2, axis=1).repeat(2, axis=2)
        for layer in after:
            codes = nn.relu(layer(codes))
        return self.output(codes)
