"""Steps compiled for several devices: the batch is divided among them, each holds the state.

`Devices` compiles with `jit`, `PmapDevices` with `pmap`. Both run the same function on every device
and share one state and one checkpoint format. When several processes train together, each puts its
share of a batch on its own devices; shares are in the order of the processes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecore.errors import ConfigError
from aecore.steps import cpu, gpu

AXIS = "batch"
"""Name of the devices' axis."""

_RUNS_ONCE = {"xla_backend_optimization_level": 1}
"""Compiler options for a program that runs once, where optimizing would take longer than that."""


class Compiled(Protocol):
    """A function that `jit` or `pmap` compiles when it is first called, or ahead of that."""

    def __call__(self, *args: Any) -> Any: ...

    def lower(self, *args: Any) -> Any: ...


COMPILED_AHEAD = "/aecore/compile/ahead"
"""Name of the event that tells `jax.monitoring` how long a thread's compiling was waited for."""


def in_background(work: Callable[[], Any]) -> Callable[[], None]:
    """Begins to compile something, in a thread, that will soon be called.

    A later call of the same functions, with arguments of the same shapes, takes what was compiled.

    Returns:
      A function that waits for the thread, and raises what it raised. The first call tells
      `jax.monitoring` of the wait.
    """
    executor = ThreadPoolExecutor(1)
    future = executor.submit(work)
    executor.shutdown(wait=False)

    @functools.cache
    def wait() -> None:
        start = time.perf_counter()
        future.result()
        jax.monitoring.record_event_duration_secs(COMPILED_AHEAD, time.perf_counter() - start)

    return wait


def equally_many(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
    count: int,
) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """The first devices of each process, equally many of each: `count` in all.

    Raises:
      ConfigError: there are fewer, or the processes can't have equally many.
    """
    processes = sorted({device.process_index for device in devices})
    each, rest = divmod(count, len(processes))
    of_process = [
        [device for device in devices if device.process_index == process] for process in processes
    ]
    if count > len(devices):
        raise ConfigError(
            f"training.devices {count} is more than the {len(devices)} there are; "
            "use fewer, or None for all"
        )
    most = min(map(len, of_process))
    if rest or each > most:
        possible = sorted({min(max(n, 1), most) * len(processes) for n in (each, each + 1)})
        raise ConfigError(
            f"training.devices {count} can't be {len(processes)} processes' in equal parts; "
            f"use {' or '.join(map(str, possible))}"
        )
    return [device for own in of_process for device in own[:each]]


