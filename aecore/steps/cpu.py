"""What CPUs need for training: convolutions on all cores, and memory that stays at hand."""

import ctypes
import functools
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

_FLAG = "xla_cpu_experimental_ynn_fusion_type"

_LIBRARY = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
"""What XLA leaves to the library YNNPACK: as by default, but for convolutions.

With JAX 0.10.2 that computes all but large ones on one core, and with 0.12 some of them slowly. On
2 cores, six convolutions of 48 channels on two images of 122×82 run at 139 GFLOP/s with it (with
JAX 0.12, 168), and at 275 (242) as XLA computes them without it."""


@functools.cache
def on_all_cores(device: Any) -> dict[str, str] | None:
    """Compiler options with which a CPU computes convolutions on all its cores.

    None if `XLA_FLAGS` says what YNNPACK computes, or if this XLA knows no such option.

    Args:
      device: a JAX device of this process.
    """
    if _FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    options = {_FLAG: _LIBRARY}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(jax.device_put(0.0, device)).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of `mallopt`'s parameters, as in glibc's `malloc.h`."""

_KEPT_BYTES = 2**28


def keep_memory() -> None:
    """Has this process keep memory that it no longer needs; it can't be undone.

    glibc gives large arrays back to the system at once. The next step asks for them again, and the
    system clears them page by page: on 2 cores, a step of a UNet for photographs (32, 64 and 96
    features, 16 crops of 64×64) takes 120 ms with that and 100 ms without. Arrays of more than
    256 MiB, and what is free beyond that at the end of the heap, are given back as before. Other C
    libraries, and versions of glibc that keep no arrays as large as that, are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # The second would end what glibc does by itself, so not without the first.
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, _KEPT_BYTES):
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
