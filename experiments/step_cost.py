"""Speed of a training step of different networks, in images/s.

    python experiments/step_cost.py

The networks train in turns on random images of Fashion-MNIST's size in batches of 32, without input
pipeline. Medians of 5 repeats on 2 CPU cores: NoiseReducer 10,264 images/s, SubpixelAutoencoder
10,832 (1.06 times as many), UNet 596.
"""

import tyro

import aecore
from aecore import models
from aecore.degradations import GaussianNoise
from aecore.measuring import benchmarking
from aecore.networks.base import abstract_params
from aecore.steps import state
from aecore.training import assembly

SHAPE = (28, 28, 1)
NETWORKS = {
    "NoiseReducer": models.NoiseReducer(),
    "SubpixelAutoencoder": models.SubpixelAutoencoder(),
    "UNet (32, 64), patch 2": models.UNet((32, 64), patch=2, residual=False),
}


def assembled(model, batch_size: int) -> assembly.Assembly:
    experiment = aecore.Experiment(
        name="step",
        model=model,
        degradation=GaussianNoise(0.4),
        training=aecore.Training(batch_size=batch_size),
    )
    return assembly.assemble(experiment, SHAPE, assembly.devices(experiment.training), last_step=1)


def main(batch_size: int = 32, seconds: float = 2.0, repeats: int = 7) -> None:
    """Prints images per second of each network.

    Args:
        batch_size: Images a step.
        seconds: How long each measurement lasts.
        repeats: Measurements of each network.
    """
    rates = benchmarking.take_turns(
        {
            name: benchmarking.one_batch(assembled(model, batch_size))
            for name, model in NETWORKS.items()
        },
        seconds,
        repeats,
    )
    first = rates["NoiseReducer"]["median"]
    for name, rate in rates.items():
        parameters = state.count_parameters(abstract_params(NETWORKS[name], SHAPE))
        print(
            f"{name:24}{parameters:9,} parameters{rate['median']:10,.0f} images/s "
            f"({rate['lowest']:,.0f} to {rate['highest']:,.0f}){rate['median'] / first:7.2f} x"
        )


if __name__ == "__main__":
    tyro.cli(main)
