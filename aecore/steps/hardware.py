"""What a device can do at most: known from its vendor, or measured."""

import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aecore.steps import memory


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one JAX device, which may be half a chip; None where a limit is not known."""

    flops: float | None = None
    """Floating-point operations per second in matrix products, in the network's precision."""
    bandwidth: float | None = None
    """Bytes per second that the device reads from and writes to its memory."""
    memory: int | None = None
    """Bytes of the device's memory."""
    link: float | None = None
    """Bytes per second that the device can send to other devices."""
    clock: float | None = None
    """Cycles per second, in which the compiler for TPUs estimates times."""
    network: float | None = None
    """Bytes per second that the device can send to other slices, over the data centre's network."""


_GIB = 2**30

# Per JAX device: half a chip for TPU v2, v3 and 7x, a whole chip for the others. `flops` is for
# bfloat16, in which TPUs by default compute the products of float32 too. The figures per chip are
# from Google Cloud's documentation, pages "TPU v2" to "TPU7x"; `link` is one direction of the
# inter-chip links. `network` is the bandwidth of a pod, or of a chip, divided by its devices, where
# those pages say it. `clock` is not in the documentation of all: it is `flops` divided by the
# operations per cycle of the device's matrix units, which are 1 (v2), 2 (v3), 8 (v4 and v5p) and 4
# (v5e) of 128x128, or 4 of 256x256 (v6e and 7x), at 2 operations per cycle for each cell.
_TPUS = {
    "TPU v2": Limits(23e12, 350e9, 8 * _GIB, 124e9, 0.70e9),
    "TPU v3": Limits(61.5e12, 450e9, 16 * _GIB, 164e9, 0.94e9),
    "TPU v4": Limits(275e12, 1228e9, 32 * _GIB, 300e9, 1.05e9),
    "TPU v5 lite": Limits(197e12, 819e9, 16 * _GIB, 200e9, 1.50e9, 3.125e9),
    "TPU v5": Limits(459e12, 2765e9, 95 * _GIB, 600e9, 1.75e9, 6.25e9),
    "TPU v6 lite": Limits(918e12, 1640e9, 32 * _GIB, 400e9, 1.75e9, 12.5e9),
    "TPU7x": Limits(1153.5e12, 3690e9, 96 * _GIB, 300e9, 2.20e9),
}

_NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""Settings that libtpu would otherwise look for, and complain on stderr that there are none."""


def quiet_libtpu(*, compiling_only: bool = False, device_files: Path = Path("/dev")) -> None:
    """Keeps libtpu from complaining on stderr that this machine has no TPU.

    Where libtpu is installed, JAX asks it for TPUs before it uses anything else. This changes
    nothing where there may be a TPU, and it must come before JAX looks for devices.

    Args:
      compiling_only: the process only compiles for TPUs. A TPU of this machine is not asked, and
        is left to other programs.
      device_files: folder of the device files through which TPUs, among other things, are used.
    """
    if compiling_only:
        # Without it, libtpu asks Google Cloud's metadata server, and waits where there is none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    elif (
        importlib.util.find_spec("libtpu") is None
        or any(device_files.glob("accel*"))
        or any(device_files.glob("vfio/[0-9]*"))
    ):
        return
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def keep_compiled() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, so that a restart is quick.

    Changes nothing where JAX was told of a folder, or where none can be written to.
    """
    known = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if known is not None:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aecore" / "jax"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # All programs: with a threshold, chance would decide for those near it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def limits(device: Any, precision: str) -> Limits:
    """The limits of a device: those of a TPU from a table, as it need not exist; else measured.

    Args:
      device: a JAX device.
      precision: `float32` or `bfloat16`.
    """
    if device.platform == "tpu":
        return _TPUS.get(device.device_kind, Limits())
    available = memory.limit(device)
    if available is None and device.platform == "cpu":
        available = memory.physical()
    # A CPU's caches serve most of what XLA counts as traffic, so its memory is no limit.
    bandwidth = None if device.platform == "cpu" else copy_bandwidth(device)
    return Limits(matrix_rate(device, precision), bandwidth, available)


def matrix_rate(device: Any, precision: str, *, quickly: bool = False) -> float:
    """Operations per second in a product of large square matrices; a multiply-add counts as two.

    Args:
      device: a JAX device.
      precision: `float32` or `bfloat16`.
      quickly: measure within a tenth of a second, with smaller matrices.
    """
    size = 2048 if device.platform == "cpu" else 8192
    if quickly:
        size //= 2
    # Few random numbers, repeated: on zeros, devices may be faster, and drawing so many takes long.
    drawn = np.random.default_rng(0).standard_normal(2**16, np.float32)
    matrix = np.resize(drawn.astype(jnp.dtype(precision)), (size, size))
    pair = jax.device_put((matrix, matrix), device)
    seconds = median_seconds(jax.jit(jnp.matmul), *pair, repeats=3 if quickly else 7)
    return 2 * size**3 / seconds


def operations_per_second(device: Any, precision: str) -> float | None:
    """What a device can do in matrix products: of a TPU as documented, else measured quickly."""
    if device.platform == "tpu":
        return _TPUS.get(device.device_kind, Limits()).flops
    return matrix_rate(device, precision, quickly=True)


def copy_bandwidth(device: Any) -> float:
    """Bytes per second that are read and written when a large array is negated."""
    size = 2**26 if device.platform == "cpu" else 2**29
    array = jax.device_put(jnp.ones(size, jnp.float32), device)
    return 2 * array.nbytes / median_seconds(jax.jit(jnp.negative), array)


def median_seconds(function: Callable, *args: Any, repeats: int = 7) -> float:
    """The median time from a call to its finished result, after two calls to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
