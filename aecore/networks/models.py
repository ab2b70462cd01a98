"""All networks that ship with aecore, and their registry.

Each is a Flax Linen module that maps `(B, H, W, C)` float32 in [0, 1] to `(B, s H, s W, C)`, where
s is 1 unless the network enlarges; see `base.Autoencoder` for what they have in common.
"""

from aecore.networks.base import REGISTRY, Autoencoder, hyperparameters, register
from aecore.networks.linear import LinearAutoencoder
from aecore.networks.recipes import NoiseReducer, ResolutionEnhancer
from aecore.networks.subpixel import SubpixelAutoencoder
from aecore.networks.unet import UNet
from aecore.networks.upscaler import Upscaler

__all__ = [
    "REGISTRY",
    "Autoencoder",
    "LinearAutoencoder",
    "NoiseReducer",
    "ResolutionEnhancer",
    "SubpixelAutoencoder",
    "UNet",
    "Upscaler",
    "hyperparameters",
    "register",
]
