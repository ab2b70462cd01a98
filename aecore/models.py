"""The networks that ship with aecore, under their public names; they live in `aecore.networks`."""

from aecore.networks.base import REGISTRY, Autoencoder, register
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
    "register",
]
