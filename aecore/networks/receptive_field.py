"""How far a network sees: which input pixels a pixel of its output depends on.

It is measured, not read off the layers: with positive weights, nothing that goes into an output
cancels or is cut off by a ReLU, so that what changes with an input pixel is what depends on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_LARGEST = 1024
"""Pixels on a side; a network that sees farther is taken to see everything."""

Apply = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Of a block of `stride` × `stride` output pixels: how far its input reaches beyond it.

    In whole blocks; the larger of both axes.
    """

    before: int
    """Pixels above, or to the left."""
    after: int
    """Pixels below, or to the right."""


def measure(apply: Apply, params: Any, *, channels: int, stride: int) -> ReceptiveField | None:
    """Measures a network's receptive field.

    Args:
      apply: `(params, images) -> images`, on `(B, H, W, C)` images.
      params: of these, the shapes alone matter.
      channels: C.
      stride: of which H and W must be multiples.

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
            changed = _changed(base, other, axis) // stride * stride
            if _at_border(changed, stride, size):
                return None
            # What the block reaches behind it is what an output sees before it, and conversely.
            before = max([before, *(changed - middle)])
            after = max([after, *(middle - changed)])
        return ReceptiveField(before=int(before), after=int(after))

    return _in_growing_images(apply, params, stride, reach)


def sizes(apply: Apply, params: Any, *, channels: int, stride: int, count: int) -> list[int | None]:
    """Measures how high the part of an image is that one output of each layer depends on.

    Args:
      apply: `(params, images) -> layers`, a list of `(B, h, w, K)`, whose heights are the images'
        divided by divisors of the stride.
      params: of these, the shapes alone matter.
      channels: of the images.
      stride: of the network.
      count: of the layers.

    Returns:
      For each layer rows of the image, or None if it is all of them.
    """

    def heights(apply, weights, size):
        middle = size // 2 // stride * stride
        images = np.repeat(_strip(size, stride, channels, axis=0), stride + 1, axis=0)
        for row in range(stride):
            images[row + 1, middle + row] += _CHANGE
        found = []
        for layer in apply(weights, images):
            base, *others = np.asarray(layer)
            scale = size // base.shape[0]
            # Rows of the image that an output depends on, counted from where it is itself.
            seen = {}
            for row, other in enumerate(others, start=middle):
                changed = _changed(base, other, axis=0)
                if _at_border(changed, 1, len(base)):
                    return None
                for output in changed:
                    seen.setdefault(output * scale % stride, []).append(row - output * scale)
            found.append(int(max((max(rows) - min(rows) + 1 for rows in seen.values()), default=0)))
        return found

    return _in_growing_images(apply, params, stride, heights) or [None] * count


_CHANGE = 1e3
"""Large enough that a pixel becomes the largest of those that are pooled."""


def _in_growing_images(apply: Apply, params: Any, stride: int, look: Callable) -> Any:
    """What `look` finds in images large enough; it returns None where they are too small."""
    # Where there is a CPU, as 64 bits are slow elsewhere, or not to be had.
    with jax.enable_x64(True), jax.default_device(_cpu()):
        weights, apply = _positive(params), jax.jit(apply)
        # Each size is compiled anew, which takes longer than computing strips.
        for size in (256, _LARGEST):
            found = look(apply, weights, -(-max(size, 8 * stride) // stride) * stride)
            if found is not None:
                return found
    return None


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _strip(size: int, stride: int, channels: int, axis: int) -> np.ndarray:
    """A random image `(1, H, W, channels)`, of which one side has `size` pixels.

    The other side is short: along it, nothing is looked for.
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
    """Weights of these shapes, all positive, with which activations keep their magnitude."""
    random = np.random.default_rng(1)

    def weights(leaf):
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return random.uniform(0.5, 1.0, leaf.shape) / inputs

    return jax.tree.map(weights, params)
