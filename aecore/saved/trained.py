"""A trained network as one object, wherever it comes from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aecore.networks.network import LinenNetwork, Network
from aecore.saved.descriptions import Description


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """All that is needed to restore images, from a run, an exported file or shipped weights."""

    network: Network
    params: Any
    """The network's parameters, float32 or bfloat16 arrays in nested dictionaries."""
    description: Description = dataclasses.field(default_factory=Description)
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What people should know of weights that ship with aecore; see `weights.Card`."""

    @classmethod
    def of(cls, model: Any, params: Any) -> "TrainedNetwork":
        """A Linen module and its parameters, of which nothing else is known."""
        return cls(LinenNetwork(model), params)
