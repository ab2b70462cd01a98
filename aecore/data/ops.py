"""TensorFlow's implementation of what degradations are written in, so that they run in tf.data."""

from typing import Any

import numpy as np

from aecore.data.tensorflow import import_tensorflow
from aecore.degradations.base import mirrored, stream


class TensorFlowOps:
    """`aecore.degradations.Ops` for TensorFlow.

    The values drawn for an image depend on the seed and on the image's place in the batch alone.

    Args:
      seed: `(2,)` int64.
      first: place of the first of these images, if they are a later part of a batch.
      path: what comes before the names of random streams.
    """

    def __init__(self, seed, first: int = 0, path: str = ""):
        self.xp: Any = import_tensorflow()
        self._seed = seed
        self._first = first
        self._path = path

    def within(self, name):
        return TensorFlowOps(self._seed, self._first, f"{self._path}{name}/")

    def _seed_of(self, name):
        number = self.xp.constant(stream(self._path + name), self.xp.int64)
        return self.xp.random.experimental.stateless_fold_in(self._seed, number)

    def einsum(self, equation, *operands):
        return self.xp.einsum(equation, *operands)

    def convolve(self, images, kernels):
        tf = self.xp
        count, height, width, channels = images.shape
        side = kernels.shape[1]
        padded = tf.gather(images, mirrored(height, side // 2), axis=1)
        padded = tf.gather(padded, mirrored(width, side // 2), axis=2)
        # All images become channels of one, as channels may have kernels of their own.
        planes = tf.reshape(tf.transpose(padded, (1, 2, 0, 3)), (1, *padded.shape[1:3], -1))
        kernels = tf.broadcast_to(kernels, (count, side, side))
        kernels = tf.repeat(tf.transpose(kernels, (1, 2, 0)), channels, axis=-1)[..., None]
        planes = tf.nn.depthwise_conv2d(planes, kernels, (1, 1, 1, 1), "VALID")
        return tf.transpose(tf.reshape(planes, (height, width, count, channels)), (2, 0, 1, 3))

    def normal(self, name, images):
        return self._draw(name, self.xp.raw_ops.StatelessRandomNormalV2, images.shape)

    def uniform(self, name, images, low, high):
        shape = (images.shape[0], 1, 1, 1)
        values = self._draw(name, self.xp.raw_ops.StatelessRandomUniformV2, shape)
        return low + (high - low) * values

    def uniform_values(self, name, images):
        return self._draw(name, self.xp.raw_ops.StatelessRandomUniformV2, images.shape)

    def poisson(self, name, means):
        # A count takes as many random numbers as its mean asks for, so each image has its own seed.
        tf, seed = self.xp, self._seed_of(name)

        def of_image(values):
            place, image_means = values
            key = tf.random.experimental.stateless_fold_in(seed, place)
            return tf.random.stateless_poisson(image_means.shape, key, image_means, tf.float32)

        places = tf.range(self._first, self._first + means.shape[0])
        counts = tf.map_fn(of_image, (places, means), fn_output_signature=tf.float32)
        return tf.ensure_shape(counts, means.shape)

    def _draw(self, name, operation, shape):
        """Values for the images from `first` on; those before them are not drawn."""
        key, counter = self.xp.raw_ops.StatelessRandomGetKeyCounter(seed=self._seed_of(name))
        # Philox makes four values per count.
        size = int(np.prod(shape))
        count, skipped = divmod(self._first * (size // shape[0]), 4)
        values = operation(
            shape=[skipped + size],
            key=key,
            counter=counter + self.xp.constant([count, 0], self.xp.uint64),
            alg=1,
        )
        return self.xp.reshape(values[skipped:], shape)
