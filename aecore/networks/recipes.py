"""The networks of the two recipes, initialised as Keras does."""

import flax.linen as nn

from aecore.networks.base import Autoencoder, check_numbers, register
from aecore.networks.layers import (
    Conv,
    ConvOnPhases,
    ConvOnRepeated,
    ConvTranspose,
    ConvTransposeToPhases,
)
from aecore.networks.lowering.operations import max_pool, relu
from aecore.networks.lowering.phases import merge_phases


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
        check_numbers(self, "features", "channels")
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2 ** len(self.features)

    def setup(self):
        self.encoder = [
            Conv(features, stride=2, activation=relu, batch_last=True) for features in self.features
        ]
        first, *others = self.features
        # In phases, the widest activations need not be put together at full size.
        self.decoder = [
            *(ConvTranspose(f, activation=relu, batch_last=True) for f in reversed(others)),
            ConvTransposeToPhases(first, activation=relu),
        ]
        self.output = ConvOnPhases(self.channels, activation=nn.sigmoid)

    def encode(self, images):
        for layer in self.encoder:
            images = layer(images)
        return images

    def decode(self, codes):
        for layer in self.decoder:
            codes = layer(codes)
        return merge_phases(self.output(codes))


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
        check_numbers(self, "features", "channels")
        super().__post_init__()

    @property
    def stride(self) -> int:
        return 2

    def setup(self):
        self.encoder = [Conv(features, activation=relu) for features in self.features]
        # The second layer enlarges what the first one gives.
        kinds = [Conv, ConvOnRepeated, *[Conv] * len(self.features)]
        *decoder, output = zip(kinds, (*self.features[::-1], self.channels), strict=False)
        self.decoder = [kind(features, activation=relu) for kind, features in decoder]
        kind, channels = output
        self.output = kind(channels)

    def encode(self, images):
        *before, last = self.encoder
        for layer in before:
            images = layer(images)
        return last(max_pool(images))

    def decode(self, codes):
        for layer in self.decoder:
            codes = layer(codes)
        return self.output(codes)
