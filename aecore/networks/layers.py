"""What a layer says of itself, for masking, summaries and receptive fields."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a method of a layer does with its first argument, `(B, H, W, C)`."""

    pads: bool = False
    """Whether it looks at neighbouring pixels, with zeros beyond the end of the array."""
    gives_phases: bool = False
    """Whether it returns the four phases of an image of twice the size."""
    multiplies_inputs: bool = False
    """Whether the kernel is multiplied with each input pixel, rather than once per output pixel."""


class Layer(nn.Module):
    """Base of layers that compute by several methods."""

    operations: ClassVar[Mapping[str, Operation]]
    """By the names of the methods that are called from outside."""


# A user's network may also use these of Flax.
_CONVOLUTIONS = {
    nn.Conv: Operation(pads=True),
    nn.ConvTranspose: Operation(pads=True, multiplies_inputs=True),
}


def operation(module: nn.Module, method: str) -> Operation | None:
    """What a method of a module does; None if the module isn't a layer that is known."""
    if isinstance(module, Layer):
        return module.operations.get(method)
    if method == "__call__":
        return next((o for kind, o in _CONVOLUTIONS.items() if isinstance(module, kind)), None)
    return None
