"""A linear network, whose codes are those of principal component analysis."""

import flax.linen as nn

from aecore.networks.base import Autoencoder, check_numbers, register


@register
class LinearAutoencoder(Autoencoder):
    """A linear map of each square patch to a code, and a linear map back, with biases.

    Trained with MSE on undegraded images, its codes span the same space as the first principal
    components (Baldi and Hornik, "Neural networks and principal component analysis", Neural
    Networks 2, 1989).
    """

    components: int = 32
    """Numbers in the code of a patch."""
    patch: int = 28
    """Side of a patch in pixels; patches don't overlap."""
    channels: int = 1
    """Channels of the images."""

    def __post_init__(self):
        check_numbers(self, "components", "patch", "channels")
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
