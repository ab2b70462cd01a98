"""How far a network sees: which input pixels a pixel of its output depends on.

This is measured rather than read off the layers: one input pixel is changed, and the outputs that
change with it are those that depend on it. All weights are positive then, so that nothing that goes
into an output cancels or is cut off by a ReLU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_LARGEST = 1024
"""Pixels on a side. A network that sees farther is taken to see the whole image."""

Apply = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """How far a network sees beyond a block of `stride` × `stride` pixels.

    The output of such a block, which is `scale` times as large, depends on the block itself and on
    this many input pixels around it: whole blocks, and the larger number of both axes.
    """

    before: int
    """Pixels above, or to the left."""
    after: int
    """Pixels below, or to the right."""


def measure(apply: Apply, params: Any, *, channels: int, stride: int) -> ReceptiveField | None:
    """Measures a network's receptive field.

    Args:
      apply: `(params, images) -> images`, `(B, H, W, C)` to `(B, s H, s W, C)`.
      params: only their shapes matter.
      channels: C.
      stride: H and W must be multiples of it.

    Returns:
      None if an output depends on the whole image, however large.
    """

    def reach(apply, weights, size):
        middle = size // 2 // stride * stride
        before = after = 0
        for axis in (0, 1):
            images = np.repeat(_strip(size, stride, channels, axis), 2, axis=0)
            # A view, whose first axis is the one along which the strip is long.
            np.moveaxis(images[1], axis, 0)[middle : middle + stride] += _CHANGE
            base, other = np.asarray(apply(weights, images))
            changed = _changed(base, other, axis) * size // base.shape[axis] // stride * stride
            if _at_border(changed, stride, size):
                return None
            # What the block reaches behind it is what an output sees before it, and conversely.
            before = max([before, *(changed - middle)])
            after = max([after, *(middle - changed)])
        return ReceptiveField(before=int(before), after=int(after))

    return _in_growing_images(apply, params, stride, reach)


def sizes(apply: Apply, params: Any, *, channels: int, stride: int, count: int) -> list[int | None]:
    """Measures how many rows of an image one output of each layer depends on.

    Args:
      apply: `(params, images) -> layers`, a list of `(B, h, w, K)`. Each h is a multiple of the
        number of blocks of `stride` rows in the images.
      params: only their shapes matter.
      channels: of the images.
      stride: of the network.
      count: how many layers there are.

    Returns:
      For each layer the rows, or None if it is all of them.
    """

    def heights(apply, weights, size):
        middle = size // 2 // stride * stride
        images = np.repeat(_strip(size, stride, channels, axis=0), stride + 1, axis=0)
        for row in range(stride):
            images[row + 1, middle + row] += _CHANGE
        found = []
        for layer in apply(weights, images):
            base, *others = np.asarray(layer)
            per_block = len(base) * stride // size
            # Rows that an output depends on, counted from the first row of the output's block.
            # Outputs at the same place in their blocks see the same.
            seen = {}
            for row, other in enumerate(others, start=middle):
                changed = _changed(base, other, axis=0)
                if _at_border(changed, 1, len(base)):
                    return None
                for output in changed:
                    block, place = divmod(output, per_block)
                    seen.setdefault(place, []).append(row - block * stride)
            found.append(int(max((max(rows) - min(rows) + 1 for rows in seen.values()), default=0)))
        return found

    return _in_growing_images(apply, params, stride, heights) or [None] * count


_CHANGE = 1e3
"""Large enough that the changed pixel is the largest of those that are pooled."""


def _in_growing_images(apply: Apply, params: Any, stride: int, look: Callable) -> Any:
    """What `look` finds in images that are large enough; in too small ones, it returns None."""
    # On a CPU if there is one: other devices are slow with 64 bits, or don't have them.
    with jax.enable_x64(True), jax.default_device(_cpu()):
        weights, apply = _positive(params), jax.jit(apply)
        # Few sizes, as compiling for each takes longer than computing.
        for size in (256, _LARGEST):
            found = look(apply, weights, -(-max(size, 8 * stride) // stride) * stride)
            if found is not None:
                return found
    return None


def _cpu() -> Any:
    """The first local CPU device, or None."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _strip(size: int, stride: int, channels: int, axis: int) -> np.ndarray:
    """A random image `(1, H, W, channels)` with `size` pixels along one axis.

    The other axis is short, since nothing is measured along it.
    """
    short = -(-min(size, max(16, 2 * stride)) // stride) * stride
    sides = (size, short) if axis == 0 else (short, size)
    return np.random.default_rng(0).uniform(0.5, 1.0, (1, *sides, channels))


def _changed(base: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
    """Where along an axis of `(H, W, C)` two activations differ by more than rounding."""
    difference = np.abs(other - base).max(axis=tuple({0, 1, 2} - {axis}))
    largest = np.abs(base).max() + np.abs(other).max()
    return np.flatnonzero(difference > 1e3 * np.finfo(base.dtype).eps * largest)


def _at_border(changed: np.ndarray, margin: int, size: int) -> bool:
    return bool(((changed < margin) | (changed >= size - margin)).any())


def _positive(params: Any) -> Any:
    """Positive weights of these shapes that keep the magnitude of activations."""
    random = np.random.default_rng(1)

    def weights(leaf):
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return random.uniform(0.5, 1.0, leaf.shape) / inputs

    return jax.tree.map(weights, params)
