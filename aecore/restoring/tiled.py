"""A network as a pure function that needs little memory, however large the pictures are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aecore.networks.network import Network
from aecore.restoring import tiling
from aecore.restoring.tiling import Span
from aecore.steps.step import Apply

_TILE = 1536
"""The largest side of tiles.

On 2 cores, `photo-denoise` restores 12 megapixels in 18.9 s and 0.24 GiB so, and whole in 17.4 s
and 1.8 GiB; `photo-upscale-2x` 6 megapixels in 34 s and 1.1 GiB, and whole in 31 s and 5.4 GiB."""


def in_tiles(network: Network, tile: int = _TILE) -> Apply:
    """The network's `apply`, which restores large pictures tile after tile.

    Results are those of the whole picture but for rounding. Pictures of up to twice a tile's
    pixels are restored at once, and so are those of a network that sees the whole picture.

    Args:
      network: what restores.
      tile: the largest side of tiles in pixels of the network's input, unless it sees so far that
        they must be larger.

    Returns:
      `(params, (B, H, W, C)) -> (B, s H, s W, C)`, to be compiled; s is the network's scale. Not
      for a `shard_map` that checks what varies.
    """

    field, is_measured = None, False

    def apply(params: Any, images: jax.Array) -> jax.Array:
        nonlocal field, is_measured
        _, height, width, _ = images.shape
        if height * width <= 2 * tile**2:
            return network.apply(params, images)
        if not is_measured:  # It takes seconds.
            with jax.ensure_compile_time_eval():  # It is a number, not part of a program.
                field, is_measured = network.receptive_field(params), True
        if field is None:
            return network.apply(params, images)
        sides = tiling.tile_for((height, width), tile, field, network.stride)
        windows = tiling.windows((height, width), sides, field, network.stride)
        rows = _places([window.rows for window in windows])
        columns = _places([window.columns for window in windows])
        return _one_by_one(network, params, images, sides, np.stack([rows, columns], axis=-1))

    return apply


def _places(spans: Sequence[Span]) -> np.ndarray:
    """Where each span starts, and where what is kept of it starts and ends within it: `(N, 3)`."""
    return np.array(
        [(span.start, span.first - span.start, span.last - span.start) for span in spans], np.int32
    )


def _one_by_one(
    network: Network, params: Any, images: jax.Array, sides: tuple[int, int], places: np.ndarray
) -> jax.Array:
    """Restores the windows of a size at `(N, 3, 2)` places, as of `_places` along both axes."""
    scale, (count, height, width, channels) = network.scale, images.shape
    rows, columns = (np.arange(scale * side) for side in sides)

    def add(restored, place):
        (top, left), (first_row, first_column), (last_row, last_column) = place
        part = jax.lax.dynamic_slice(images, (0, top, left, 0), (count, *sides, channels))
        part = network.apply(params, part)
        is_kept = ((rows >= scale * first_row) & (rows < scale * last_row))[:, None] & (
            (columns >= scale * first_column) & (columns < scale * last_column)
        )
        corner = (0, scale * top, scale * left, 0)
        before = jax.lax.dynamic_slice(restored, corner, part.shape)
        part = jnp.where(is_kept[:, :, None], part, before)
        return jax.lax.dynamic_update_slice(restored, part, corner), None

    restored = jnp.zeros((count, scale * height, scale * width, channels), images.dtype)
    return jax.lax.scan(add, restored, places)[0]
