"""Flax Linen networks, `(B, H, W, C)` float32 in [0, 1] to the same shape, and their registry.

Every network has `encode` and `decode`, `channels` (the C that it takes) and `stride` (H and W
must be multiples of it).
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from aecore.errors import ConfigError
from aecore.networks.convolution import Conv, ConvTranspose, max_pool, merge_phases, split_phases

REGISTRY: dict[str, type[nn.Module]] = {}


@jax.custom_jvp
def _relu(values: jax.Array) -> jax.Array:
    """`nn.relu`, whose gradient needs what came out alone: the next layer keeps that anyway."""
    return jnp.maximum(values, 0)


# Written as `output > 0`, XLA would make `values > 0` of it again.
_relu.defjvps(lambda tangent, output, values: jnp.where(output == 0, 0, tangent))


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: lets checkpoints and JSON name the model `cls` by its class name."""
    REGISTRY[cls.__name__] = cls
    return cls


def hyperparameters(model: nn.Module) -> dict[str, Any]:
    """The fields that describe a model, without those that Linen adds to every module."""
    names = [field.name for field in dataclasses.fields(model)]
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


class Autoencoder(nn.Module):
    """Base of the networks: `decode(encode(images))`."""

    scale: ClassVar[int] = 1
    """How many times larger the images come out."""

    def encode(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, C)` images to `(B, H / s, W / s, K)` codes."""
        raise NotImplementedError

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes to `(B, H, W, C)` images."""
        raise NotImplementedError

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images))


def _check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        known = " or ".join(map(str, choices))
        raise ConfigError(f"{owner} can't have {name} {value!r}; use {known}")


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
        relu: dict[str, Any] = dict(activation=_relu, batch_last=True)
        self.encoder = [Conv(features, stride=2, **relu) for features in self.features]
        self.decoder = [ConvTranspose(features, **relu) for features in self.features[::-1]]
        self.output = Conv(self.channels, activation=nn.sigmoid, batch_last=True)

    def encode(self, images):
        for layer in self.encoder:
            images = layer(images)
        return images

    def decode(self, codes):
        *before, last = self.decoder
        for layer in before:
            codes = layer(codes)
        # In phases, the widest activations need not be put together at full size.
        return merge_phases(self.output.on_phases(last.to_phases(codes)))


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
        self.encoder = [Conv(features, activation=_relu) for features in self.features]
        self.decoder = [Conv(features, activation=_relu) for features in self.features[::-1]]
        self.output = Conv(self.channels)

    def encode(self, images):
        *before, last = self.encoder
        for layer in before:
            images = layer(images)
        return last(max_pool(images))

    def decode(self, codes):
        first, *after = self.decoder
        codes = first(codes).repeat(2, axis=1).repeat(2, axis=2)
        for layer in after:
            codes = layer(codes)
        return self.output(codes)


@register
class SubpixelAutoencoder(Autoencoder):
    """Convolutions at half the resolution, from and to the image's four phases.

    The four pixels of each 2×2 block are the channels of one pixel, as in sub-pixel convolutions
    (Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network", CVPR 2016) and FFDNet (Zhang et al., IEEE Transactions on Image
    Processing 27, 2018): nothing is thrown away, and no layer computes at full resolution. With the
    default features, it has fewer parameters than `NoiseReducer` for one channel: 3,130.
    """

    features: tuple[int, ...] = (16, 14)
    """Features of the layers before the last one."""
    channels: int = 1
    """Channels of the images."""
    residual: bool = False
    """Whether the output is the image and a linear layer's correction; else it is a sigmoid."""

    def __post_init__(self):
        _check_features("SubpixelAutoencoder", self.features, self.channels)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2

    def setup(self):
        self.encoder = [Conv(features, 1, _relu, True) for features in self.features]
        self.output = Conv(4 * self.channels, 1, None if self.residual else nn.sigmoid, True)

    def encode(self, images):
        phases = split_phases(images)
        codes = phases
        for layer in self.encoder:
            codes = layer(codes)
        # What is corrected is part of the code.
        return jnp.concatenate([codes, phases], axis=3) if self.residual else codes

    def decode(self, codes):
        codes, phases = jnp.split(codes, [self.features[-1]], axis=3)
        output = self.output(codes)
        return merge_phases(output + phases if self.residual else output)


class _Block(nn.Module):
    """Two convolutions, whose result is added to what they got."""

    features: int
    norm: str

    @nn.compact
    def __call__(self, images):
        change = images
        for _ in range(2):
            if self.norm == "group":
                change = nn.GroupNorm(num_groups=math.gcd(self.features, 8))(change)
            change = Conv(self.features)(_relu(change))
        return images + change


@register
class UNet(Autoencoder):
    """An encoder and a decoder of residual blocks at several scales, with skips between them.

    Each level has half the resolution of the one before. On the way up, what its level had on the
    way down is added. The form is that of DRUNet (Zhang et al., "Plug-and-play image restoration
    with deep denoiser prior", IEEE TPAMI 44, 2022), from U-Net (Ronneberger et al., MICCAI 2015)
    and residual networks.
    """

    features: tuple[int, ...] = (32, 64, 128)
    """Features of the levels, finest first."""
    blocks: int = 1
    """Residual blocks at each level on each way."""
    channels: int = 1
    """Channels of the images."""
    residual: bool = True
    """Whether the output is the image and a linear layer's correction; else it is a sigmoid."""
    norm: Literal["none", "group"] = "none"
    """none, or group: GroupNorm before each block's convolutions. It sees the whole image, so that
    large images can't be restored in tiles."""
    patch: Literal[1, 2] = 1
    """2: the finest level has half the image's resolution, and its four phases as channels."""

    def __post_init__(self):
        _check_features("UNet", self.features, self.channels)
        _check_choice("UNet", "norm", self.norm, ("none", "group"))
        _check_choice("UNet", "patch", self.patch, (1, 2))
        if self.blocks < 1:
            raise ConfigError(f"UNet can't have {self.blocks} blocks; use 1 or more")
        super().__post_init__()

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (len(self.features) - 1)

    def setup(self):
        def level(features):
            return [_Block(features, self.norm) for _ in range(self.blocks)]

        finest, *coarser = self.features
        self.input = Conv(finest)
        self.down = [Conv(features, stride=2) for features in coarser]
        self.encoder = [level(features) for features in self.features]
        self.up = [ConvTranspose(features) for features in self.features[:-1]]
        self.decoder = [level(features) for features in self.features]
        self.output = Conv(self.channels * self.patch**2)

    def __call__(self, images):
        return self._up(*self._down(images))

    def encode(self, images):
        """All that the decoder needs, at the coarsest level's resolution.

        These are the images and what each level passes on; the finer ones as their phases.
        """
        levels = self._down(images)
        return jnp.concatenate([_to_size(level, levels[-1].shape[1]) for level in levels], axis=3)

    def decode(self, codes):
        parts, first = [], 0
        for features, scale in self._parts():
            count = features * scale**2
            part = codes[..., first : first + count]
            while scale > 1:
                part, scale = merge_phases(part), scale // 2
            parts.append(part)
            first += count
        return self._up(*parts)

    def _parts(self) -> list[tuple[int, int]]:
        """Of each part of a code its features, and how many times finer than the code it is."""
        count = len(self.features)
        image = (self.channels * self.patch**2, 2 ** (count - 1))
        return [image, *((f, 2 ** (count - 1 - i)) for i, f in enumerate(self.features))]

    def _down(self, images) -> list[jax.Array]:
        """The image at the finest level's resolution, and what each level comes to."""
        images = split_phases(images) if self.patch == 2 else images
        level = self.input(images)
        levels = []
        for index, blocks in enumerate(self.encoder):
            if index:
                level = self.down[index - 1](level)
            for block in blocks:
                level = block(level)
            levels.append(level)
        return [images, *levels]

    def _up(self, images, *levels) -> jax.Array:
        *finer, level = levels
        for index in reversed(range(len(levels))):
            if index < len(finer):
                level = self.up[index](level) + finer[index]
            for block in self.decoder[index]:
                level = block(level)
        output = self.output(_relu(level))
        output = images + output if self.residual else nn.sigmoid(output)
        return merge_phases(output) if self.patch == 2 else output


def _to_size(images: jax.Array, height: int) -> jax.Array:
    """Images as the phases of phases that have this height."""
    while images.shape[1] > height:
        images = split_phases(images)
    return images


@register
class LinearAutoencoder(Autoencoder):
    """A linear map of each square patch to a code, and a linear map back, with biases.

    Trained with MSE on undegraded images, its codes span what the first principal components span
    (Baldi and Hornik, "Neural networks and principal component analysis", Neural Networks 2, 1989).
    """

    components: int = 32
    """Numbers in the code of a patch."""
    patch: int = 28
    """Side of a patch in pixels; patches don't overlap."""
    channels: int = 1
    """Channels of the images."""

    def __post_init__(self):
        if min(self.components, self.patch, self.channels) < 1:
            raise ConfigError(
                f"LinearAutoencoder can't have {self.components} components, patches of "
                f"{self.patch} pixels and {self.channels} channels; use numbers of at least 1"
            )
        super().__post_init__()

    @property
    def stride(self) -> int:
        return self.patch

    def setup(self):
        self.encoder = nn.Dense(self.components)
        self.decoder = nn.Dense(self.patch**2 * self.channels)

    def encode(self, images):
        b, h, w, c = images.shape
        p = self.patch
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return self.encoder(patches.reshape(b, h // p, w // p, p * p * c))

    def decode(self, codes):
        b, h, w, _ = codes.shape
        p, c = self.patch, self.channels
        patches = self.decoder(codes).reshape(b, h, w, p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, h * p, w * p, c)
