"""A network that enlarges images."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from aecore.networks.base import Autoencoder, check_choice, check_numbers, register
from aecore.networks.layers import Conv, Enlarge, ResidualBlock, for_linear
from aecore.networks.lowering.phases import merge_phases, split_phases


@register
class Upscaler(Autoencoder):
    """Enlarges images by a whole factor: residual blocks at low resolution, sub-pixel output.

    All convolutions compute at the resolution of the small image. The last one gives all pixels of
    the large image that belong to a small one's place, as channels (Shi et al., "Real-time single
    image and video super-resolution using an efficient sub-pixel convolutional neural network",
    CVPR 2016). They correct a bicubic interpolation, which the untrained network is. The blocks
    have no normalisation, as in EDSR (Lim et al., "Enhanced deep residual networks for single image
    super-resolution", CVPR Workshops 2017).

    For one and three channels, `width=16, blocks=2` has about 11,000 parameters, the default
    600,000, and `width=192, blocks=15` 10 million.
    """

    width: int = 64
    """Features of each layer."""
    blocks: int = 8
    """Residual blocks, of two convolutions each."""
    scale: Literal[1, 2, 3, 4] = 2
    """How many times larger the result is; with 1, the network restores images at their size."""
    channels: int = 3
    """Channels of the images."""
    patch: Literal[1, 2] = 1
    """2: the convolutions compute at half the image's resolution, with its four phases as
    channels: four times less work, seeing twice as far."""

    def __post_init__(self):
        check_numbers(self, "width", "blocks", "channels")
        check_choice(self, "scale", 1, 2, 3, 4)
        check_choice(self, "patch", 1, 2)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return self.patch

    def setup(self):
        self.input = Conv(self.width, kernel_init=for_linear)
        self.body = [ResidualBlock(self.width) for _ in range(self.blocks)]
        self.output = Conv(
            self.channels * (self.patch * self.scale) ** 2, kernel_init=nn.initializers.zeros
        )
        self.enlarge = Enlarge(self.scale)

    def encode(self, images):
        patches = split_phases(images, self.patch)
        codes = self.input(patches)
        for block in self.body:
            codes = block(codes)
        # The decoder interpolates the image, which it has from the code.
        return jnp.concatenate([codes, patches], axis=3)

    def decode(self, codes):
        codes, patches = jnp.split(codes, [self.width], axis=3)
        images = self.enlarge(merge_phases(patches, self.patch))
        return images + merge_phases(self.output(codes), self.patch * self.scale)
