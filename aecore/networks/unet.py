"""A U-Net of residual blocks."""

import types
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from aecore.networks.base import Autoencoder, check_choice, check_numbers, register
from aecore.networks.layers import (
    Conv,
    ConvTranspose,
    ResidualBlock,
    for_linear,
    for_transposed,
)
from aecore.networks.lowering.operations import relu
from aecore.networks.lowering.phases import merge_phases, split_phases


@register
class UNet(Autoencoder):
    """An encoder and a decoder of residual blocks at several resolutions, with skips between them.

    Each level has half the resolution of the one before. On the way up, each level adds what it
    had on the way down. Untrained, a residual network gives back its input.
    The form is that of DRUNet (Zhang et al., "Plug-and-play image restoration
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
    """True: the output is the image plus a correction by a linear layer, which starts at zero.
    False: it is a sigmoid."""
    norm: Literal["none", "group"] = "none"
    """none, or group: GroupNorm before each block's convolutions. It averages over the whole image,
    so that large images can't be restored in tiles."""
    patch: Literal[1, 2] = 1
    """2: the finest level has half the image's resolution, and its four phases as channels."""
    last_relu: bool = False
    """True: a ReLU comes before the last layer. It stops a residual network of some size from
    learning: its correction starts at zero, and the first steps push all that the last layer
    sees below zero, where a ReLU has no gradient."""

    # UNets had it before it was a field.
    unsaid = types.MappingProxyType({"last_relu": True})

    def __post_init__(self):
        check_numbers(self, "features", "blocks", "channels")
        check_choice(self, "residual", True, False)
        check_choice(self, "norm", "none", "group")
        check_choice(self, "patch", 1, 2)
        check_choice(self, "last_relu", True, False)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (len(self.features) - 1)

    def setup(self):
        def level(features):
            return [ResidualBlock(features, self.norm) for _ in range(self.blocks)]

        finest, *coarser = self.features
        self.input = Conv(finest, kernel_init=for_linear)
        self.down = [Conv(features, stride=2, kernel_init=for_linear) for features in coarser]
        self.encoder = [level(features) for features in self.features]
        self.up = [ConvTranspose(f, kernel_init=for_transposed) for f in self.features[:-1]]
        self.decoder = [level(features) for features in self.features]
        self.output = Conv(
            self.channels * self.patch**2,
            kernel_init=nn.initializers.zeros
            if self.residual
            else nn.initializers.glorot_uniform(),
        )

    def __call__(self, images):
        return self._up(*self._down(images))

    def encode(self, images):
        """All that the decoder needs, at the coarsest level's resolution.

        These are the images and what each level passes on, the finer ones as their phases.
        """
        levels = self._down(images)
        return jnp.concatenate([_to_size(level, levels[-1].shape[1]) for level in levels], axis=3)

    def decode(self, codes):
        parts, first = [], 0
        for features, finer in self._parts():
            count = features * finer**2
            part = codes[..., first : first + count]
            while finer > 1:
                part, finer = merge_phases(part), finer // 2
            parts.append(part)
            first += count
        return self._up(*parts)

    def _parts(self) -> list[tuple[int, int]]:
        """For each part of a code, its features and how many times finer than the code it is."""
        count = len(self.features)
        image = (self.channels * self.patch**2, 2 ** (count - 1))
        return [image, *((f, 2 ** (count - 1 - i)) for i, f in enumerate(self.features))]

    def _down(self, images) -> list[jax.Array]:
        """The image at the finest level's resolution, then each level's result."""
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
        output = self.output(relu(level) if self.last_relu else level)
        output = images + output if self.residual else nn.sigmoid(output)
        return merge_phases(output) if self.patch == 2 else output


def _to_size(images: jax.Array, height: int) -> jax.Array:
    """Images as the phases of phases that have this height."""
    while images.shape[1] > height:
        images = split_phases(images)
    return images
