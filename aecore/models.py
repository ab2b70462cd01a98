"""The networks that ship with aecore, under their public names; they live in `aecore.networks`."""

from aecore.networks.models import (
    REGISTRY,
    Autoencoder,
    LinearAutoencoder,
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
    Upscaler,
    register,
)

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
