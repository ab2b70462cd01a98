"""Networks on images that are smaller than the arrays that hold them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aecore.networks.layers import looks_around


def apply_within(model: Any, params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """A network on images that fill only the first rows and columns of their arrays.

    What goes into each layer that looks at neighbouring pixels (`layers.looks_around`) is set to
    zero outside the image, as if the array ended there and were padded. This is exact for networks
    whose only such layers are convolutions that pad with zeros, aecore's (`layers.Layer`) or
    Flax's, and that pool over blocks. `network.fits_within` tries whether it is for a network.

    Args:
      model: a network.
      params: its parameters.
      images: `(B, H, W, C)`.
      sizes: `(B, 2)` int32, the images' heights and widths, multiples of the model's stride.

    Returns:
      `(B, s H, s W, C)`, s being the model's scale; undefined outside the images.
    """

    def inside(array):
        within = jnp.array(True)
        for axis in (1, 2):
            shape = [-1 if i == axis else 1 for i in range(4)]
            place = jnp.arange(array.shape[axis]).reshape(shape)
            size = sizes[:, axis - 1].reshape(-1, 1, 1, 1)
            # Not Python numbers, since they may be symbolic where the network is exported.
            side, whole = jnp.asarray(array.shape[axis]), jnp.asarray(images.shape[axis])
            coarser, finer = jnp.maximum(whole // side, 1), jnp.maximum(side // whole, 1)
            within &= coarser * place < finer * size
        return jnp.where(within, array, 0)

    def intercept(function, args, kwargs, context):
        if context.method_name == "__call__" and looks_around(context.module):
            first, *others = args
            args = (inside(first), *others)
        return function(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, images)
