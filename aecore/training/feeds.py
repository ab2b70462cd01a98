"""Where the compiled steps get their batches: streamed by tf.data, or from images on the devices.

`launch` starts one or more steps and can begin at any step. Both feeds visit the images in the same
order; noise drawn on the device is the same in both.
"""

import collections
import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from aecore.config import Training
from aecore.data.batches import epoch_order, training_batches
from aecore.degradations import Degradation
from aecore.errors import ConfigError
from aecore.steps.devices import Devices
from aecore.steps.state import TrainState
from aecore.training.assembly import Assembly

_AHEAD = 2
"""Groups of batches sent to the devices ahead of time, while a call runs."""

_GROUP_IMAGES, _MOST_BATCHES = 256, 8
"""A stream's group has enough batches for this many images, but at most this many batches."""

_MOST_STEPS = 128
"""Most steps per call; with this many, the cost of a call no longer matters."""

_CALL_SECONDS = 0.25
"""How long a call should take at most, so that a run stops soon after a request."""


class Feed(Protocol):
    """Starts steps of training.

    Attributes:
      seconds_waited: total time that `launch` has waited for images.
    """

    seconds_waited: float

    def launch(self, state: TrainState, step: int, most: int) -> tuple[TrainState, jax.Array, int]:
        """Starts steps without waiting for their results.

        Args:
          state: after `step` steps; it is donated.
          step: `state.step`, known to the host.
          most: most steps to start.

        Returns:
          The state after the steps, losses `(L,)` or a scalar, and the number of steps n; only the
          first n losses are defined.
        """

    def seconds_per_step(self, seconds: float) -> None:
        """Tells the feed how long a step takes."""


def create(
    array: np.ndarray, degradation: Degradation, training: Training, assembled: Assembly
) -> Feed:
    """Makes the feed that `training` asks for.

    Args:
      array: `(N, H, W, C)` uint8.
      degradation: what is done to the images.
      training: batch size, seed and feed.
      assembled: the devices and the training step.

    Raises:
      ConfigError: the devices can't hold the images.
    """
    kind = Resident if training.feed == "resident" else Stream
    return kind(array, degradation, training, assembled)


class _Calls:
    """Steps per call: as many as take `_CALL_SECONDS`, once the time of a step is known."""

    def __init__(self, most: int):
        # One at first, as steps may take long; but several processes must agree.
        self.steps = 1 if jax.process_count() == 1 else most
        self._most = most

    def seconds_per_step(self, seconds: float) -> None:
        if jax.process_count() == 1:
            self.steps = min(max(1, int(_CALL_SECONDS / seconds)), self._most)


class Stream:
    """Batches from tf.data, put on the devices ahead of time.

    Small batches are sent in groups, and one call does several steps, which share its cost on the
    host.
    """

    def __init__(self, array, degradation, training, assembled):
        devices = assembled.devices
        share = devices.share(training.batch_size)
        self._group = min(max(1, _GROUP_IMAGES // (share.stop - share.start)), _MOST_BATCHES)
        self._steps = devices.compile_train_steps(assembled.train_step, self._group)
        self._devices = devices
        self._batches = functools.partial(
            training_batches,
            array,
            None if assembled.degrades_on_device else degradation,
            batch_size=training.batch_size,
            seed=training.seed,
            flip=training.flip,
            share=share,
        )
        self._calls = _Calls(self._group)
        self.seconds_per_step = self._calls.seconds_per_step
        self._placed = None
        self._current = None
        self._next_step = None
        self.seconds_waited = 0.0

    def launch(self, state, step, most):
        done = step % self._group
        if step != self._next_step:
            self._placed = self._placed_ahead(step)
            self._current = next(self._placed)
        elif done == 0:
            self._current = next(self._placed)
        count = min(most, self._calls.steps, self._group - done)
        state, losses = self._steps(state, self._current, self._devices.replicate(np.int32(count)))
        self._next_step = step + count
        return state, losses, count

    def _placed_ahead(self, step: int) -> Iterator[Any]:
        """Groups of batches, from that of `step` on; its batches before `step` are not read."""
        queue = collections.deque()
        batches = self._batches(start_step=step)
        done = step % self._group
        while True:
            while len(queue) <= _AHEAD:
                start = time.perf_counter()
                group = list(itertools.islice(batches, self._group - done))
                self.seconds_waited += time.perf_counter() - start
                group = [group[0]] * done + group
                queue.append(self._devices.shard_batch(jax.tree.map(_stack, *group), axis=1))
                done = 0
            yield queue.popleft()


def _stack(*arrays: np.ndarray) -> np.ndarray:
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


class Resident:
    """All images on the devices, as bytes; one call does many steps without work on the host.

    At the start of an epoch, the devices copy the images into the epoch's order, so that each batch
    is a slice.
    """

    def __init__(self, array, degradation, training, assembled):
        del degradation  # The step does it.
        devices = assembled.devices
        _check_memory(array, devices)

        def train_step(state, rows, *, axis_name=None):
            images = rows.reshape(-1, *assembled.image_shape)
            return assembled.train_step(state, images, axis_name=axis_name)

        self._devices = devices
        self._steps = devices.compile_train_steps(train_step, _MOST_STEPS)
        self._arrange = devices.compile_arrange()
        # One row per image: TPUs store the last axes in tiles, which few channels would not fill.
        self._held = devices.hold(array.reshape(len(array), -1))
        self._count = len(array)
        self._batch_size = training.batch_size
        self._seed = training.seed
        self._epoch = None
        self._batches = None
        self.seconds_waited = 0.0
        self._calls = _Calls(_MOST_STEPS)
        self.seconds_per_step = self._calls.seconds_per_step

    def launch(self, state, step, most):
        steps_per_epoch = self._count // self._batch_size
        epoch, done = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            order = epoch_order(self._seed, epoch, self._count)
            indices = order[: steps_per_epoch * self._batch_size].astype(np.int32)
            self._batches = None  # Frees its memory before the next one is made.
            self._batches = self._arrange(
                self._held,
                self._devices.replicate(indices.reshape(steps_per_epoch, self._batch_size)),
            )
            self._epoch = epoch
        count = min(most, self._calls.steps, steps_per_epoch - done)
        state, losses = self._steps(state, self._batches, self._devices.replicate(np.int32(count)))
        return state, losses, count


def _check_memory(array: np.ndarray, devices: Devices) -> None:
    """Refuses images of which two copies, held and arranged, leave too little room for steps."""
    statistics = devices.mesh.local_devices[0].memory_stats() or {}
    limit = statistics.get("bytes_limit", math.inf)
    needed = 2 * array.nbytes / devices.device_count
    if needed > 0.8 * limit:
        raise ConfigError(
            f"the images need {needed / 2**30:.1f} GiB of the device's {limit / 2**30:.1f}; "
            "use --training.feed stream"
        )
