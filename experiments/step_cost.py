"""What a training step of each network costs, side by side: images/s, in turns.

    python experiments/step_cost.py

Fashion-MNIST's size, batches of 32, no input pipeline. On 2 CPU cores, medians of 5 repeats:
NoiseReducer 10,264 images/s, SubpixelAutoencoder 10,832, 1.06 times as many, UNet 596.
"""

import functools
import statistics
import time

import jax
import numpy as np
import tyro

import aecore
from aecore import assembly, models, state, steps
from aecore.degradations import GaussianNoise

NETWORKS = {
    "NoiseReducer": models.NoiseReducer(),
    "SubpixelAutoencoder": models.SubpixelAutoencoder(),
    "UNet (32, 64), patch 2": models.UNet((32, 64), patch=2, residual=False),
}


def stepping(model, batch_size: int):
    """A function that trains for some seconds on one batch, and returns images/s."""
    experiment = aecore.Experiment(
        name="step",
        model=model,
        degradation=GaussianNoise(0.4),
        training=aecore.Training(batch_size=batch_size),
    )
    devices = assembly.devices(experiment.training)
    parts = assembly.assemble(experiment, (28, 28, 1), devices, last_step=1)
    step = devices.compile_train_step(functools.partial(parts.train_step, prepare=steps.pairs))
    images = np.random.default_rng(0).random((batch_size, 28, 28, 1), np.float32)
    batch = devices.place_batch((images, images))
    current, loss = step(devices.compile_create(parts.create)(), batch)
    jax.block_until_ready(loss)

    def run(seconds: float) -> float:
        nonlocal current
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            for _ in range(4):
                current, loss = step(current, batch)
            jax.block_until_ready(loss)
            count += 4 * batch_size
        return count / (time.perf_counter() - start)

    return run


def main(batch_size: int = 32, seconds: float = 2.0, repeats: int = 7) -> None:
    """Prints images per second of each network.

    Args:
        batch_size: Images a step.
        seconds: How long each measurement lasts.
        repeats: Measurements of each network.
    """
    runs = {name: stepping(model, batch_size) for name, model in NETWORKS.items()}
    rates = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            rates[name].append(run(seconds))
    first = statistics.median(rates["NoiseReducer"])
    for name, values in rates.items():
        parameters = state.count_parameters(state.abstract_params(NETWORKS[name], (28, 28, 1)))
        median = statistics.median(values)
        print(
            f"{name:24}{parameters:9,} parameters{median:10,.0f} images/s "
            f"({min(values):,.0f} to {max(values):,.0f}){median / first:7.2f} x"
        )


if __name__ == "__main__":
    tyro.cli(main)
