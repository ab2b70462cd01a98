"""Images by index in, deterministic batches out.

Order and noise are functions of `(seed, epoch)` and `(seed, step)`, so that batches can start at
any step without reading what comes before it.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aecore.data.ops import TensorFlowOps
from aecore.data.tensorflow import import_tensorflow
from aecore.degradations import Degradation, augmentations


class Batch(NamedTuple):
    """What a training step learns from, both `(B, H, W, C)` float32 in [0, 1]."""

    degraded: np.ndarray
    original: np.ndarray


class EvaluationBatch(NamedTuple):
    """A batch of a fixed size, filled up with copies that do not count."""

    images: np.ndarray
    """`(B, H, W, C)` uint8."""
    indices: np.ndarray
    """`(B,)` int32 positions in the dataset."""
    count: int
    """How many of them, from the first, count."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` images: a permutation, `(count,)` int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def training_batches(
    array: np.ndarray,
    degradation: Degradation | None,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    share: slice = slice(None),
) -> Iterator[Batch | np.ndarray]:
    """Endless batches for steps `start_step`, `start_step + 1`, …

    An epoch is `len(array) // batch_size` steps in a fresh order; what is left over is left out.

    Args:
      array: `(N, H, W, C)` uint8.
      degradation: what is done to the images; None: nothing, and each batch is an array
        `(B, H, W, C)` of uint8.
      batch_size: images a batch, at most N.
      seed: of the order and of the noise, which is drawn anew at each step.
      start_step: the first batch's step. What comes before it is not read.
      flip: whether to mirror images at random before they are degraded, where they are.
      share: which images of each batch to make, without reading the others. They are the same
        images, with the same noise, as in the whole batch.
    """
    tf = import_tensorflow()
    steps_per_epoch = len(array) // batch_size
    first, last, _ = share.indices(batch_size)

    # Small batches are made several at once, as each element costs the pipeline a fixed time.
    group = min(max(1, 256 // (last - first)), 8)

    @functools.lru_cache(maxsize=4)  # Groups that are made at once may lie in two epochs.
    def order_of(epoch):
        return epoch_order(seed, epoch, len(array))

    def group_indices(first_step):
        rows = []
        for step in range(first_step, first_step + group):
            epoch, done = divmod(step, steps_per_epoch)
            rows.append(order_of(epoch)[done * batch_size : (done + 1) * batch_size][first:last])
        return np.concatenate(rows)

    if isinstance(array, np.memmap):

        def gather(indices):
            batch = tf.numpy_function(array.__getitem__, [indices], tf.uint8, stateful=False)
            return tf.ensure_shape(batch, (group * (last - first), *array.shape[1:]))
    else:
        tensor = tf.constant(array)

        def gather(indices):
            return tf.gather(tensor, indices)

    @tf.autograph.experimental.do_not_convert
    def make_group(first_step):
        indices = tf.numpy_function(group_indices, [first_step], tf.int64, stateful=False)
        indices = tf.ensure_shape(indices, (group * (last - first),))
        batches = tf.split(gather(indices), group)
        if degradation is None:
            return tuple((images,) for images in batches)
        return tuple(degrade(first_step + i, images) for i, images in enumerate(batches))

    def degrade(step, images):
        original = tf.cast(images, tf.float32) / 255.0
        ops = TensorFlowOps(tf.stack([tf.constant(seed, tf.int64), step]), first)
        if flip:
            original = augmentations.flip(original, ops)
        return degradation.apply(original, ops), original

    # Indices are batched first, so that each later stage is one operation on a whole batch.
    dataset = (
        tf.data.Dataset.range(start_step, np.iinfo(np.int64).max, group)
        .map(make_group, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(tf.data.AUTOTUNE)
    )
    for batches in dataset.as_numpy_iterator():
        for arrays in batches:
            yield arrays[0] if degradation is None else Batch(*arrays)


def evaluation_batches(array: np.ndarray, batch_size: int) -> Iterator[EvaluationBatch]:
    """Every image once, in order, in batches of one size."""
    for start in range(0, len(array), batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        count = min(batch_size, len(array) - start)
        indices[count:] = start
        yield EvaluationBatch(np.asarray(array[indices]), indices, count)
