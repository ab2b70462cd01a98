"""Where compiled steps get their batches: streamed from the host, or from images on the devices.

`launch` starts one or more steps and can begin at any step. All feeds visit the same images and
crops in the same order; noise drawn on the device is the same in all.
"""

import collections
import functools
import itertools
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aecore.config import Training
from aecore.data.batches import epoch_order, group_size, training_batches
from aecore.data.crops import Crops
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.steps import memory
from aecore.steps.devices import Compiled, Devices, in_background
from aecore.steps.state import TrainState
from aecore.training.assembly import Assembly

_AHEAD = 2
"""Groups of batches sent to the devices ahead of time, while a call runs."""

_MOST_STEPS = 128
"""Most steps per call; with this many, the cost of a call no longer matters."""

_CALL_SECONDS = 0.25
"""How long a call should take at most, so that a run stops soon after a request."""


class Feed(Protocol):
    """Starts steps of training."""

    seconds_waited: float
    """Total time that `launch` has waited for images."""

    def launch(self, state: TrainState, step: int, most: int) -> tuple[TrainState, jax.Array, int]:
        """Starts steps without waiting for their results.

        Args:
          state: after `step` steps; it is donated.
          step: `state.step`, known to the host.
          most: most steps to start.

        Returns:
          The state after the steps; their losses, `(L,)` or a scalar; and how many steps there
          are. Losses beyond that number are undefined.
        """
        ...

    def seconds_per_step(self, seconds: float) -> None:
        """Tells the feed how long a step takes."""
        ...

    def close(self) -> None:
        """Ends what works ahead, which may otherwise keep a process from ending.

        Frees the images on the devices; the feed can't be used any more.
        """
        ...


def create(
    examples: np.ndarray | Crops,
    degradation: Degradation,
    training: Training,
    assembled: Assembly,
) -> Feed:
    """Makes the feed that `training` asks for.

    Args:
      examples: `(N, H, W, C)` uint8 images, or crops.
      degradation: what is done to the images.
      training: batch size, seed and feed.
      assembled: the devices and the training step.

    Raises:
      ConfigError: the devices can't hold the images.
      DataError: no picture can be cropped.
    """
    if training.feed == "stream":
        return Stream(examples, degradation, training, assembled)
    if isinstance(examples, Crops):
        return ResidentCrops(examples, training, assembled)
    return Resident(examples, training, assembled)


class _Calls:
    """Steps per call: as many as take `_CALL_SECONDS`, once the time of a step is known."""

    def __init__(self, most: int):
        # One at first, as steps may take long; but several processes must agree.
        self.steps = 1 if jax.process_count() == 1 else most
        self._most = most

    def seconds_per_step(self, seconds: float) -> None:
        if jax.process_count() == 1:
            self.steps = min(max(1, int(_CALL_SECONDS / seconds)), self._most)


def _compiled_ahead(
    steps: Compiled, assembled: Assembly, batches: Any, *arrays: Any
) -> Callable[..., Any]:
    """What `Devices.compile_train_steps` returned; a thread begins to compile it at once.

    Args:
      steps: what is to be compiled.
      assembled: the devices and the training step.
      batches: shapes, dtypes and shardings of the batches that it is called with.
      *arrays: the same of what every device holds whole, or such arrays.
    """
    if jax.process_count() > 1:
        return steps  # Several processes compile together, at the first call.
    count = jax.ShapeDtypeStruct((), np.int32, sharding=assembled.devices.replicated)
    arguments = assembled.abstract_state, batches, count, *arrays
    wait = in_background(lambda: steps.lower(*arguments).compile())

    def compiled(*args: Any) -> Any:
        wait()
        return steps(*args)

    return compiled


