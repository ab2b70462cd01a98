"""What GPUs need for training: cuDNN initialized, and steps recorded as CUDA graphs."""

import functools
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_log = logging.getLogger(__name__)

_FLAG = "xla_gpu_enable_command_buffer"

_RECORDED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION,WHILE"
"""What XLA puts into CUDA graphs, the last two besides its default. The host then starts a call's
steps at once instead of each kernel. On an H100 a step of the denoise recipe takes 182 us instead
of 434, and one of the enhance recipe, batch 128, 3 % less."""


@functools.cache
def initialize(device: Any) -> None:
    """Uses cuDNN once on a GPU, which initializes it.

    XLA does so at a process's first convolution. Where a program came from the compilation cache,
    that was while it ran, beside other threads that compile; of five such runs on an H100 (JAX
    0.11.2) one failed with `cudnn status 5003`, and of those that recorded their steps, most.

    Args:
      device: a JAX device of this process.
    """
    jax.block_until_ready(jax.jit(_convolved)(_image(device)))


@functools.cache
def recording(device: Any) -> dict[str, str] | None:
    """Compiler options with which a GPU records a program's convolutions and loops.

    None if `XLA_FLAGS` says what is recorded, or if this device or this XLA can't do it.

    Args:
      device: a JAX device of this process, for which `initialize` was called.
    """
    if _FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    options, image = {_FLAG: _RECORDED}, _image(device)

    def program(image, count):
        return lax.fori_loop(0, count, lambda _, image: _convolved(image), image)

    try:
        count = jax.device_put(np.int32(3), device)
        found = jax.jit(program, compiler_options=options)(image, count)
        is_right = np.array_equal(*jax.device_get((found, image)))
    except jax.errors.JaxRuntimeError as error:
        _log.warning("steps are not recorded, which makes small ones slower: %s", error)
        return None
    return options if is_right else None


def _image(device: Any) -> jax.Array:
    return jax.device_put(np.arange(256, dtype=np.float32).reshape(1, 8, 8, 4), device)


def _convolved(image: jax.Array) -> jax.Array:
    """The image itself, without rounding in bfloat16 and TF32 too, as a convolution."""
    kernel = np.zeros((3, 3, 4, 4), np.float32)
    kernel[1, 1] = np.eye(4)
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.asarray(kernel)
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)
