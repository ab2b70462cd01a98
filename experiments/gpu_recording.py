"""Training steps on a GPU, with and without the CUDA graphs that `aecore.steps.gpu` asks for.

    python experiments/gpu_recording.py

Both forms take turns, several steps a call, on images held on the device; medians of seven, in
microseconds a step. On one GPU alone, as aecore records nothing more on several.
"""

import time

import jax
import numpy as np
import tyro

from aecore import Experiment, Training
from aecore.degradations import GaussianNoise, Pixelate
from aecore.measuring import benchmarking
from aecore.models import NoiseReducer, ResolutionEnhancer, UNet
from aecore.steps import gpu
from aecore.training import assembly, feeds

STEPS = {
    "denoise": (NoiseReducer(), GaussianNoise(0.4), (28, 28, 1), 32, "float32"),
    "denoise, large batch": (NoiseReducer(), GaussianNoise(0.4), (28, 28, 1), 256, "bfloat16"),
    "unet": (
        UNet(features=(32, 64, 96), channels=3, patch=2),
        GaussianNoise(0.1),
        (64, 64, 3),
        16,
        "bfloat16",
    ),
    "enhance, small batch": (ResolutionEnhancer(), Pixelate(0.4), (80, 80, 3), 16, "float32"),
    "enhance": (ResolutionEnhancer(), Pixelate(0.4), (80, 80, 3), 128, "bfloat16"),
}


def training(model, degradation, shape, batch_size, precision):
    """Does steps for some seconds, and returns how many images these took."""
    settings = Training(batch_size=batch_size, feed="resident", precision=precision, devices=1)
    experiment = Experiment("recording", model, degradation, training=settings)
    devices = assembly.devices(settings)
    assembled = assembly.assemble(experiment, shape, devices, last_step=10**6)
    images = np.random.default_rng(0).integers(0, 256, (128 * batch_size, *shape), np.uint8)
    feed = feeds.create(images, degradation, settings, assembled)
    feed.seconds_per_step(1e-6)  # As many steps a call as there may be.
    state = devices.compile_create(assembled.create)()
    step = 0

    def work(seconds: float) -> int:
        nonlocal state, step
        first, end = step, time.perf_counter() + seconds
        while time.perf_counter() < end:
            state, losses, count = feed.launch(state, step, 1 << 30)
            jax.block_until_ready(losses)
            step += count
        return (step - first) * batch_size

    return work


def main(only: str | None = None, seconds: float = 1.0, repeats: int = 7) -> None:
    """Prints microseconds a step.

    Args:
        only: One of the steps; all if it is left out.
        seconds: How long each measurement lasts.
        repeats: Measurements of each.
    """
    recording = gpu.recording
    for name in [only] if only else STEPS:
        gpu.recording = lambda device: None
        works = {"not recorded": training(*STEPS[name])}
        gpu.recording = recording
        works["recorded"] = training(*STEPS[name])
        rates = benchmarking.take_turns(works, seconds, repeats)
        batch_size = STEPS[name][3]
        print(f"{name:24}", end="")
        for form, rate in rates.items():
            print(f"{1e6 * batch_size / rate['median']:10,.0f} us {form}", end="")
        print(flush=True)


if __name__ == "__main__":
    tyro.cli(main)
