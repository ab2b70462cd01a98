"""A trained network as pure functions of its parameters.

Images are float32 in [0, 1], `(B, H, W, C)` where they go in and `(B, s H, s W, C)` where they come
out, s being the network's scale: 1 unless the network enlarges images.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aecore.errors import ConfigError
from aecore.networks import receptive_field
from aecore.networks.receptive_field import ReceptiveField

Precision = Literal["float32", "bfloat16"]

_CHECKED_BLOCKS = (3, 2)
"""Height and width, in blocks of the stride, of the image with which masking is checked."""


class Network(Protocol):
    """What a `Restorer` needs, whether the network is a Linen module or comes from a file."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def channels(self) -> int:
        """C."""
        ...

    @property
    def stride(self) -> int:
        """H and W must be multiples of it."""
        ...

    @property
    def scale(self) -> int:
        """s, how many times larger the results are than the images."""
        ...

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """The restored images, `(B, s H, s W, C)`."""
        ...

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """The codes of images."""
        ...

    def decode(self, params: Any, codes: jax.Array) -> jax.Array:
        """The restored images of codes."""
        ...

    def apply_within(self, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """As `apply`, where image i fills only the first `sizes[i]` rows and columns of its array.

        Each is restored as if it had been alone in an array of its own size, to the first
        `s sizes[i]` rows and columns of the result; the rest is undefined. `sizes` is `(B, 2)`
        int32, multiples of the stride.
        """
        ...

    def receptive_field(self, params: Any) -> ReceptiveField | None:
        """How far an output sees; None if over the whole image."""
        ...

    def in_precision(self, precision: Precision) -> "Network":
        """The network whose layers compute in this; what goes in and comes out is float32.

        The functions of a file compute as they were exported, and stay as they are.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LinenNetwork:
    """A Linen module as a `Network`.

    It needs `encode`, `decode`, `__call__`, `channels` and `stride`, as `base.Autoencoder`
    describes them, and computes with its parameters alone.

    Raises:
      ConfigError: it is no such module; or, when it computes, these are not its parameters.
    """

    model: Any
    precision: Precision = "float32"
    """In which layers compute. Their parameters are cast to it, and so is what each layer takes.
    The images aren't: what a residual network adds its correction to keeps all of its bits."""

    def __post_init__(self):
        from aecore.networks import base  # Flax; exported files do without.

        base.check_module(self.model)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def channels(self) -> int:
        return self.model.channels

    @property
    def stride(self) -> int:
        return self.model.stride

    @property
    def scale(self) -> int:
        # A module that doesn't inherit from Autoencoder may do without.
        return getattr(self.model, "scale", 1)

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        return self._compute(self.model.apply, params, images)

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        return self._compute(self.model.apply, params, images, method="encode")

    def decode(self, params: Any, codes: jax.Array) -> jax.Array:
        return self._compute(self.model.apply, params, codes, method="decode")

    def apply_within(self, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        from aecore.networks import masking

        return self._compute(
            lambda variables, images: masking.apply_within(
                self.model, variables["params"], images, sizes
            ),
            params,
            images,
        )

    def in_precision(self, precision: Precision) -> "LinenNetwork":
        return dataclasses.replace(self, precision=precision)

    def _compute(self, function: Callable, params: Any, images: jax.Array, **kwargs) -> jax.Array:
        from flax.errors import FlaxError

        try:
            return self._in_precision(function, params, images, **kwargs)
        except FlaxError as error:
            reason = str(error).split(" (https://")[0].rstrip(".")
            raise ConfigError(
                f"{self.name} can't compute with these parameters alone: {reason}; they must be "
                "the `params` of what its init gives"
            ) from error

    def _in_precision(
        self, function: Callable, params: Any, images: jax.Array, **kwargs
    ) -> jax.Array:
        if self.precision == "float32":
            return function({"params": params}, images, **kwargs)
        from aecore.networks import layers

        dtype = jnp.dtype(self.precision)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        with layers.taking(dtype):
            return function({"params": params}, images, **kwargs).astype(jnp.float32)

    def receptive_field(self, params: Any) -> ReceptiveField | None:
        return receptive_field.measure(
            self.apply, params, channels=self.channels, stride=self.stride
        )


def fits_within(network: Network, params: Any) -> bool:
    """Whether `apply_within` keeps its promise for this network, tried with a random image."""
    height, width = (count * network.stride for count in _CHECKED_BLOCKS)
    images = np.random.default_rng(0).random((1, height, width, network.channels), np.float32)
    larger = np.pad(images, [(0, 0), *[(0, network.stride)] * 2, (0, 0)])

    @jax.jit
    def difference(params, images, larger):
        alone = network.apply(params, images)
        within = network.apply_within(params, larger, jnp.array([[height, width]], jnp.int32))
        within = within[:, : alone.shape[1], : alone.shape[2]]
        return jnp.abs(within - alone).max(), jnp.abs(alone).max()

    with jax.default_matmul_precision("highest"):
        apart, largest = jax.device_get(difference(params, images, larger))
    return bool(apart <= 1e-5 * max(1.0, largest))
