"""The compiled programs that run a network on devices, each made when it is first needed.

Images are `(N, H, W, C)` uint8, uint16 or float32 in [0, 1]. A network for colour restores gray
images as three equal channels and takes their mean.

Where there are several devices, each computes batches of the size that one device alone would
compute, of the same images, so that the results are the same bit for bit.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aecore.data.shapes import Size
from aecore.networks.network import Network, fits_within
from aecore.networks.receptive_field import ReceptiveField
from aecore.steps import memory
from aecore.steps.devices import Devices

_CPU_MEMORY = 2**30
"""Bytes that a network may need on a CPU, besides its inputs and outputs."""


class BatchKind(NamedTuple):
    """What a program is compiled for, besides the number of images."""

    shape: Size
    """Height and width of the arrays that images are put into."""
    dtype: np.dtype
    channels: int


class Program(NamedTuple):
    """What one compiled program restores."""

    kind: BatchKind
    images: int
    """How many each device restores."""
    within: bool
    """Whether images are smaller than their arrays; then `(images, 2)` sizes follow."""
    on_all: bool
    """Whether it runs on all devices."""


class Programs:
    """Compiles a network for kinds of batches and runs it; safe to use from several threads.

    Args:
      network: what to run.
      params: its parameters.
      precision: `"float32"` or `"bfloat16"`.
      devices: of one platform; what is more than a batch is divided among them.
      must_fit: of a kind, whether to refuse it if it needs more memory than it should.
    """

    def __init__(
        self,
        network: Network,
        params: Any,
        precision: Literal["float32", "bfloat16"],
        devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
        must_fit: Callable[[BatchKind], bool],
    ):
        self.devices = tuple(devices)
        self._network = network
        self._computed = network.in_precision(precision)
        self._params = params
        self._must_fit = must_fit
        self._all = Devices(devices)
        self._known: dict[Any, Any] = {}
        self._lock = threading.RLock()

    @property
    def compiled(self) -> dict[Program, Any]:
        """What has been compiled."""
        return {key: known for key, known in self._known.items() if isinstance(key, Program)}

    def start(
        self, kind: BatchKind, count: int, batch: np.ndarray, sizes: np.ndarray
    ) -> list[jax.Array]:
        """Begins to restore batches of a kind, on as many devices as there are batches.

        Args:
          kind: of the batches.
          count: how many images make a batch.
          batch: `(n * count, H, W, C)`, at most one batch for each device.
          sizes: `(n * count, 2)`: what of the arrays the images fill.

        Returns:
          The restored arrays, one after the other.

        Raises:
          OutOfMemoryError: the memory does not suffice, or would be more than it should be.
        """
        smaller = (sizes != kind.shape).any(axis=1).reshape(-1, count).any(axis=1)
        on_all = len(self.devices) > 1 and len(set(smaller)) == 1
        # One batch goes to all devices, most of which then have nothing to do, only if that saves
        # compiling.
        if len(smaller) == 1 and Program(kind, count, bool(smaller[0]), True) not in self._known:
            on_all = False
        if on_all:
            missing = count * (len(self.devices) - len(smaller))
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            sizes = np.concatenate([sizes, np.full((missing, 2), kind.shape, sizes.dtype)])
            parts = [(batch, sizes, bool(smaller[0]))]
        else:
            split = np.split(batch, len(smaller)), np.split(sizes, len(smaller))
            parts = list(zip(*split, map(bool, smaller), strict=True))
        try:
            restored = []
            for images, extents, within in parts:
                execute = self._compiled(Program(kind, count, within, on_all))
                arrays = (images, extents) if within else (images,)
                arrays = jax.device_put(arrays, self._sharding(on_all))
                restored.append(execute(self._placed(on_all), arrays))
            return restored
        except jax.errors.JaxRuntimeError as error:
            raise as_out_of_memory(error, kind) from error

    def in_parts(
        self, method: Literal["encode", "decode"], batch: np.ndarray, most: int
    ) -> np.ndarray:
        """Another function of the network, on `(N, ., ., .)` float32, some at a time.

        Args:
          method: which.
          batch: what it takes.
          most: how many a device computes at a time.

        Raises:
          jax.errors.JaxRuntimeError: the device's memory does not suffice.
        """
        on_all = len(batch) > most and len(self.devices) > 1
        function = self._once(
            (method, on_all), lambda: self._function(getattr(self._computed, method), on_all)
        )
        most *= len(self.devices) if on_all else 1
        parts = []
        for start in range(0, len(batch), most):
            part = batch[start : start + most]
            count = len(part)
            if count < most and (start or on_all):
                # Filled up, as another size would be compiled anew.
                part = np.pad(part, [(0, most - count), (0, 0), (0, 0), (0, 0)])
            part = jax.device_put(part, self._sharding(on_all))
            parts.append(jax.device_get(function(self._placed(on_all), (part,)))[:count])
        return np.concatenate(parts)

    def _compiled(self, program: Program) -> Callable:
        """The compiled `(params, arrays) -> batch`.

        Raises:
          OutOfMemoryError: it would need more memory than it should.
        """
        return self._once(program, lambda: self._compile(program))

    def _compile(self, program: Program) -> Callable:
        kind, count, within, on_all = program
        apply = self._computed.apply_within if within else self._computed.apply
        gray_for_colour = kind.channels != self._network.channels
        is_float = kind.dtype.kind == "f"
        highest = 1.0 if is_float else float(np.iinfo(kind.dtype).max)

        def restore(params, batch, *sizes):
            pixels = batch.astype(jnp.float32) / highest
            if gray_for_colour:
                pixels = pixels.repeat(self._network.channels, axis=3)
            restored = apply(params, pixels, *sizes)
            if gray_for_colour:
                restored = restored.mean(axis=3, keepdims=True)
            restored = jnp.clip(restored, 0.0, 1.0)
            return restored if is_float else jnp.rint(restored * highest).astype(kind.dtype)

        total = count * (len(self.devices) if on_all else 1)
        specs: list[tuple[tuple[int, ...], Any]] = [
            ((total, *kind.shape, kind.channels), kind.dtype)
        ]
        if within:
            specs.append(((total, 2), np.int32))
        sharding = self._sharding(on_all)
        arrays = tuple(jax.ShapeDtypeStruct(*spec, sharding=sharding) for spec in specs)
        try:
            compiled = self._function(restore, on_all).lower(self._placed(on_all), arrays).compile()
        except jax.errors.JaxRuntimeError as error:
            raise as_out_of_memory(error, kind) from error
        analysis = compiled.memory_analysis()
        needed = 0 if analysis is None else analysis.temp_size_in_bytes
        if needed > self._memory and self._must_fit(kind):
            raise OutOfMemoryError(kind, share=self._memory / needed)
        return compiled

    @functools.cached_property
    def _memory(self) -> float:
        limit = memory.limit(self.devices[0])
        return _CPU_MEMORY if limit is None else limit / 4

    @property
    def field(self) -> ReceptiveField | None:
        """The network's receptive field; None if it sees the whole image at once."""
        return self._once("field", lambda: self._network.receptive_field(self._params))

    @property
    def can_share(self) -> bool:
        """Whether images can be restored within larger arrays."""
        return self._once("can share", lambda: fits_within(self._network, self._params))

    def _placed(self, on_all: bool) -> Any:
        """The parameters, on the first device or on all."""
        sharding = self._all.replicated if on_all else self._sharding(False)
        return self._once(("params", on_all), lambda: jax.device_put(self._params, sharding))

    def _sharding(self, on_all: bool) -> jax.sharding.Sharding:
        """Of arrays that the first device holds, or of which each device holds a part."""
        return self._all.sharded if on_all else jax.sharding.SingleDeviceSharding(self.devices[0])

    def _function(self, function: Callable, on_all: bool) -> Any:
        """A function `(params, *arrays)`, jitted as `(params, arrays)`, for the devices."""

        def on_one(params, arrays):
            return function(params, *arrays)

        return jax.jit(
            self._all.divided(function) if on_all else on_one,
            compiler_options=self._all.options,
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Makes something once, in one thread, while others wait for it."""
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
            return self._known[key]


class OutOfMemoryError(Exception):
    """The device's memory does not suffice for a batch of a kind.

    Args:
      kind: of the batch.
      share: of the memory that it needs, how much there is; None if it was tried and failed, so
        that this isn't known.
    """

    def __init__(self, kind: BatchKind, share: float | None = None):
        super().__init__()
        self.kind = kind
        self.is_expected = share is not None
        # Without a measurement, a tile of half the side is tried.
        self.share = 0.25 if share is None else min(share, 0.9)


def as_out_of_memory(error: Exception, kind: BatchKind) -> Exception:
    """An `OutOfMemoryError` if memory ran out; else the same error."""
    return OutOfMemoryError(kind) if memory.ran_out(error) else error
