"""Steps compiled for devices: the batch is divided among them, the state is on each of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aecore.errors import ConfigError


class DataParallel:
    """`jit` over a one-dimensional mesh of devices.

    Args:
      devices: which to use; all of them by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        self.mesh = Mesh(np.asarray(devices), ("batch",))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.sharded = NamedSharding(self.mesh, PartitionSpec("batch"))

    @property
    def device_count(self) -> int:
        return self.mesh.size

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

    def place(self, batch: Any) -> Any:
        """Puts arrays on the devices, divided along their first axis."""
        return jax.device_put(batch, self.sharded)

    def abstract(self, create: Any) -> Any:
        """The shapes, dtypes and shardings of what `create` returns."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            jax.eval_shape(create),
        )

    def compile_create(self, create: Any) -> Any:
        """Compiles `() -> state`, whose result is born on every device."""
        return jax.jit(create, out_shardings=self.replicated)

    def compile_train_step(self, train_step: Any) -> Any:
        """Compiles `(state, degraded, original) -> (state, loss)`; the state is donated."""
        return jax.jit(
            train_step,
            in_shardings=(self.replicated, self.sharded, self.sharded),
            out_shardings=(self.replicated, self.replicated),
            donate_argnums=0,
        )

    def compile_eval_step(self, eval_step: Any) -> Any:
        """Compiles `(params, images, indices) -> per-image values`."""
        return jax.jit(
            eval_step,
            in_shardings=(self.replicated, self.sharded, self.sharded),
            out_shardings=self.sharded,
        )
