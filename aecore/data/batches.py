"""Batches for training and for evaluation, of images that are read by index.

Order, crops and noise are functions of `(seed, epoch, index)` and `(seed, step)`, so that batches
can start at any step without reading what comes before it.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.data.crops import Crops
from aecore.data.indexed import Shape
from aecore.data.ops import TensorFlowOps
from aecore.data.tensorflow import Callbacks, import_tensorflow, untuned
from aecore.degradations import Degradation, augmentations

_AT_ONCE = min(16, os.cpu_count() or 1)
"""Groups of batches that are made at the same time; each occupies several cores where it can."""


class Batch(NamedTuple):
    """What a training step learns from: `(B, H, W, C)`, float32 in [0, 1].

    Of pairs that are not degraded further, uint8. The degraded images may be smaller than the
    originals by a whole factor. Before there are arrays, what is known of them.
    """

    degraded: Any
    original: Any


class EvaluationBatch(NamedTuple):
    """A batch of a fixed size, filled up with copies that are not counted."""

    images: np.ndarray
    """`(B, H, W, C)` uint8."""
    indices: np.ndarray
    """`(B,)` int32 positions in the dataset."""
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many of them, from the first, are counted."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` images: a permutation, `(count,)` int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def group_size(examples: np.ndarray | Crops, share: int) -> int:
    """How many batches are made, and sent to the devices, together.

    Small batches are, as each costs the pipeline and the loop a fixed time: enough for 256 images,
    at most 8. Crops may have to be decoded, and the first batch should not wait for those after it.

    Args:
      examples: what batches are made of.
      share: images of each batch that this process makes.
    """
    return 1 if isinstance(examples, Crops) else min(max(1, 256 // share), 8)


def training_batches(
    examples: np.ndarray | Crops,
    degradation: Degradation | None,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    share: slice = slice(None),
) -> Iterator[Any]:
    """Endless batches for steps `start_step`, `start_step + 1`, …

    An epoch is `len(examples) // batch_size` steps in a fresh order; what is left over is left out.

    Args:
      examples: `(N, H, W, C)` uint8 images, or crops.
      degradation: what is done to the images, or to the degraded ones of pairs; None: nothing.
      batch_size: examples a batch, at most N.
      seed: of the order, the crops, and the noise, which is drawn anew at each step.
      start_step: the first batch's step. What comes before it is not read.
      flip: whether to mirror images at random before they are degraded, where they are.
      share: which examples of each batch to make, without reading the others. They are the same
        images, with the same noise, as in the whole batch.

    Yields:
      Each step's `Batch`. Without a degradation, arrays `(B, H, W, C)` of uint8, or for pairs a
      `Batch` of such arrays.

    Raises:
      DataError: the pictures to crop are too small, or broken.
    """
    tf = import_tensorflow()
    steps_per_epoch = len(examples) // batch_size
    first, last, _ = share.indices(batch_size)
    group = group_size(examples, last - first)
    count = group * (last - first)

    @functools.lru_cache(maxsize=4)  # Groups that are made at once may lie in two epochs.
    def order_of(epoch):
        return epoch_order(seed, epoch, len(examples))

    def indices_of(step):
        epoch, done = divmod(step, steps_per_epoch)
        return order_of(epoch)[done * batch_size : (done + 1) * batch_size][first:last]

    def group_indices(first_step):
        return np.concatenate([indices_of(step) for step in range(first_step, first_step + group)])

    callbacks, failures = Callbacks(), []
    if isinstance(examples, Crops):
        # A group of crops is one batch. They are mirrored when they are read.
        def read(step):
            epoch = step // steps_per_epoch
            return examples.read(indices_of(step), seed=seed, epoch=epoch, flip=flip)

        shapes, gather = examples.shapes, _read(read, examples.shapes, count, callbacks, failures)
        degrade = _degrader(degradation, seed, first, flip=False)
    else:
        shapes, gather = (examples.shape[1:],), _gather(examples, group_indices, count, callbacks)
        degrade = _degrader(degradation, seed, first, flip)

    @tf.autograph.experimental.do_not_convert
    def make_group(first_step):
        images = [
            tf.split(tf.ensure_shape(values, (count, *shape)), group)
            for values, shape in zip(gather(first_step), shapes, strict=True)
        ]
        return tuple(
            degrade(first_step + i, *parts) for i, parts in enumerate(zip(*images, strict=True))
        )

    # Indices are batched first, so that each later stage is one operation on a whole batch.
    dataset = untuned(
        tf.data.Dataset.range(start_step, np.iinfo(np.int64).max, group)
        .map(make_group, num_parallel_calls=_AT_ONCE, deterministic=True)
        .prefetch(2)
    )
    batches = itertools.chain.from_iterable(dataset.as_numpy_iterator())
    try:
        for step, arrays in enumerate(batches, start_step):
            if failures:
                raise failures[0]
            if isinstance(examples, Crops) and step > start_step and step % steps_per_epoch == 0:
                examples.note_small()
            yield arrays[0] if len(arrays) == 1 else Batch(*arrays)
    finally:
        del batches  # It ends what calls them.
        callbacks.close()


def _read(
    read: Callable[[int], Sequence[np.ndarray]],
    shapes: Sequence[Shape],
    count: int,
    callbacks: Callbacks,
    failures: list[Exception],
) -> Callable:
    """`step -> [images, …]`, for tf.data, of `count` images each, or of black ones after a failure.

    Raised within tf.data, an error would be printed with a traceback, and become TensorFlow's own.
    """
    tf = import_tensorflow()

    def read_or_note(step):
        try:
            return read(step)
        except Exception as error:
            failures.append(error)
            return [np.zeros((count, *shape), np.uint8) for shape in shapes]

    return callbacks.add(read_or_note, [tf.uint8] * len(shapes))


def _gather(
    array: np.ndarray,
    indices_of: Callable[[Any], np.ndarray],
    count: int,
    callbacks: Callbacks,
) -> Callable:
    """`first step -> [images]`, for tf.data, of `count` images that are in memory or in a file."""
    tf = import_tensorflow()
    indices_at = callbacks.add(indices_of, tf.int64)
    if isinstance(array, np.memmap):
        images_at = callbacks.add(array.__getitem__, tf.uint8)
    else:
        images_at = functools.partial(tf.gather, tf.constant(array))

    def gather(first_step):
        return [images_at(tf.ensure_shape(indices_at(first_step), (count,)))]

    return gather


def _degrader(degradation: Degradation | None, seed: int, first: int, flip: bool) -> Callable:
    """`(step, images, …) -> (degraded, original)`, for tf.data; without a degradation, as they are.

    Args:
      degradation: what is done to the first of the images; the last are the originals.
      seed: of the noise, with the step.
      first: the place that the first image has in its whole batch.
      flip: whether to mirror images at random before.
    """
    tf = import_tensorflow()

    def degrade(step, *images):
        if degradation is None:
            return images
        degraded, original = (tf.cast(images[i], tf.float32) / 255.0 for i in (0, -1))
        ops = TensorFlowOps(tf.stack([tf.constant(seed, tf.int64), step]), first)
        if flip:
            degraded = original = augmentations.flip(original, ops)
        return degradation.apply(degraded, ops), original

    return degrade


def evaluation_batches(array: np.ndarray, batch_size: int) -> Iterator[EvaluationBatch]:
    """Every image once, in order, in batches of one size."""
    for start in range(0, len(array), batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        count = min(batch_size, len(array) - start)
        indices[count:] = start
        yield EvaluationBatch(np.asarray(array[indices]), indices, count)
