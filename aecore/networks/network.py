"""A trained network as pure functions of its parameters, on `(B, H, W, C)` float32 in [0, 1]."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aecore.networks import masking, receptive_field
from aecore.networks.receptive_field import ReceptiveField

_CHECKED_BLOCKS = (3, 2)
"""Height and width, in blocks of the stride, of the image with which masking is checked."""


class Network(Protocol):
    """A trained network without its parameters, whether a Linen module or from a file.

    It maps `(B, H, W, C)` images to `(B, s H, s W, C)`, float32.
    """

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
        """s: how many times larger the images come out."""
        ...

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """The restored images."""
        ...

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """Codes of images."""
        ...

    def decode(self, params: Any, codes: jax.Array) -> jax.Array:
        """Images of codes."""
        ...

    def apply_within(self, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """Restores images of several sizes in arrays of one size.

        Image i fills the first `sizes[i]` rows and columns of its array; `sizes` is `(B, 2)` int32,
        multiples of the stride. Each is restored as if its array ended there; the rest of the
        result is undefined.
        """
        ...

    def receptive_field(self, params: Any) -> ReceptiveField | None:
        """How far an output pixel sees; None: over the whole image."""
        ...


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Linen module with `encode`, `decode`, `channels` and `stride`, as a `Network`."""

    model: Any

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
        return getattr(self.model, "scale", 1)  # A module of one's own may leave it out.

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        return self.model.apply({"params": params}, images)

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        return self.model.apply({"params": params}, images, method="encode")

    def decode(self, params: Any, codes: jax.Array) -> jax.Array:
        return self.model.apply({"params": params}, codes, method="decode")

    def apply_within(self, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        return masking.apply_within(self.model, params, images, sizes)

    def receptive_field(self, params: Any) -> ReceptiveField | None:
        return receptive_field.measure(
            self.apply, params, channels=self.channels, stride=self.stride
        )


def in_precision(apply, dtype: Any):
    """A function `(params, images) -> images` computed in `dtype`, from and to float32.

    The parameters that go in stay as they are.
    """

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    @functools.wraps(apply)
    def function(params, images, *args):
        return apply(cast(params, dtype), images.astype(dtype), *args).astype(jnp.float32)

    return function


def fits_within(network: Network, params: Any) -> bool:
    """Whether `apply_within` does what it says for this network, tried with a random image."""
    size = tuple(count * network.stride for count in _CHECKED_BLOCKS)
    images = np.random.default_rng(0).random((1, *size, network.channels), np.float32)
    larger = np.pad(images, [(0, 0), *[(0, network.stride)] * 2, (0, 0)])

    @jax.jit
    def difference(params, images, larger):
        alone = network.apply(params, images)
        within = network.apply_within(params, larger, jnp.array([size], jnp.int32))
        return jnp.abs(within[:, : size[0], : size[1]] - alone).max(), jnp.abs(alone).max()

    with jax.default_matmul_precision("highest"):
        apart, largest = jax.device_get(difference(params, images, larger))
    return bool(apart <= 1e-5 * max(1.0, largest))
