"""Images of several sizes in arrays of one size, restored as if each array ended with its image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aecore.networks import layers


def apply_within(model: nn.Module, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Applies a network to images that fill only the first rows and columns of their arrays.

    The input of each layer that pads is set to zero outside the image, as its padding would be if
    the array ended there. This is exact for networks that look at neighbours only in convolutions
    padded with zeros and in pooling over blocks.

    Args:
      model: a network.
      params: its parameters.
      images: `(B, H, W, C)`.
      sizes: `(B, 2)` int32, the images' heights and widths, multiples of the model's stride.

    Returns:
      `(B, s H, s W, C)`; undefined outside the images.
    """

    def inside(array):
        within = True
        for axis in (1, 2):
            # An array, since the shape may be symbolic where the network is exported.
            scale = jnp.asarray(images.shape[axis] // array.shape[axis])
            shape = [-1 if i == axis else 1 for i in range(4)]
            place = scale * jnp.arange(array.shape[axis]).reshape(shape)
            within &= place < sizes[:, axis - 1].reshape(-1, 1, 1, 1)
        return jnp.where(within, array, 0)

    def intercept(function, args, kwargs, context):
        operation = layers.operation(context.module, context.method_name)
        if operation is not None and operation.pads:
            args = (inside(args[0]), *args[1:])
        return function(*args, **kwargs)

    with nn.intercept_methods(intercept):
        restored: Any = model.apply({"params": params}, images)
    return restored
