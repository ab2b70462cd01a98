"""Arrays of NumPy, JAX, PyTorch and TensorFlow, to NumPy and back to their own kind.

PyTorch and TensorFlow are never imported here: whoever has a tensor has imported its library. On
CPUs, NumPy arrays and PyTorch tensors share their memory.
"""

import sys
from typing import Any

import jax
import numpy as np
from jax import core

from aecore.errors import ImageError

FLOATS = "float16, float32 or float64"


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_tensorflow(value: Any) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    # While a thread still imports it, it has no tensors.
    is_tensor = getattr(tensorflow, "is_tensor", None)
    return is_tensor is not None and is_tensor(value)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any kind as NumPy's. Of a tensor that requires gradients, the values are taken.

    Raises:
      ImageError: it is no array of numbers, is masked, or has no values yet, as within `jax.jit`,
        `tf.function` and the functions of `tf.data`.
    """
    if isinstance(value, core.Tracer):
        raise ImageError(
            "arrays can't be restored within jit, vmap or grad; use restorer.apply there"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise ImageError("masked arrays are not supported; fill them first, as by filled(0)")
    if _is_tensorflow(value) and not hasattr(value, "numpy"):
        raise ImageError(
            "tensors have no values within tf.function and tf.data; use "
            "tf.numpy_function(restorer, [images], images.dtype) there"
        )
    if "bfloat16" in str(getattr(value, "dtype", "")):
        raise ImageError(f"dtype bfloat16 is not supported; use {FLOATS}")
    try:
        array = np.asarray(value.detach().cpu() if _is_torch(value) else value)
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(value, (list, tuple)):
            shapes = {getattr(item, "shape", None) for item in value}
            if len(shapes) > 1 and None not in shapes:
                raise ImageError(
                    "the images differ in size; restore them one by one, as with each"
                ) from error
        raise ImageError(f"not an array: {error}") from error
    if array.dtype.kind == "O":
        raise ImageError(
            f"{type(value).__name__} of objects is not an image; use an array of numbers, a Pillow "
            "image, or a path"
        )
    return array


def scalar(value: Any) -> Any:
    """A scalar of NumPy or JAX as Python's; all else as it is."""
    is_array = isinstance(value, (np.generic, np.ndarray, jax.Array))
    is_known = is_array and not isinstance(value, core.Tracer)
    return value.item() if is_known and value.ndim == 0 else value


def like(value: Any, array: np.ndarray) -> Any:
    """A NumPy array as the kind that `value` is, on the same device.

    If `value` is divided among devices, the array is divided like it; or lies whole on each of
    them, where its axes are others or can't be divided evenly.
    """
    if isinstance(value, jax.Array):
        return jax.device_put(array, _sharding_like(value, array.shape))
    if _is_torch(value):
        return sys.modules["torch"].from_numpy(array).to(value.device)
    if _is_tensorflow(value):
        tensorflow = sys.modules["tensorflow"]
        with tensorflow.device(value.device):
            return tensorflow.convert_to_tensor(array)
    return array


def _sharding_like(value: jax.Array, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    sharding = value.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    if value.ndim == len(shape):
        try:
            sharding.shard_shape(shape)
            return sharding
        except ValueError:  # An axis can't be divided.
            pass
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(), memory_kind=sharding.memory_kind
    )
