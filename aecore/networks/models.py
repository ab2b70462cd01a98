"""All networks that ship with aecore, and their registry.

Each is a Flax Linen module that maps `(B, H, W, C)` float32 in [0, 1] to images of the same shape;
see `base.Autoencoder` for what they have in common.
"""

from aecore.networks.base import REGISTRY, Autoencoder, hyperparameters, register
from aecore.networks.linear import LinearAutoencoder
from aecore.networks.recipes import NoiseReducer, ResolutionEnhancer
from aecore.networks.subpixel import SubpixelAutoencoder
from aecore.networks.unet import UNet

__all__ = [
    "REGISTRY",
    "Autoencoder",
    "LinearAutoencoder",
    "NoiseReducer",
    "ResolutionEnhancer",
    "SubpixelAutoencoder",
    "UNet",
    "hyperparameters",
    "register",
]
