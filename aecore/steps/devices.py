"""The compiled forms of a step: the batch is divided among devices, the state is on each of them.

Every form runs the same function on every device, and they share one state and one format of
checkpoints. Where several processes train together, each puts its share of a batch on its own
devices; shares follow one another in the order of the processes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecore.errors import ConfigError

AXIS = "batch"
"""Name of the devices' axis."""

_RUNS_ONCE = {"xla_backend_optimization_level": 1}
"""Compiler options of a program whose optimization would take longer than its only run."""


def join_processes(distributed: str | None) -> None:
    """Connects this process with those that train with it; must come before JAX is used.

    Args:
      distributed: `auto`, for clusters that JAX knows (TPU pods, Slurm, Open MPI, Kubernetes);
        `HOST:PORT,COUNT,INDEX`, the first process's address, how many processes there are and
        which of them this one is; or None for one process alone.

    Raises:
      ConfigError: it is none of these, or the processes don't find each other.
    """
    if distributed is None or jax.distributed.is_initialized():
        return
    try:
        if distributed == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = distributed.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"training.distributed {distributed}: {error}; "
            "use auto on a cluster that JAX knows, elsewhere HOST:PORT,COUNT,INDEX"
        ) from error


class DataParallel:
    """`jit` over a one-dimensional mesh of devices.

    Args:
      devices: which to use; all of them by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        # A process's devices are neighbours, so that its share of a batch is in one piece.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        self.mesh = Mesh(np.asarray(devices), (AXIS,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.sharded = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self._processes = len({device.process_index for device in devices})

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
        """Which images of a batch are for this process; all, if it is alone."""
        size = batch_size // self._processes
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        """The leading axes of a batch on the devices."""
        return (batch_size,)

    def place_batch(self, share: Any, axis: int = 0) -> Any:
        """Puts a batch on the devices as a compiled training step takes it.

        Args:
          share: host arrays; where there are several processes, this one's share of the batch.
          axis: of the images; 1 for several batches, as `compile_train_steps` takes them.
        """
        return self.place(share, axis)

    def place(self, share: Any, axis: int = 0) -> Any:
        """Puts arrays, or this process's share of them, on the devices, divided along an axis."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))
        if self._processes == 1:
            return jax.device_put(share, sharding)
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, sharding), share
        )

    def replicate(self, tree: Any) -> Any:
        """Puts arrays, the same in every process, on every device."""
        return jax.device_put(tree, self.replicated)

    def abstract(self, create: Callable[[], Any]) -> Any:
        """The shapes, dtypes and shardings of what `create` returns."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            jax.eval_shape(create),
        )

    def compile_create(self, create: Callable[[], Any]) -> Callable:
        """Compiles `() -> state`, whose result is born on every device."""
        return jax.jit(create, out_shardings=self.replicated, compiler_options=_RUNS_ONCE)

    def compile_train_step(self, train_step: Callable) -> Callable:
        """Compiles `(state, batch) -> (state, loss)`; the state is donated.

        Args:
          train_step: `(state, share of the batch, axis_name=) -> (state, loss)`.
        """
        return self._compile(functools.partial(train_step, axis_name=AXIS), 0)

    def compile_train_steps(
        self, train_step: Callable, most: int, *, held: bool = False
    ) -> Callable:
        """Compiles `(state, batches, count) -> (state, losses)`; the state is donated.

        It does `count` steps, at most `most`, over `(S, B, ...)` batches that are on the devices;
        step n uses batch n modulo S.

        Args:
          train_step: as for `compile_train_step`.
          most: the length of `losses`; those from `count` on mean nothing.
          held: whether there is a fourth argument, arrays that are whole on every device. Each
            step's batch is then a pair of its own and of these.
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

            # The number of steps is an argument, so that the program, and each bit that a step
            # computes, is the same however the steps are divided among calls.
            return lax.fori_loop(0, count, body, (state, jnp.zeros(most, jnp.float32)))

        return self._compile(train_steps, 1, None, *[None] * held)

    def _compile(self, function: Callable, *axes: int | None) -> Callable:
        """Compiles `(state, *args) -> (state, value)`.

        Args:
          function: run on every device, with its shares of the arguments.
          axes: for each argument the axis that is divided, or None where all get the whole.
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
                # With it, gradients would be summed over devices before the mean is taken.
                check_vma=False,
            ),
            donate_argnums=0,
        )

    def compile_eval_step(self, eval_step: Callable) -> Callable:
        """Compiles `(params, images, indices) -> per-image values`, all of them on every device."""
        divided = jax.shard_map(
            eval_step,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )
        return jax.jit(divided, out_shardings=self.replicated)

    def hold(self, array: np.ndarray) -> jax.Array:
        """Puts `(N, ...)` images on the devices, divided among them; rows are added to even out."""
        shape = (self.round_up(len(array)), *array.shape[1:])
        pieces = []
        for device, index in self.sharded.addressable_devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(shape[0])
            piece = np.zeros((stop - start, *shape[1:]), array.dtype)
            real = array[start:stop]
            piece[: len(real)] = real
            pieces.append(jax.device_put(piece, device))
        return jax.make_array_from_single_device_arrays(shape, self.sharded, pieces)

    def compile_arrange(self) -> Callable:
        """Compiles `(held images, (S, B) indices) -> (S, B, ...) batches` for `train_steps`."""
        return jax.jit(
            lambda held, indices: held[indices],
            out_shardings=NamedSharding(self.mesh, PartitionSpec(None, AXIS)),
        )


class Pmap(DataParallel):
    """`jax.pmap`. The state has no device axis, so that it is the state of the other form too."""

    def batch_shape(self, batch_size):
        return (self.device_count, batch_size // self.device_count)

    def place_batch(self, share, axis=0):
        count = self.device_count // self._processes
        return self.place(
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

        return jax.jit(arrange, out_shardings=NamedSharding(self.mesh, PartitionSpec(None, AXIS)))

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

        def with_global_state(state, *args):
            # pmap gives each process its own copy of what is one array over all processes.
            state, value = compiled(state, *args)
            return multihost_utils.host_local_array_to_global_array(
                (state, value), self.mesh, PartitionSpec()
            )

        with_global_state.lower = compiled.lower
        return with_global_state


FORMS = {"jit": DataParallel, "pmap": Pmap}
