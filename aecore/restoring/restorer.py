"""A checkpoint in, a function on images out."""

import collections
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from aecore.errors import ImageError
from aecore.media import images
from aecore.networks.network import LinenNetwork
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring.engine import Engine
from aecore.restoring.tiling import Size
from aecore.saved.descriptions import Description

_log = logging.getLogger(__name__)


_ROUNDING = 1e-5
"""How far floats may lie outside [0, 1]."""


class Restorer:
    """Restores images with a trained network; keeps what it compiles; safe to use from threads.

    Args:
      model: a Linen module with `encode`, `decode`, `channels` and `stride`; or an
        `aecore.networks.Network`.
      params: its parameters.
      description: what the checkpoint said of itself.
      tile: `"auto"`, so that pictures too large to be restored at once are restored in tiles; 0
        for never; or the side of the tiles in pixels. The result is the same but for rounding.
      batch_size: most images at a time; None for as many as are worth it.
      precision: `"float32"`, `"bfloat16"`, or `"auto"` for bfloat16 on TPUs and else float32.
      device: a JAX device; None for the default one.

    Raises:
      ConfigError: a setting is out of bounds.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        description: Description,
        *,
        tile: Literal["auto"] | int = "auto",
        batch_size: int | None = None,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        device: jax.Device | None = None,
    ):
        self.model = model
        self.params = params
        self.description = description
        self.network = model if hasattr(model, "apply_within") else LinenNetwork(model)
        self._engine = Engine(
            self.network,
            params,
            tile=tile,
            batch_size=batch_size,
            precision=precision,
            device=device or jax.local_devices()[0],
        )
        self._said = set()

    @classmethod
    def load(cls, run: str | os.PathLike, *, model: Any = None, **settings: Any) -> "Restorer":
        """Loads a run's best checkpoint, an exported file, or weights that ship with aecore.

        Args:
          run: a run directory, local or `gs://`; a file that `aecore export` wrote; or one of
            `aecore.weights.NAMES`.
          model: needed if a run's model is not in `aecore.models.REGISTRY`.
          **settings: `tile`, `batch_size`, `precision`, `device`, as for the class.

        Raises:
          CheckpointError: there is nothing that can be used, or its model is unknown.
        """
        from aecore.saved import weights

        return cls(*weights.load(run, model=model), **settings)

    def __call__(self, image: Any) -> Any:
        """Restores an image, or several.

        A gray image is given to a network for colour as three equal channels, whose mean is taken;
        of a colour image, a network for gray restores each channel by itself. Sides that are not
        multiples of the network's stride are extended by reflection, and the result is cropped.

        Args:
          image: an array `(H, W)`, `(H, W, C)` or `(N, H, W, C)`, uint8, uint16 or float in
            [0, 1]; a Pillow image; or a path to a picture, of which the first frame is taken.

        Returns:
          The same kind, dtype, shape and mode (for a path, a Pillow image), rounded and clipped to
          what the dtype can hold; floats are clipped to [0, 1]. Alpha is left as it was. Of
          Pillow's modes, P becomes RGB or RGBA, and CMYK, YCbCr, LAB and HSV become RGB.

        Raises:
          ImageError: the picture can't be read; its dtype, shape, values or number of channels
            don't fit; or the device's memory doesn't suffice.
        """
        frame = self._frame(image)
        if frame is not None:
            restored = self(frame.values)
            return images.to_pillow(frame.replace(restored, frame.alpha))
        return next(self._restored([_checked(image)]))

    def each(
        self, arrays: Iterable[np.ndarray], shapes: Sequence[Size] = ()
    ) -> Iterator[np.ndarray]:
        """Restores images of different sizes; consecutive ones that share a shape are batched.

        Args:
          arrays: `(H, W)` or `(H, W, C)`, as for calling; taken as they are needed, some ahead.
          shapes: what `shared_shapes` gave for their sizes, where these are known. Images are
            batched best in the order of the smallest shape that contains them.

        Yields:
          The restored images, in order.

        Raises:
          ImageError: as for calling; the images before the one in question are yielded first.
        """

        def checked():
            for array in map(_checked, arrays):
                if array.ndim == 4:
                    raise ImageError(f"an array of shape {array.shape} is several images, not one")
                yield array

        return self._restored(checked(), shapes)

    def _restored(
        self, arrays: Iterable[np.ndarray], shapes: Sequence[Size] = ()
    ) -> Iterator[np.ndarray]:
        """Restores arrays that are each an image, or several."""
        under_way = collections.deque()

        def adapted():
            for array in arrays:
                parts = self._adapt(array)
                under_way.append((array, len(parts)))
                yield from parts

        restored = self._engine.run(adapted(), shapes)
        for first in restored:
            array, count = under_way.popleft()
            parts = [first, *(next(restored) for _ in range(count - 1))]
            result = parts[0] if count == 1 else np.concatenate(parts, axis=3)
            yield result.reshape(array.shape).astype(array.dtype, copy=False)

    def shared_shapes(self, sizes: Iterable[Size]) -> list[Size]:
        """Few shapes, of which each image, or each of its tiles, fits into one.

        Args:
          sizes: height and width of each image that will come.

        Returns:
          Heights and widths; none if the network needs arrays of the images' own sizes.
        """
        return self._engine.shared_shapes(sizes)

    def encode(self, image: Any) -> np.ndarray:
        """The codes `(N, h, w, K)` float32 of images, which are given as for calling.

        N is 1 for a single image; h and w are the sides divided by the stride, rounded up. The
        number of channels must be the network's.
        """
        frame = self._frame(image)
        array = _checked(image if frame is None else frame.values)
        batch = _to_float(array)
        batch = batch[..., None] if batch.ndim == 2 else batch
        batch = batch[None] if batch.ndim == 3 else batch
        if batch.shape[3] != self.network.channels:
            raise self._channels_error(array, batch.shape[3])
        sides = [(0, -size % self.network.stride) for size in batch.shape[1:3]]
        batch = np.pad(batch, [(0, 0), *sides, (0, 0)], mode="reflect")
        return self._engine.in_parts("encode", batch, batch.shape[1:3])

    def decode(self, codes: Any) -> np.ndarray:
        """The images `(N, H, W, C)` of codes `(N, h, w, K)`, float32 clipped to [0, 1]."""
        codes = _to_array(codes)
        if codes.ndim != 4 or codes.size == 0 or codes.dtype.kind != "f":
            raise ImageError(
                f"a {codes.dtype} array of shape {codes.shape} holds no codes; use floats "
                "(N, h, w, K), as encode gives them"
            )
        features = self._code_features()
        if codes.shape[3] != features:
            raise ImageError(
                f"the codes have {codes.shape[3]} features, those of {self.network.name} {features}"
            )
        shape = tuple(side * self.network.stride for side in codes.shape[1:3])
        return np.clip(self._engine.in_parts("decode", codes.astype(np.float32), shape), 0, 1)

    def _code_features(self) -> int:
        side = 8 * self.network.stride
        image = jax.ShapeDtypeStruct((1, side, side, self.network.channels), np.float32)
        return jax.eval_shape(self.network.encode, self.params, image).shape[3]

    @property
    def receptive_field(self) -> ReceptiveField | None:
        """How far the network sees; None if over the whole image."""
        return self._engine.field

    def summary(self) -> str:
        """The network layer by layer, what it was trained on, and its scores, as a table."""
        from aecore.networks import summary

        return summary.summarize(self.network, self.params, self.description.to_json())

    def _frame(self, image: Any) -> images.Frame | None:
        """A picture or path as a frame; None for an array."""
        if isinstance(image, (str, os.PathLike)):
            picture = images.read_picture(image)
            frame, notes = picture.frames[0], picture.notes
        elif images.is_picture(image):
            frame, notes = images.from_pillow(image)
        else:
            return None
        for note in notes:
            self._say(note)
        return frame

    def _adapt(self, array: np.ndarray) -> list[np.ndarray]:
        """An array as those `(N, H, W, C)` ones that the engine takes."""
        values = array[None] if array.ndim < 4 else array
        values = values[..., None] if array.ndim == 2 else values
        channels = values.shape[3]
        if values.dtype.kind == "f":
            values = _to_float(values)
        if channels == self.network.channels:
            return [values]
        if (channels, self.network.channels) == (3, 1):
            self._say("colour pictures are restored channel by channel: the network is for gray")
            return [values[..., channel : channel + 1] for channel in range(channels)]
        if (channels, self.network.channels) == (1, 3):
            self._say("gray pictures are restored as if in colour: the network is for colour")
            return [values]
        raise self._channels_error(array, channels)

    def _channels_error(self, array: np.ndarray, channels: int) -> ImageError:
        return ImageError(
            f"the image has {channels} channel{'s' * (channels != 1)}, the model "
            f"{self.network.name} takes {self.network.channels}; convert the image "
            f"(of shape {array.shape}; several gray ones are (N, H, W, 1))"
        )

    def _say(self, note: str) -> None:
        """Logs what a user should know, once."""
        if note not in self._said:
            self._said.add(note)
            _log.warning("%s", note)


def _to_array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ImageError(f"not an array: {error}") from error


def _checked(image: Any) -> np.ndarray:
    """An array; refuses what is not one image or several."""
    array = _to_array(image)
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ImageError(
            f"an array of shape {array.shape} is no image; use (H, W), (H, W, C), (N, H, W, C)"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ImageError(f"dtype {array.dtype} is not supported; use uint8, uint16 or float")
    return array


def _to_float(array: np.ndarray) -> np.ndarray:
    """As float32 in [0, 1]; refuses floats that lie elsewhere."""
    if array.dtype.kind == "u":
        return array.astype(np.float32) / np.iinfo(array.dtype).max
    if np.isnan(array).any():
        raise ImageError("the image has values that are NaN; replace them")
    if not (array.min() >= -_ROUNDING and array.max() <= 1 + _ROUNDING):
        raise ImageError(
            f"float images must lie in [0, 1], these in [{array.min():g}, {array.max():g}]; "
            "scale or clip them, or pass uint8"
        )
    return np.clip(array, 0, 1).astype(np.float32)


def restore(image: Any, run: str | os.PathLike, *, model: Any = None) -> Any:
    """Restores an image with a trained network. To restore many, use a `Restorer`.

    Args:
      image: what `Restorer` takes.
      run: a run directory, an exported file, or a name of weights, as `Restorer.load` takes it.
      model: needed if a run's model is not in `aecore.models.REGISTRY`.

    Returns:
      The same kind, dtype and shape; for a path, a Pillow image.

    Raises:
      CheckpointError: the run has no usable checkpoint.
      ImageError: the image can't be read, or doesn't fit the model.
    """
    return Restorer.load(run, model=model)(image)
