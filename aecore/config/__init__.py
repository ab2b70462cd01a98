"""What an experiment is: frozen dataclasses, checked when they are built."""

from aecore.config.experiment import Data, Experiment, Optimizer, Training

__all__ = ["Data", "Experiment", "Optimizer", "Training"]
