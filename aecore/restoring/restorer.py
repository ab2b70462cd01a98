"""A trained network as a function on images."""

import collections
import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from aecore.errors import ConfigError, ImageError
from aecore.media import images
from aecore.networks.network import Network
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import consistency, engine, expectations, inputs, passes, projection
from aecore.restoring.consistency import Consistency
from aecore.restoring.engine import Engine
from aecore.restoring.tensors import FLOATS, like, scalar, to_numpy
from aecore.restoring.tiling import Size
from aecore.saved import weights
from aecore.saved.descriptions import Description
from aecore.saved.trained import TrainedNetwork

_log = logging.getLogger(__name__)


Key = TypeVar("Key", bound=Hashable)


class Restorer:
    """Restores images with a trained network; keeps what it compiles; safe to use from threads.

    Args:
      trained: the network; `Restorer.of` makes a restorer of your own module and parameters.
      tile: `"auto"`, so that pictures too large to be restored at once are restored in tiles; 0
        for never; or the side of the tiles in pixels, of which it is found by restoring whether it
        suffices for the network. The result is the same but for rounding.
      batch_size: most images at a time; None for as many as are worth it.
      precision: `"float32"`, `"bfloat16"`, or `"auto"` for bfloat16 on TPUs and else float32.
      device: a platform, `"cpu"`, `"gpu"` or `"tpu"`, or a JAX device to use alone; None for the
        default platform.
      devices: how many of the platform's local devices to use, or JAX devices of one platform; None
        for all. Batches and tiles are divided among them; the results are the same bit for bit.
      strength: how much of the correction is applied, from 0 to 1: 0 gives back the image, enlarged
        by interpolation where the network enlarges, 1 what the network makes of it. `consistent`
        changes what this gives.
      in_range: whether floats must lie in [0, 1]. False: others are taken as they are, such as
        noise that benchmarks don't clip; results are clipped to [0, 1] all the same.
      consistent: whether results are changed so that degrading them gives their images. Only of
        networks that were trained to undo `Downscale`, `Pixelate` or `Mask`; on images that were
        degraded otherwise, it brings their faults back.

    A restorer can be copied and pickled; a copy compiles anew. JAX does not survive a fork: in a
    process that was forked after the first restorer was made, restoring raises a ConfigError.

    Raises:
      ConfigError: a setting is out of bounds, there is no such device, or the process was forked.
    """

    def __init__(
        self,
        trained: TrainedNetwork,
        *,
        tile: Literal["auto"] | int = "auto",
        batch_size: int | None = None,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        device: jax.Device | str | None = None,  # pyright: ignore[reportInvalidTypeForm]
        devices: int | Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        strength: float = 1.0,
        in_range: bool = True,
        consistent: bool = False,
    ):
        engine.refuse_fork()
        if not isinstance(trained, TrainedNetwork):
            raise ConfigError(
                f"{trained!r:.80} is not a trained network; use Restorer.load for what has a name "
                "or path, and Restorer.of for a module"
            )
        tile, batch_size, in_range, consistent = map(
            scalar, (tile, batch_size, in_range, consistent)
        )
        for name, value in {"in_range": in_range, "consistent": consistent}.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name} {value!r} is not possible; use True or False")
        self.trained = trained
        self._settings = {
            "tile": tile,
            "batch_size": batch_size,
            "precision": precision,
            "strength": _checked_strength(strength),
            "in_range": in_range,
            "consistent": consistent,
        }
        self._project = (
            projection.onto(self.description.build_degradation()) if consistent else None
        )
        self._has_device = not (device is None and devices is None)
        self._engine = Engine(
            trained.network,
            trained.params,
            tile=tile,
            batch_size=batch_size,
            precision=precision,
            devices=_devices(device, devices),
        )
        self._said = set()

    @classmethod
    def load(cls, run: str | os.PathLike, *, model: Any = None, **settings: Any) -> "Restorer":
        """Loads a run's best checkpoint, an exported file, or weights that ship with aecore.

        Args:
          run: a run directory, local or `gs://`; what `aecore export` wrote; or one of
            `aecore.saved.weights.CARDS`.
          model: needed if a run's model is not in `aecore.models.REGISTRY`.
          **settings: as for the class, such as `tile` and `strength`.

        Raises:
          CheckpointError: there is nothing that can be used, or its model is unknown.
        """
        engine.refuse_fork()
        return cls(weights.load(run, model=model), **settings)

    @classmethod
    def of(cls, model: Any, params: Any, **settings: Any) -> "Restorer":
        """Restores with your own Linen module.

        Args:
          model: has `encode`, `decode`, `__call__`, `channels` and `stride`, as
            `aecore.models.Autoencoder` describes them.
          params: what its `init` gives as `params`; it has no other variables.
          **settings: as for the class.

        Raises:
          ConfigError: it is no such module. That the parameters are others is found by restoring.
        """
        return cls(TrainedNetwork.of(model, params), **settings)

    def with_strength(self, strength: float) -> "Restorer":
        """This restorer with another strength; both share what has been compiled."""
        strength = _checked_strength(strength)
        other = object.__new__(type(self))
        vars(other).update(vars(self), _settings={**self._settings, "strength": strength})
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        devices = self._engine.devices
        numbers = [device.local_hardware_id for device in devices]
        place = (devices[0].platform, numbers) if self._has_device else None
        return _rebuild, (type(self), self.trained, self._settings, place)

    @property
    def network(self) -> Network:
        """The network as pure functions of its parameters."""
        return self.trained.network

    @functools.cached_property
    def params(self) -> Any:
        """The network's parameters, for `apply`; JAX moves them to where the images are."""
        return jax.device_put(self.trained.params)

    @property
    def devices(self) -> tuple[jax.Device, ...]:  # pyright: ignore[reportInvalidTypeForm]
        """The JAX devices that it computes on."""
        return self._engine.devices

    @property
    def description(self) -> Description:
        """What the network says of itself."""
        return self.trained.description

    def __call__(self, image: Any, *, progress: Callable[[float], None] | None = None) -> Any:
        """Restores an image, or several.

        A gray image is given to a network for colour as three equal channels, whose mean is taken;
        of a colour image, a network for gray restores each channel by itself. Sides that are not
        multiples of the network's stride are extended by reflection, and the result is cropped.

        Args:
          image: an array `(H, W)`, `(H, W, C)` or `(N, H, W, C)`, uint8, uint16 or float in
            [0, 1]; a Pillow image; or a path to a picture, of which the first frame is taken;
            where there are others, a warning says so.
          progress: called with the share that is done, up to 1, whenever another part of a large
            picture is. What it raises ends the work, and is raised here.

        Returns:
          The same kind, dtype (in native byte order), shape and mode (for a path, a Pillow image;
          for an array of JAX, PyTorch or TensorFlow, such an array on the same device, without
          gradients), rounded and clipped to what the dtype can hold; floats are clipped to [0, 1].
          A network that enlarges gives `s` times the height and width. Alpha is left as it was. Of
          Pillow's modes, P becomes RGB or RGBA, and CMYK, YCbCr, LAB and HSV become RGB.

        Raises:
          ConfigError: the network can't be restored in tiles, or needs larger ones than `tile`; the
            parameters are another model's; or the process was forked.
          ImageError: the picture can't be read; its dtype, shape, values or number of channels
            don't fit; the file has colour, or gray with alpha, of 16 bits, which Pillow's images
            can't hold; or the device's memory doesn't suffice.
        """
        frame, notes = self._frame(image)
        if frame is not None:
            # Rather than after hours of work.
            images.check_mode_of_pillow(frame.mode)
        array = inputs.checked(image if frame is None else frame.values)

        def notes_on(array):
            return (*notes, *self._unlike(array))

        restored = next(self._restored([array], notes_on=notes_on, progress=progress))
        if frame is None:
            return like(image, restored)
        return images.to_pillow(frame.restored(restored))

    def each(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Restores images as they come; consecutive ones of one shape are batched.

        Where the sizes of all images are known beforehand, `many` is faster.

        Args:
          arrays: `(H, W)` or `(H, W, C)`, as for calling; taken as they are needed, some ahead.

        Yields:
          The restored images, in order.

        Raises:
          ImageError: as for calling; the images before the one in question are yielded first.
        """
        given = collections.deque()

        def checked():
            for image in arrays:
                array = inputs.checked_one(image)
                given.append(image)
                yield array

        for restored in self._restored(checked(), notes_on=self._unlike):
            yield like(given.popleft(), restored)

    def many(
        self,
        sizes: Mapping[Key, Size],
        read: Callable[[Sequence[Key]], Iterable[tuple[Key, np.ndarray]]],
        *,
        more_follow: bool = False,
    ) -> Iterator[tuple[Key, np.ndarray]]:
        """Restores images whose sizes are known beforehand, in the order that is fastest.

        Images of similar sizes are restored together, so that few shapes are compiled.

        Args:
          sizes: height and width of each image, by any key, such as its path.
          read: gets all keys in the order in which to read the images, and yields each key with
            its image, `(H, W)` or `(H, W, C)`, as for calling. It may leave out images that can't
            be read, and yield several images of a key. Its images are taken as they are needed, a
            few ahead; it may read further ahead itself, in threads of its own.
          more_follow: whether this is called again for images of other sizes, so that few shapes
            are compiled in all.

        Yields:
          Each key with the restored image, in the order in which `read` gave them.

        Raises:
          ImageError: as for calling; the images before the one in question are yielded first.
        """
        plan = self._engine.plan(sizes, more_follow)
        given = collections.deque()

        def checked():
            for key, image in read(plan.order):
                array = inputs.checked_one(image)
                given.append((key, image))
                yield array

        for restored in self._restored(checked(), plan.shapes):
            key, image = given.popleft()
            yield key, like(image, restored)

    def _restored(
        self,
        arrays: Iterable[np.ndarray],
        shapes: Sequence[Size] = (),
        *,
        notes_on: Callable[[np.ndarray], Iterable[str]] = lambda _: (),
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Restores arrays that are each an image, or several; says notes on those that fit."""
        under_way = collections.deque()
        begun = done = 0

        def adapted():
            nonlocal begun
            for array in arrays:
                parts = self._adapt(array)
                self._say(*notes_on(array))
                under_way.append((array, len(parts)))
                begun += len(parts)
                yield from parts

        def report(share):
            nonlocal done
            done += share
            if progress is not None:  # Where memory ran out, parts are done again.
                progress(min(done / begun, 1.0))

        restored = passes.restore(self._engine, adapted(), shapes, report)
        for first in restored:
            array, count = under_way.popleft()
            parts = [first, *(next(restored) for _ in range(count - 1))]
            result = parts[0] if count == 1 else np.concatenate(parts, axis=3)
            *count, height, width = array.shape[: array.ndim - (array.ndim > 2)]
            sides = (self._engine.scale * height, self._engine.scale * width)
            shape = (*count, *sides, *array.shape[3 if count else 2 :])
            result = result.reshape(shape).astype(array.dtype, copy=False)
            yield self._agreeing(array, self.blended(array, result))

    def blended(self, array: np.ndarray, restored: np.ndarray) -> np.ndarray:
        """What this restorer's strength makes of images and of what full strength made of them.

        Args:
          array: one image or several, as for calling.
          restored: the result for it, of the same dtype, by a restorer of strength 1.
        """
        strength = self._settings["strength"]
        if strength == 1:
            return restored
        plain = array
        if self._engine.scale > 1:
            several = array if array.ndim == 4 else array[None]
            larger = [images.enlarged(image, self._engine.scale) for image in several]
            plain = np.stack(larger).reshape(restored.shape)
        blended = (1 - strength) * plain.astype(np.float32) + strength * restored
        is_float = array.dtype.kind == "f"
        return (blended.clip(0, 1) if is_float else np.rint(blended)).astype(array.dtype)

    def _agreeing(self, array: np.ndarray, restored: np.ndarray) -> np.ndarray:
        """The restored image such that degrading it gives the input, if that was asked for."""
        if self._project is None:
            return restored
        pairs = zip(self._pictures(restored), self._pictures(array), strict=True)
        agreeing = np.stack([self._project(after, before) for after, before in pairs]).clip(0, 1)
        if restored.dtype.kind == "u":
            agreeing = np.rint(agreeing * np.iinfo(restored.dtype).max)
        return agreeing.reshape(restored.shape).astype(restored.dtype)

    def consistency(self, restored: Any, original: Any) -> Consistency:
        """How far a result is from explaining the image that it was made of.

        Args:
          restored: what this restorer made, or any other picture.
          original: the degraded image that came in. Both are given as for calling.

        Raises:
          ConfigError: nothing can be said, as it isn't known what degraded the image.
          ImageError: as for calling; or the sizes don't fit.
        """
        batches, said = [], []
        for value in (restored, original):
            frame, notes = self._frame(value)
            batches.append(self._pictures(inputs.checked(value if frame is None else frame.values)))
            said += notes
        measured = consistency.measure(self.description.build_degradation(), *batches)
        self._say(*said)
        return measured

    def differences(self, image: np.ndarray) -> tuple[str, ...]:
        """How an image is unlike those that the network was trained on.

        Args:
          image: `(H, W)` or `(H, W, C)`, uint8, uint16, or float in [0, 1].

        Returns:
          A sentence for each difference, the same for all images that differ in this way.

        Raises:
          ImageError: it is no such array.
        """
        array = inputs.checked_one(image)
        return expectations.differences(self.description, array, scale=self.network.scale)

    def encode(self, image: Any) -> Any:
        """The codes `(N, h, w, K)` float32 of images, which are given as for calling.

        N is 1 for a single image; h and w are the sides divided by the stride, rounded up. The
        number of channels must be the network's. Of an array of JAX, PyTorch or TensorFlow, the
        codes are such too.
        """
        frame, notes = self._frame(image)
        array = inputs.checked(image if frame is None else frame.values)
        batch = self._pictures(array)
        if batch.shape[3] != self.network.channels:
            raise self._channels_error(array, batch.shape[3])
        self._say(*notes)
        sides = [(0, -size % self.network.stride) for size in batch.shape[1:3]]
        batch = np.pad(batch, [(0, 0), *sides, (0, 0)], mode="reflect")
        return like(image, self._engine.in_parts("encode", batch, batch.shape[1:3]))

    def decode(self, codes: Any) -> Any:
        """The images `(N, H, W, C)` of codes `(N, h, w, K)`, float32 clipped to [0, 1].

        Where the network enlarges, they are larger than those that were encoded, by its scale.
        """
        given, codes = codes, to_numpy(codes)
        if codes.ndim != 4 or codes.size == 0 or codes.dtype.kind != "f":
            raise ImageError(
                f"a {codes.dtype} array of shape {codes.shape} holds no codes; use {FLOATS} "
                "(N, h, w, K), as encode gives them"
            )
        features = self._code_features()
        if codes.shape[3] != features:
            raise ImageError(
                f"the codes have {codes.shape[3]} features, those of {self.network.name} {features}"
            )
        shape = tuple(side * self.network.stride for side in codes.shape[1:3])
        decoded = self._engine.in_parts("decode", codes.astype(np.float32), shape)
        return like(given, np.clip(decoded, 0, 1))

    def _code_features(self) -> int:
        side = 8 * self.network.stride
        image = jax.ShapeDtypeStruct((1, side, side, self.network.channels), np.float32)
        return jax.eval_shape(self.network.encode, self.trained.params, image).shape[3]

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """The network as a pure function, for your own `jit`, `vmap` and `grad`.

        Args:
          params: such as `restorer.params`.
          images: `(B, H, W, C)` float32 in [0, 1]; H and W are multiples of the network's stride.
            They may be divided among devices.

        Returns:
          The restored images, neither clipped nor rounded; divided as those that came in. Their
          derivatives are for reverse mode alone, as of `jax.grad` and `jax.vjp`, not `jax.jvp`.

        Raises:
          ImageError: their shape doesn't fit, or their dtype isn't a float.
        """
        apply = self.network.apply
        kind = jax.typeof(images)
        self._check_batch(kind)
        sharding = kind.sharding
        if explicit := sharding.mesh.explicit_axes:
            # Such as of `jax.make_mesh`. How a layer's results are divided is up to the compiler.
            apply = jax.sharding.auto_axes(axes=explicit, out_sharding=sharding)(apply)
        return apply(params, images)

    def _check_batch(self, kind: Any) -> None:
        """Refuses shapes and dtypes that `apply` doesn't take; symbolic sides are let through."""
        shape, stride = kind.shape, self.network.stride
        if len(shape) != 4 or 0 in shape:
            raise ImageError(f"an array of shape {shape} is no batch of images; use (B, H, W, C)")
        if not jax.numpy.issubdtype(kind.dtype, np.floating):
            raise ImageError(f"dtype {kind.dtype} is not supported; use floats in [0, 1]")
        if shape[3] != self.network.channels:
            raise self._channels_error(kind, shape[3])
        if any(isinstance(side, int) and side % stride for side in shape[1:3]):
            raise ImageError(
                f"{shape[1]}x{shape[2]} pixels are not multiples of {stride}, the stride of "
                f"{self.network.name}; pad or crop them"
            )

    @property
    def receptive_field(self) -> ReceptiveField | None:
        """How far the network sees; None if over the whole image."""
        return self._engine.field

    def summary(self) -> str:
        """The network layer by layer, what it was trained on, and its scores, as a table."""
        from aecore.networks import summary

        return summary.summarize(
            self.network, self.trained.params, self.description.to_json(), self.trained.about
        )

    def _frame(self, image: Any) -> tuple[images.Frame | None, Sequence[str]]:
        """A picture or path as a frame, and what to say of it; None for an array."""
        if images.is_picture(image):
            return images.from_pillow(image)
        if not isinstance(image, (str, os.PathLike)):
            return None, ()
        if not os.fspath(image):
            raise ImageError("the image's path is empty; name a picture file")
        picture = images.read_picture(image)
        if len(picture.frames) == 1:
            return picture.frames[0], picture.notes
        of_frames = (
            f"{os.fspath(image)}: only the first of {len(picture.frames)} frames or pages is used; "
            "the command aecore restore restores all"
        )
        return picture.frames[0], (of_frames, *picture.notes)

    def _adapt(self, array: np.ndarray) -> list[np.ndarray]:
        """An array as those `(N, H, W, C)` ones that the engine takes."""
        values = inputs.as_batch(array)
        channels = values.shape[3]
        if values.dtype.kind == "f":
            values = inputs.to_float(values, self._settings["in_range"])
        if channels == self.network.channels:
            return [values]
        if (channels, self.network.channels) == (3, 1):
            self._say("colour pictures are restored channel by channel: the network is for gray")
            return [values[..., channel : channel + 1] for channel in range(channels)]
        if (channels, self.network.channels) == (1, 3):
            self._say(expectations.of_gray(self.description))
            return [values]
        raise self._channels_error(array, channels)

    def _pictures(self, array: np.ndarray) -> np.ndarray:
        """An image, or several, as `(N, H, W, C)` float32; 1 is white."""
        return inputs.to_float(inputs.as_batch(array), self._settings["in_range"])

    def _channels_error(self, array: np.ndarray, channels: int) -> ImageError:
        is_first = array.ndim >= 3 and array.shape[-3] == self.network.channels
        hint = "channels come last, as after movedim(-3, -1)" if is_first else "convert the image"
        return ImageError(
            f"the image has {channels} channel{'s' * (channels != 1)}, the model "
            f"{self.network.name} takes {self.network.channels}; {hint} "
            f"(of shape {array.shape}; several gray ones are (N, H, W, 1))"
        )

    def _unlike(self, array: np.ndarray) -> tuple[str, ...]:
        """How an image, or the first of several, is unlike those of the training."""
        return self.differences(array[0] if array.ndim == 4 else array)

    def _say(self, *notes: str) -> None:
        """Logs what a user should know, once."""
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                _log.warning("%s", note)


def _devices(
    device: jax.Device | str | None,  # pyright: ignore[reportInvalidTypeForm]
    devices: int | Sequence[jax.Device] | None,  # pyright: ignore[reportInvalidTypeForm]
) -> Sequence[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    devices = scalar(devices)
    if isinstance(device, jax.Device):
        if devices is not None:
            raise ConfigError("device names one JAX device already; leave devices out")
        return [device]
    if isinstance(devices, Sequence) and devices:
        if not (
            all(isinstance(one, jax.Device) for one in devices)
            and len({one.platform for one in devices}) == 1
        ):
            raise ConfigError(f"devices {devices!r} are not JAX devices of one platform")
        if device is not None:
            raise ConfigError(f"devices names JAX devices already; leave device {device!r} out")
        if len(set(devices)) < len(devices):
            raise ConfigError(f"devices {devices!r} names one more than once; name each once")
        return devices
    try:
        local = jax.local_devices(backend=device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"there is no device {device!r} here; use {jax.default_backend()}, or leave it out"
        ) from error
    if devices is None:
        return local
    if type(devices) is int and 1 <= devices <= len(local):
        return local[:devices]
    several = f"are {len(local)} devices here; use 1 to {len(local)}, JAX devices,"
    there = several if len(local) > 1 else "is one device here; use 1, a JAX device,"
    raise ConfigError(f"devices {devices!r} is not possible: there {there} or leave it out")


def _rebuild(
    cls: type[Restorer],
    trained: TrainedNetwork,
    settings: dict[str, Any],
    place: tuple[str, list[int | None]] | None,
) -> Restorer:
    """A pickled restorer, on the same devices or, where they are not, the first of the platform."""
    devices = None
    if place is not None:
        engine.refuse_fork()
        platform, numbers = place
        local = jax.local_devices(backend=platform)
        devices = [device for device in local if device.local_hardware_id in numbers] or local[:1]
    return cls(trained, **settings, devices=devices)


def _checked_strength(strength: Any) -> float:
    number = scalar(strength)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not (is_number and 0 <= number <= 1):
        raise ConfigError(f"strength {strength!r} is not possible; use a number from 0 to 1")
    return float(number)
