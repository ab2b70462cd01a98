"""Training steps on a GPU, with and without the CUDA graphs that `aecore.steps.gpu` asks for.

    python experiments/gpu_recording.py

Both forms take turns, several steps a call, on images held on the device; medians of seven, in
microseconds a step. On one GPU alone, as aecore records nothing more on several.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from aecore import Experiment, Training
from aecore.degradations import GaussianNoise, Pixelate
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


class Loop:
    """A training under way, without anything but its steps."""

    def __init__(self, model, degradation, shape, batch_size, precision):
        training = Training(batch_size=batch_size, feed="resident", precision=precision, devices=1)
        experiment = Experiment("recording", model, degradation, training=training)
        devices = assembly.devices(training)
        assembled = assembly.assemble(experiment, shape, devices, last_step=10**6)
        images = np.random.default_rng(0).integers(0, 256, (128 * batch_size, *shape), np.uint8)
        self.feed = feeds.create(images, degradation, training, assembled)
        self.state = devices.compile_create(assembled.create)()
        self.step = 0
        self.run(1)
        self.feed.seconds_per_step(1e-6)  # From now on, as many steps a call as there may be.

    def run(self, calls: int) -> float:
        """Seconds a step."""
        first, begin = self.step, time.perf_counter()
        for _ in range(calls):
            self.state, losses, count = self.feed.launch(self.state, self.step, 1 << 30)
            self.step += count
        jax.block_until_ready(losses)
        return (time.perf_counter() - begin) / (self.step - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STEPS, help="one of the steps")
    parser.add_argument("--calls", type=int, default=2, help="calls of 128 steps each")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    recording = gpu.recording
    for name, settings in STEPS.items():
        if given.only not in (None, name):
            continue
        gpu.recording = lambda device: None
        loops = {"not recorded": Loop(*settings)}
        gpu.recording = recording
        loops["recorded"] = Loop(*settings)
        found = {form: [] for form in loops}
        for _ in range(given.repeats):
            for form, loop in loops.items():
                found[form].append(1e6 * loop.run(given.calls))
        medians = {form: f"{statistics.median(times):,.0f} us" for form, times in found.items()}
        print(f"{name}: {medians}", flush=True)


if __name__ == "__main__":
    main()
