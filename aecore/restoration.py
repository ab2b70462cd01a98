"""A checkpoint in, a function on images out."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from aecore import checkpoint, config, images
from aecore.errors import CheckpointError, ConfigError, ImageError
from aecore.state import abstract_params

_BATCH = 64
"""Images that are restored at a time, so that device memory doesn't grow with their number."""


class Restorer:
    """Restores images with a trained network; compiles once for each shape it meets.

    Args:
      model: a Linen module with `encode`, `decode`, `channels` and `stride`.
      params: its parameters.
      description: what the checkpoint said of itself.
    """

    def __init__(self, model: Any, params: Any, description: Mapping[str, Any]):
        self.model = model
        self.params = params
        self.description = description

        def compiled(method):
            return jax.jit(
                lambda params, batch: model.apply({"params": params}, batch, method=method)
            )

        self._restore, self._encode, self._decode = map(compiled, ("__call__", "encode", "decode"))

    @classmethod
    def load(cls, run: str | os.PathLike, *, model: Any = None) -> "Restorer":
        """Loads a run's best checkpoint, on the default device.

        Args:
          run: a run directory, local or `gs://`.
          model: needed if the checkpoint's model is not in `aecore.models.REGISTRY`.

        Raises:
          CheckpointError: there is no usable checkpoint, or its model is unknown.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def build_model(description):
            try:
                return config.model_from_json(description) if model is None else model
            except ConfigError as error:
                raise CheckpointError(f"{run}: {error}") from error

        def abstract(description):
            shape = (*description["image_size"], description["channels"])
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                abstract_params(build_model(description), shape),
            )

        params, description = checkpoint.load(run, abstract)
        return cls(build_model(description), params, description)

    def __call__(self, image: Any) -> Any:
        """Restores an image, or several.

        Args:
          image: an array `(H, W)`, `(H, W, C)` or `(N, H, W, C)`, uint8, uint16 or float in
            [0, 1]; a Pillow image of mode L, RGB or I;16; or a path to a picture. Sides that are
            not multiples of the network's stride are extended by reflection, and the result is
            cropped.

        Returns:
          The same kind, dtype and shape (for a path, a Pillow image), rounded and clipped to what
          the dtype can hold; floats are clipped to [0, 1].

        Raises:
          ImageError: the picture can't be read; or its dtype, shape, values or number of channels
            don't fit.
        """
        array = _to_array(image)
        batch = self._to_batch(array)
        height, width = batch.shape[1:3]
        restored = self._in_parts(self._restore, self._pad(batch))[:, :height, :width]
        result = _from_float(restored.reshape(array.shape), array.dtype)
        is_picture = images.is_picture(image) or isinstance(image, (str, os.PathLike))
        return images.from_array(result) if is_picture else result

    def encode(self, image: Any) -> np.ndarray:
        """The codes `(N, h, w, K)` float32 of images, which are given as for calling.

        N is 1 for a single image; h and w are the sides divided by the stride, rounded up.
        """
        return self._in_parts(self._encode, self._pad(self._to_batch(_to_array(image))))

    def decode(self, codes: Any) -> np.ndarray:
        """The images `(N, H, W, C)` of codes `(N, h, w, K)`, float32 clipped to [0, 1]."""
        codes = np.asarray(codes, np.float32)
        if codes.ndim != 4 or codes.size == 0:
            raise ImageError(f"an array of shape {codes.shape} holds no codes; use (N, h, w, K)")
        return np.clip(self._in_parts(self._decode, codes), 0, 1)

    def _to_batch(self, array: np.ndarray) -> np.ndarray:
        """`(H, W)`, `(H, W, C)` or `(N, H, W, C)` to `(N, H, W, C)` float32 in [0, 1]."""
        if array.ndim not in (2, 3, 4) or array.size == 0:
            raise ImageError(
                f"an array of shape {array.shape} is no image; use (H, W), (H, W, C), (N, H, W, C)"
            )
        batch = _to_float(array)
        if batch.ndim == 2:
            batch = batch[..., None]
        if batch.ndim == 3:
            batch = batch[None]
        if batch.shape[3] != self.model.channels:
            raise ImageError(
                f"the image has {batch.shape[3]} channel{'s' * (batch.shape[3] != 1)}, the model "
                f"{type(self.model).__name__} takes {self.model.channels}; convert the image "
                f"(of shape {array.shape}; several gray ones are (N, H, W, 1))"
            )
        return batch

    def _pad(self, batch: np.ndarray) -> np.ndarray:
        """Extends H and W by reflection to multiples of the network's stride."""
        sides = [(0, -size % self.model.stride) for size in batch.shape[1:3]]
        return np.pad(batch, [(0, 0), *sides, (0, 0)], mode="reflect")

    def _in_parts(
        self, function: Callable[[Any, np.ndarray], jax.Array], batch: np.ndarray
    ) -> np.ndarray:
        """Applies a compiled function to some images at a time."""
        parts = []
        for start in range(0, len(batch), _BATCH):
            part = batch[start : start + _BATCH]
            count = len(part)
            if start and count < _BATCH:
                # Filled up, as another size would be compiled anew.
                part = np.pad(part, [(0, _BATCH - count), (0, 0), (0, 0), (0, 0)])
            parts.append(jax.device_get(function(self.params, jax.device_put(part)))[:count])
        return np.concatenate(parts)


def _to_array(image: Any) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        image = images.read(epath.Path(image))
    return images.to_array(image) if images.is_picture(image) else np.asarray(image)


def _to_float(array: np.ndarray) -> np.ndarray:
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.iinfo(array.dtype).max
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"dtype {array.dtype} is not supported; use uint8, uint16 or float")
    if np.isnan(array).any():
        raise ImageError("the image has values that are NaN; replace them")
    if not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(
            f"float images must lie in [0, 1], these in [{array.min():g}, {array.max():g}]; "
            "scale or clip them, or pass uint8"
        )
    return array.astype(np.float32)


def _from_float(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    array = np.clip(array, 0, 1)
    if np.issubdtype(dtype, np.floating):
        return array.astype(dtype)
    return np.rint(array * np.iinfo(dtype).max).astype(dtype)


def restore(image: Any, run: str | os.PathLike, *, model: Any = None) -> Any:
    """Restores an image with a trained run. To restore many, use a `Restorer`.

    Args:
      image: what `Restorer` takes.
      run: a run directory.
      model: needed if the checkpoint's model is not in `aecore.models.REGISTRY`.

    Returns:
      The same kind, dtype and shape; for a path, a Pillow image.

    Raises:
      CheckpointError: the run has no usable checkpoint.
      ImageError: the image can't be read, or doesn't fit the model.
    """
    return Restorer.load(run, model=model)(image)
