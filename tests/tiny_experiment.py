"""An experiment file, run by tests as a process of its own: 93 steps an epoch on the sample."""

import aecore
from aecore.cli import main
from aecore.degradations import GaussianNoise
from aecore.models import NoiseReducer

experiment = aecore.Experiment(
    name="tiny",
    model=NoiseReducer(features=(4,)),
    degradation=GaussianNoise(0.4),
    data=aecore.Data(dataset="sample"),
    training=aecore.Training(batch_size=64, epochs=2, checkpoint_every=20, log_every=10),
)

if __name__ == "__main__":
    main(experiment)