class Devices:
    """`jit` over a one-dimensional mesh of devices.

    Args:
      devices: the devices to use; all by default.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ):
        devices = jax.devices() if devices is None else devices
        # The devices of a process are neighbours, so that its share of a batch is contiguous.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        self.mesh = Mesh(np.asarray(devices), (AXIS,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.sharded = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self._processes = len({device.process_index for device in devices})
        if self.platform == "gpu":
            for device in self.mesh.local_devices:
                gpu.initialize(device)

    @property
    def device_count(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.mesh.devices.flat[0].platform

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ConfigError unless the devices can divide the batch among them."""
        count = self.device_count
        if batch_size % count:
            lower, upper = batch_size // count * count, -(-batch_size // count) * count
            choice = f"{lower} or {upper}" if lower else f"{upper}"
            raise ConfigError(
                f"batch_size {batch_size} is not divisible by {count} devices; use {choice}"
            )

    def round_up(self, batch_size: int) -> int:
        """The smallest batch of at least `batch_size` that the devices can divide."""
        return -(-batch_size // self.device_count) * self.device_count

    def share(self, batch_size: int) -> slice:
        """The images of a batch that belong to this process; all, if it is the only one."""
        size = batch_size // self._processes
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        """The leading axes of a batch on the devices."""
        return (batch_size,)

    def _along(self, axis: int) -> NamedSharding:
        """Of arrays that are divided among the devices along an axis."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def shard_batch(self, share: Any, axis: int = 0) -> Any:
        """Puts a batch on the devices in the form that a compiled training step takes.

        Args:
          share: host arrays; with several processes, this one's share of the batch.
          axis: axis of the images; 1 for several batches, as `compile_train_steps` takes them.
        """
        return self.shard(share, axis)

    def shard(self, share: Any, axis: int = 0) -> Any:
        """Divides arrays, or this process's share of them, among the devices along an axis."""
        sharding = self._along(axis)
        if self._processes == 1:
            return jax.device_put(share, sharding)
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, sharding), share
        )

    def abstract_share(
        self, shape: tuple[int, ...], dtype: Any, axis: int = 0
    ) -> jax.ShapeDtypeStruct:
        """What is known beforehand of an array that `shard` divides along an axis."""
        sharding = self._along(axis)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def replicate(self, tree: Any) -> Any:
        """Puts arrays, which are the same in every process, on every device."""
        return jax.device_put(tree, self.replicated)

    def abstract(self, create: Callable[[], Any]) -> Any:
        """Shapes, dtypes and shardings of the state that `create` returns."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            jax.eval_shape(create),
        )

    def compile_create(self, create: Callable[[], Any]) -> Compiled:
        """Compiles `() -> state`; the state is created on every device."""
        return jax.jit(create, out_shardings=self.replicated, compiler_options=_RUNS_ONCE)

    def compile_train_step(self, train_step: Callable) -> Compiled:
        """Compiles `(state, batch) -> (state, loss)`; the state is donated.

        Args:
          train_step: `(state, share of the batch, axis_name=) -> (state, loss)`.
        """
        return self._compile(functools.partial(train_step, axis_name=AXIS), 0)

    def compile_train_steps(
        self, train_step: Callable, most: int, *, held: bool = False
    ) -> Compiled:
        """Compiles `(state, batches, count) -> (state, losses)`; the state is donated.

        It does `count` steps, at most `most`, on `(S, B, ...)` batches that are already on the
        devices; step n uses batch n modulo S.

        Args:
          train_step: as for `compile_train_step`.
          most: length of `losses`; entries from `count` on are undefined.
          held: whether there is a fourth argument: arrays that every device holds whole. A step
            then gets the pair of its batch and these arrays.
        """

        def train_steps(state, batches, count, *arrays):
            def body(index, carry):
                state, losses = carry
                batch = jax.tree.map(
                    lambda leaf: lax.dynamic_index_in_dim(
                        leaf, state.step % len(leaf), keepdims=False
                    ),
                    batches,
                )
                batch = (batch, *arrays) if held else batch
                state, loss = train_step(state, batch, axis_name=AXIS)
                return state, losses.at[index].set(loss)

            # The number of steps is an argument, so that there is one program, and each step gives
            # the same bits however the steps are divided among calls.
            return lax.fori_loop(0, count, body, (state, jnp.zeros(most, jnp.float32)))

        return self._compile(train_steps, 1, None, *[None] * held)

    def _compile(self, function: Callable, *axes: int | None) -> Compiled:
        """Compiles `(state, *args) -> (state, value)`.

        Args:
          function: runs on every device, with the device's share of the arguments.
          axes: for each argument the axis along which it is divided; None: every device gets all.
        """
        specs = tuple(
            PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
            for axis in axes
        )
        return jax.jit(
            jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), *specs),
                out_specs=PartitionSpec(),
                # The check would make gradients a sum over devices before the mean is taken.
                check_vma=False,
            ),
            donate_argnums=0,
            compiler_options=self._step_options(),
        )

    def _step_options(self) -> dict[str, str] | None:
        # Of several GPUs, each would also record what it tells the others; that is not tried out.
        if self.platform == "gpu" and self.device_count == 1:
            return gpu.recording(self.mesh.local_devices[0])
        return self.options

    @property
    def options(self) -> dict[str, str] | None:
        """Compiler options for programs that use networks."""
        return cpu.on_all_cores(self.mesh.local_devices[0]) if self.platform == "cpu" else None

    def divided(self, function: Callable) -> Callable:
        """`(params, *arrays) -> array` that runs a function on every device, on its share of each.

        Args:
          function: `(params, *shares) -> share`. What it computes does not depend on how many
            devices there are.
        """
        return jax.shard_map(
            lambda params, arrays: function(params, *arrays),
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )

    def compile_eval_step(self, eval_step: Callable) -> Compiled:
        """Compiles `(params, images, indices) -> per-image values`, given to every device."""
        divided = jax.shard_map(
            eval_step,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )
        return jax.jit(divided, out_shardings=self.replicated, compiler_options=self.options)

    def hold(self, array: np.ndarray) -> jax.Array:
        """Divides `(N, ...)` images among the devices; padded with zeros to equal shares."""
        shape = (self.round_up(len(array)), *array.shape[1:])
        pieces = []
        for device, index in self.sharded.addressable_devices_indices_map(shape).items():
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            piece = np.zeros((stop - start, *shape[1:]), array.dtype)
            real = array[start:stop]
            piece[: len(real)] = real
            pieces.append(jax.device_put(piece, device))
        return jax.make_array_from_single_device_arrays(shape, self.sharded, pieces)

    def compile_arrange(self) -> Compiled:
        """Compiles `(held images, (S, B) indices) -> (S, B, ...) batches` for `train_steps`."""
        return jax.jit(
            lambda held, indices: held[indices],
            out_shardings=self._along(1),
        )


class PmapDevices(Devices):
    """`jax.pmap` over the same devices. The state has no device axis, as with `jit`.

    `pmap` takes no compiler options, so CPUs compute convolutions as XLA does by default, and GPUs
    launch each kernel of a step by itself.
    """

    def batch_shape(self, batch_size):
        return (self.device_count, batch_size // self.device_count)

    def shard_batch(self, share, axis=0):
        count = self.device_count // self._processes
        return self.shard(
            jax.tree.map(
                lambda leaf: leaf.reshape(*leaf.shape[:axis], count, -1, *leaf.shape[axis + 1 :]),
                share,
            ),
            axis,
        )

    def compile_arrange(self):
        def arrange(held, indices):
            batches = held[indices]
            return batches.reshape(len(indices), self.device_count, -1, *batches.shape[2:])

        return jax.jit(arrange, out_shardings=self._along(1))

    def _compile(self, function, *axes):
        compiled = jax.pmap(
            function,
            AXIS,
            in_axes=(None, *axes),
            out_axes=None,
            devices=list(self.mesh.devices.flat),
            donate_argnums=0,
        )
        if self._processes == 1:
            return compiled

        return _WithGlobalState(compiled, self.mesh)


@dataclasses.dataclass(frozen=True)
class _WithGlobalState:
    """A pmapped function whose results, a copy in each process, become one array over all."""

    compiled: Compiled
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        results = self.compiled(*args)
        return multihost_utils.host_local_array_to_global_array(results, self.mesh, PartitionSpec())

    def lower(self, *args: Any) -> Any:
        return self.compiled.lower(*args)


COMPILED_BY = {"jit": Devices, "pmap": PmapDevices}
