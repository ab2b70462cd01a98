"""Limits of a device: published for TPUs, measured for others."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aecore import memory


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one JAX device; None where unknown."""

    flops: float | None
    """Floating-point operations per second in matrix products, in the network's precision."""
    bandwidth: float | None
    """Bytes per second from and to the device's memory."""
    memory: int | None
    """Bytes of the device's memory."""
    link: float | None = None
    """Bytes per second that the device sends to others."""


_GIB = 2**30

# Per JAX device, for bfloat16, in which TPUs also multiply float32. From the pages "TPU v2" to
# "TPU7x" of Google Cloud's documentation, which give figures per chip: a chip of v2, v3 and 7x has
# two devices, of the others one.
_TPUS = {
    "TPU v2": Limits(46e12 / 2, 700e9 / 2, 8 * _GIB, 248e9 / 2),
    "TPU v3": Limits(123e12 / 2, 900e9 / 2, 16 * _GIB, 328e9 / 2),
    "TPU v4": Limits(275e12, 1228e9, 32 * _GIB, 300e9),
    "TPU v5 lite": Limits(197e12, 819e9, 16 * _GIB, 200e9),
    "TPU v5": Limits(459e12, 2765e9, 95 * _GIB, 600e9),
    "TPU v6 lite": Limits(918e12, 1640e9, 32 * _GIB, 448e9),
    "TPU7x": Limits(2307e12 / 2, 7380e9 / 2, 96 * _GIB, 1200e9 / 2),
}


def limits(device: Any, precision: str) -> Limits:
    """The limits of a device; measured unless it is a TPU, which may not be there.

    Args:
      device: a JAX device.
      precision: `float32` or `bfloat16`.
    """
    if device.platform == "tpu":
        return _TPUS.get(device.device_kind, Limits(None, None, None))
    available = memory.limit(device)
    if available is None and device.platform == "cpu":
        available = memory.physical()
    # A CPU's caches serve most of what XLA counts as memory traffic, so its memory isn't the limit.
    bandwidth = None if device.platform == "cpu" else copy_bandwidth(device)
    return Limits(matrix_rate(device, precision), bandwidth, available)


def matrix_rate(device: Any, precision: str) -> float:
    """Floating-point operations per second of a large product of square matrices."""
    size = 2048 if device.platform == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision))
    seconds = median_seconds(jax.jit(jnp.matmul), *jax.device_put((matrix, matrix), device))
    return 2 * size**3 / seconds


def copy_bandwidth(device: Any) -> float:
    """Bytes per second, read and written, while a large array is negated."""
    size = 2**26 if device.platform == "cpu" else 2**29
    array = jax.device_put(jnp.ones(size, jnp.float32), device)
    return 2 * array.nbytes / median_seconds(jax.jit(jnp.negative), array)


def median_seconds(function: Callable, *args: Any, repeats: int = 7) -> float:
    """Median time of a call until its result is ready, after two calls to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
