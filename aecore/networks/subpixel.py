"""A network that computes at half the resolution."""

import flax.linen as nn
import jax.numpy as jnp

from aecore.networks.base import Autoencoder, check_choice, check_numbers, register
from aecore.networks.layers import Conv, for_relu
from aecore.networks.lowering.operations import relu
from aecore.networks.lowering.phases import merge_phases, split_phases


@register
class SubpixelAutoencoder(Autoencoder):
    """Convolutions at half the resolution, from and to the image's four phases.

    The four pixels of each 2×2 block become the channels of one pixel, as in sub-pixel convolutions
    (Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network", CVPR 2016) and FFDNet (Zhang et al., IEEE Transactions on Image
    Processing 27, 2018). Nothing is thrown away, and no layer computes at full resolution. With the
    default features, it has fewer parameters than `NoiseReducer` for one channel: 3,130.
    """

    features: tuple[int, ...] = (16, 14)
    """Features of the layers before the last one."""
    channels: int = 1
    """Channels of the images."""
    residual: bool = False
    """True: the output is the image plus a correction by a linear layer, which starts at zero.
    False: it is a sigmoid."""

    def __post_init__(self):
        check_numbers(self, "features", "channels")
        check_choice(self, "residual", True, False)
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2

    def setup(self):
        glorot = nn.initializers.glorot_uniform()
        hidden, last = (for_relu, nn.initializers.zeros) if self.residual else (glorot, glorot)
        self.encoder = [
            Conv(f, activation=relu, kernel_init=hidden, batch_last=True) for f in self.features
        ]
        self.output = Conv(
            4 * self.channels,
            activation=None if self.residual else nn.sigmoid,
            kernel_init=last,
            batch_last=True,
        )

    def encode(self, images):
        phases = split_phases(images)
        codes = phases
        for layer in self.encoder:
            codes = layer(codes)
        # The decoder adds its correction to the image, which it has from the code alone.
        return jnp.concatenate([codes, phases], axis=3) if self.residual else codes

    def decode(self, codes):
        codes, phases = jnp.split(codes, [self.features[-1]], axis=3)
        output = self.output(codes)
        return merge_phases(output + phases if self.residual else output)