class Stream:
    """Batches made on the host, put on the devices ahead of time.

    Of small batches, several are put there together: a call then does several steps, which share
    what it costs the host.
    """

    def __init__(
        self,
        examples: np.ndarray | Crops,
        degradation: Degradation,
        training: Training,
        assembled: Assembly,
    ):
        devices = assembled.devices
        share = devices.share(training.batch_size)
        self._group = group_size(examples, share.stop - share.start)
        self._devices = devices
        self._batches = functools.partial(
            training_batches,
            examples,
            None if assembled.degrades_on_device else degradation,
            batch_size=training.batch_size,
            seed=training.seed,
            flip=training.flip,
            share=share,
        )
        self._calls = _Calls(self._group)
        self.seconds_per_step = self._calls.seconds_per_step
        self._placed = self._placed_ahead(0)
        self._current = None
        self._next_step = None
        self.seconds_waited = 0.0
        groups = jax.tree.map(
            lambda leaf: devices.abstract_share((self._group, *leaf.shape), leaf.dtype, 1),
            assembled.abstract_batch(),
        )
        steps = devices.compile_train_steps(assembled.train_step, self._group)
        self._steps = _compiled_ahead(steps, assembled, groups)

    def launch(self, state, step, most):
        done = step % self._group
        if step != self._next_step:
            self._placed.close()
            self._placed = self._placed_ahead(step)
            self._current = next(self._placed)
        elif done == 0:
            self._current = next(self._placed)
        count = min(most, self._calls.steps, self._group - done)
        state, losses = self._steps(state, self._current, self._devices.replicate(np.int32(count)))
        self._next_step = step + count
        return state, losses, count

    def close(self):
        self._placed.close()
        self._current = None

    def _placed_ahead(self, step: int) -> Generator[Any, None, None]:
        """Groups of batches; the first one is that of `step`, and lacks what comes before it."""
        queue = collections.deque()
        batches = self._batches(start_step=step)
        done = step % self._group
        for ahead in itertools.count():
            # The first step starts as soon as there is a group for it.
            while len(queue) <= min(ahead, _AHEAD):
                start = time.perf_counter()
                group = list(itertools.islice(batches, self._group - done))
                self.seconds_waited += time.perf_counter() - start
                group = [group[0]] * done + group
                queue.append(self._devices.shard_batch(jax.tree.map(_stack, *group), axis=1))
                done = 0
            yield queue.popleft()


def _stack(*arrays: np.ndarray) -> np.ndarray:
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


class _OfEpochs:
    """Steps on what the devices hold, of which each epoch's batches are made at its start.

    Args:
      steps: compiled `(state, batches, count, *held) -> (state, losses)`.
      count: of the examples.
      training: batch size and seed.
      devices: that do the steps.
      held: what every device holds whole, as further arguments of the steps.
    """

    def __init__(
        self,
        steps: Callable[..., Any],
        count: int,
        training: Training,
        devices: Devices,
        held: tuple[Any, ...] = (),
    ):
        self._steps = steps
        self._count = count
        self._training = training
        self._devices = devices
        self._held = held
        self._epoch = None
        self._batches = None
        self.seconds_waited = 0.0
        self._calls = _Calls(_MOST_STEPS)
        self.seconds_per_step = self._calls.seconds_per_step

    def launch(self, state, step, most):
        batch_size = self._training.batch_size
        steps_per_epoch = self._count // batch_size
        epoch, done = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            self._batches = None  # Frees its memory before the next one is made.
            order = epoch_order(self._training.seed, epoch, self._count)
            order = order[: steps_per_epoch * batch_size]
            self._batches = self._of_epoch(epoch, order.reshape(steps_per_epoch, batch_size))
            self._epoch = epoch
        count = min(most, self._calls.steps, steps_per_epoch - done)
        count_on_devices = self._devices.replicate(np.int32(count))
        state, losses = self._steps(state, self._batches, count_on_devices, *self._held)
        return state, losses, count

    def close(self):
        self._batches, self._held = None, ()

    def _of_epoch(self, epoch: int, examples: np.ndarray) -> Any:
        """An epoch's batches, from its examples' indices: `(S, B)` int64."""
        raise NotImplementedError


class Resident(_OfEpochs):
    """All images on the devices, as bytes; one call does many steps without work on the host.

    At the start of an epoch, the devices copy the images into the epoch's order, so that each batch
    is a slice.
    """

    def __init__(self, array: np.ndarray, training: Training, assembled: Assembly):
        devices = assembled.devices
        # As they are held, and as they are arranged.
        _check_memory(2 * array.nbytes / devices.device_count, devices)

        def train_step(state, rows, *, axis_name=None):
            images = rows.reshape(-1, *assembled.image_shape)
            return assembled.train_step(state, images, axis_name=axis_name)

        # One row per image: TPUs store the last axes in tiles, which few channels would not fill.
        rows = array.reshape(len(array), -1)
        shape = len(array) // training.batch_size, *devices.batch_shape(training.batch_size)
        batches = devices.abstract_share((*shape, rows.shape[1]), rows.dtype, 1)
        steps = devices.compile_train_steps(train_step, _MOST_STEPS)
        steps = _compiled_ahead(steps, assembled, batches)
        super().__init__(steps, len(array), training, devices)
        self._arrange = devices.compile_arrange()
        self._images = devices.hold(rows)

    def _of_epoch(self, epoch, examples):
        return self._arrange(self._images, self._devices.replicate(examples.astype(np.int32)))

    def close(self):
        super().close()
        self._images = None


