"""aecore with other tools: Weights & Biases, MLflow, tf.data, and PyTorch's DataLoader.

    pip install wandb && python experiments/other_tools.py wandb
    pip install mlflow && python experiments/other_tools.py mlflow

Both train the sample's denoiser and log its losses and scores. The two functions below them put a
trained network into an input pipeline. They are meant to be copied.
"""

from collections.abc import Iterator
from typing import Any, Literal

import tyro

import aecore
from aecore.experiments import catalogue
from aecore.saved.descriptions import describe


def train_with_wandb(experiment: aecore.Experiment, project: str = "aecore") -> dict[str, Any]:
    """Trains an experiment, and logs it to Weights & Biases."""
    import wandb

    with wandb.init(
        project=project, name=experiment.name, config=describe(experiment), resume="allow"
    ) as run:
        return aecore.train(
            experiment, callback=lambda step, scores: run.log(dict(scores), step=step)
        )


def train_with_mlflow(experiment: aecore.Experiment, project: str = "aecore") -> dict[str, Any]:
    """Trains an experiment, and logs it to MLflow."""
    import mlflow

    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=experiment.name):
        mlflow.log_dict(describe(experiment), "experiment.json")
        return aecore.train(
            experiment, callback=lambda step, scores: mlflow.log_metrics(dict(scores), step=step)
        )


def in_tf_data(restorer: aecore.Restorer, dataset: Any) -> Any:
    """A `tf.data.Dataset` of batches `(N, H, W, C)`, each of which is restored.

    Batch before this: the restorer computes a batch at once.
    """
    import tensorflow as tf

    def restored(images):
        count, *sides, channels = images.shape
        larger = [side and restorer.network.scale * side for side in sides]
        result = tf.numpy_function(restorer, [images], images.dtype)
        return tf.ensure_shape(result, (count, *larger, channels))

    return dataset.map(restored).prefetch(2)


def in_data_loader(restorer: aecore.Restorer, dataset: Any, **settings: Any) -> Iterator[Any]:
    """The batches `(N, H, W, C)` of a `torch.utils.data.DataLoader`, each of which is restored.

    The loader's workers read images; this process restores, as JAX doesn't survive a fork.
    """
    from torch.utils.data import DataLoader

    return map(restorer, DataLoader(dataset, **settings))


def main(tracker: Literal["wandb", "mlflow"]) -> None:
    """Trains the experiment `quickstart`.

    Args:
        tracker: Where losses and scores go.
    """
    train = {"wandb": train_with_wandb, "mlflow": train_with_mlflow}[tracker]
    train(catalogue.load("quickstart").experiment)


if __name__ == "__main__":
    tyro.cli(main)
