"""What CPUs need for convolutions: that these are computed on all cores."""

import functools
import os
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