class ResidentCrops(_OfEpochs):
    """Whole pictures on the devices, as bytes, of which each step cuts its crops itself.

    Each device holds all pictures, so that a batch is the same on any number of devices, and none
    waits for another's pixels. At an epoch's start the host says where the crops lie: three
    integers each.
    """

    def __init__(
        self,
        crops: Crops,
        training: Training,
        assembled: Assembly,
    ):
        devices = assembled.devices
        packed = crops.pack(functools.partial(_check_memory, devices=devices))
        for pictures in packed:
            if pictures.planes.shape[1] >= 2**31:
                raise ConfigError(
                    f"the pictures have {pictures.planes.shape[1]:,} pixels, more than the "
                    f"{2**31 - 1:,} that can be held on a device; use --training.feed stream"
                )

        def train_step(state, batch, *, axis_name=None):
            (parts, turn), held = batch
            images = tuple(
                cut(planes, start, width, turn, size[:2])
                for planes, (start, width), size in zip(held, parts, crops.shapes, strict=True)
            )
            examples = images[0] if len(images) == 1 else images
            return assembled.train_step(state, examples, axis_name=axis_name)

        held = tuple(devices.replicate(pictures.planes) for pictures in packed)
        shape = len(crops) // training.batch_size, *devices.batch_shape(training.batch_size)
        each = devices.abstract_share(shape, np.int32, 1)
        places = ((each, each),) * len(packed), each
        steps = devices.compile_train_steps(train_step, _MOST_STEPS, held=True)
        steps = _compiled_ahead(steps, assembled, places, held)
        super().__init__(steps, len(crops), training, devices, (held,))
        self._layouts = [pictures.layout for pictures in packed]
        self._crops = crops

    def _of_epoch(self, epoch, examples):
        """Where an epoch's crops start, how wide their pictures are, and how they are turned.

        Each is an array `(S, B)` of int32.
        """
        start = time.perf_counter()
        training = self._training
        places = self._crops.places(
            examples.ravel(), seed=training.seed, epoch=epoch, flip=training.flip
        )
        located = tuple(layout.locate(places) for layout in self._layouts)
        share = self._devices.share(training.batch_size)

        def batches(values: np.ndarray) -> np.ndarray:
            return values.astype(np.int32).reshape(examples.shape)[:, share]

        placed = jax.tree.map(batches, (located, places.turn))
        result = self._devices.shard_batch(placed, axis=1)
        self.seconds_waited += time.perf_counter() - start
        return result


def cut(
    planes: jax.Array, start: jax.Array, width: jax.Array, turn: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Crops of packed pictures, turned as `aecore.data.crops.turned` does it.

    Args:
      planes: `(C, P)` uint8, as `Packed.planes`.
      start: `(B,)`, the pixel at which each crop starts.
      width: `(B,)`, the widths of their pictures.
      turn: `(B,)`, how each is turned.
      size: height and width of the crops; equal if any `turn` is above 3.

    Returns:
      `(B, height, width, C)` uint8.
    """
    height, columns = size

    def row(first):
        return lax.dynamic_slice(planes, (0, first), (len(planes), columns))

    first = start[:, None] + width[:, None] * jnp.arange(height, dtype=jnp.int32)
    images = jax.vmap(jax.vmap(row))(first).transpose(0, 1, 3, 2)
    turn = turn[:, None, None, None]
    if height == columns:
        images = jnp.where(turn & 4, images.swapaxes(1, 2), images)
    images = jnp.where(turn & 2, images[:, ::-1], images)
    return jnp.where(turn & 1, images[:, :, ::-1], images)


def _check_memory(needed: float, devices: Devices) -> None:
    """Refuses images that, with this many bytes per device, leave too little room for the steps."""
    limit, whose = memory.limit(devices.mesh.local_devices[0]), "the device's"
    if limit is None:  # As on CPUs, which share the machine's.
        limit, whose = memory.physical(), "the machine's"
        needed *= len(devices.mesh.local_devices)
    if needed > 0.8 * limit:
        raise ConfigError(
            f"the images need {needed / 2**30:.1f} GiB of {whose} {limit / 2**30:.1f}; "
            "use --training.feed stream"
        )
