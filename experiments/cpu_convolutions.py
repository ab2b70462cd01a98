"""3×3 convolutions on this machine's CPU and their gradients: aecore's beside the compiler's own.

    python experiments/cpu_convolutions.py

Three forms take turns: XLA's convolution as JAX compiles it by default, the same with the options
of `aecore.steps.cpu`, and aecore's `lowering.convolution.conv` with these options. Medians are
printed in GFLOP/s, counted as those of a direct convolution, whatever is really computed. Within a
loop the compiler's own gradient of the kernel is up to a hundred times slower yet.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from aecore.measuring import benchmarking
from aecore.networks.lowering import convolution
from aecore.steps import cpu

SHAPES = [
    (8, 32, 32, 32, 32),
    (8, 16, 16, 64, 64),
    (8, 8, 8, 96, 96),
    (1, 80, 80, 256, 128),
    (1, 80, 80, 256, 3),
    (1, 244, 164, 48, 48),
]
"""Batch, height, width, channels, features."""


def plain(images, kernel):
    """The compiler's own convolution."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)


def gradient(conv, argument, images, kernel, cotangent):
    """The gradient of one argument."""
    return jax.vjp(conv, images, kernel)[1](cotangent)[argument]


def main(seconds: float = 0.3, repeats: int = 5) -> None:
    """Prints GFLOP/s.

    Args:
        seconds: How long each measurement lasts.
        repeats: Measurements of each.
    """
    options = cpu.on_all_cores(jax.devices("cpu")[0])
    forms = {"by default": (plain, None), "options": (plain, options)}
    forms["aecore"] = (convolution.conv, options)
    for shape in SHAPES:
        batch, height, width, channels, features = shape
        random = np.random.default_rng(0)
        arrays = [
            jnp.asarray(random.standard_normal(of, np.float32))
            for of in (
                (batch, height, width, channels),
                (3, 3, channels, features),
                (batch, height, width, features),
            )
        ]
        for name, argument in (("conv", None), ("of images", 0), ("of kernel", 1)):
            works = {}
            for form, (conv, chosen) in forms.items():
                if argument is None:
                    function, args = conv, arrays[:2]
                else:
                    function, args = functools.partial(gradient, conv, argument), arrays
                program = jax.jit(function, compiler_options=chosen)
                works[form] = _calls(program, args)
            rates = benchmarking.take_turns(works, seconds, repeats)
            operations = 18 * batch * height * width * channels * features
            print(f"{shape!s:24} {name:10}", end="")
            for form, rate in rates.items():
                print(f"  {form} {operations * rate['median'] / 1e9:5.0f}", end="")
            print(flush=True)


def _calls(program, args):
    """Calls a program for some seconds, and returns how often."""

    def work(seconds):
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            jax.block_until_ready(program(*args))
            count += 1
        return count

    return work


if __name__ == "__main__":
    tyro.cli(main)
