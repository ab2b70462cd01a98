import dataclasses
import json

import pytest

from aecore import Data, Experiment, Optimizer, Training, config
from aecore.degradations import Compose, GaussianBlur, GaussianNoise, Pixelate
from aecore.errors import ConfigError
from aecore.models import Autoencoder, NoiseReducer, ResolutionEnhancer


@pytest.mark.parametrize(
    "experiment",
    [
        Experiment("a", NoiseReducer(features=(4, 8, 16)), GaussianNoise((0.1, 0.5))),
        Experiment(
            "b",
            ResolutionEnhancer(channels=1),
            Compose((GaussianBlur(1.0), Pixelate((0.3, 0.5)), GaussianNoise(0.1))),
            Data(dataset="folder", data_dir="x", image_size=(32, 48), channels=1),
            Optimizer(learning_rate=0.01),
            Training(steps=7, patience=2, seed=5),
            run_dir="elsewhere",
        ),
    ],
)
def test_an_experiment_survives_json(experiment):
    text = json.dumps(config.to_json(experiment))
    assert config.from_json(json.loads(text)) == experiment


def test_json_names_nothing_outside_the_registries():
    class Unregistered(Autoencoder):
        channels: int = 1
        stride: int = 1

    experiment = Experiment("a", Unregistered(), GaussianNoise(0.1))
    description = config.to_json(experiment)
    with pytest.raises(ConfigError, match="'Unregistered' is not registered.*pass model="):
        config.from_json(description)
    assert config.from_json(description, model=Unregistered()).degradation == GaussianNoise(0.1)

    description["model"] = {"type": "os.system", "command": "false"}
    with pytest.raises(ConfigError, match="not registered"):
        config.from_json(description)
    description["model"] = {"type": "NoiseReducer", "no_such_field": 1}
    with pytest.raises(ConfigError, match="no_such_field"):
        config.from_json(description)


def test_a_field_without_a_form_in_json_is_refused():
    class Typed(Autoencoder):
        dtype: type = float

    with pytest.raises(ConfigError, match="not JSON serializable"):
        config.to_json(Experiment("a", Typed(), GaussianNoise(0.1)))


def test_differences_name_fields_by_their_flags():
    old = config.to_json(Experiment("a", NoiseReducer(), GaussianNoise(0.1)))
    new = config.to_json(
        Experiment(
            "a",
            NoiseReducer(),
            GaussianNoise(0.2),
            optimizer=Optimizer(learning_rate=0.1),
            training=Training(epochs=3),
        )
    )
    assert config.differences(old, new, frozenset({"training.epochs"})) == [
        "degradation.sigma: 0.1 -> 0.2",
        "optimizer.learning_rate: 0.001 -> 0.1",
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Training(epochs=0), "training.epochs 0 is less than 1"),
        (lambda: Training(batch_size=-3), "training.batch_size -3"),
        (lambda: Training(steps=0), "training.steps 0"),
        (lambda: Training(keep=0), "training.keep 0"),
        (lambda: Training(min_delta=-1.0), "training.min_delta"),
        (lambda: Optimizer(learning_rate=0.0), "optimizer.learning_rate"),
        (lambda: Data(image_size=(0, 80)), "not a height and a width"),
        (
            lambda: Experiment("a", NoiseReducer(), GaussianNoise(), Data(image_size=(8, 80))),
            "8x80 is too small for SSIM; use --data.image-size with at least 11 11",
        ),
        (lambda: Data(channels=2), "data.channels 2"),
        (lambda: Data(validation_fraction=1.0), "data.validation_fraction"),
        (lambda: Experiment("", NoiseReducer(), GaussianNoise()), "name is empty"),
        (lambda: Experiment("a", NoiseReducer(), 0.4), "not a Degradation"),
        (
            lambda: Experiment("a", NoiseReducer, GaussianNoise()),
            r"use one such as NoiseReducer\(\)",
        ),
        (lambda: Compose((1, 2)), "not a tuple of degradations"),
        (lambda: NoiseReducer(features=3), "can't have features 3"),
        (lambda: Data(image_size=28), "not a height and a width"),
        (lambda: Training(batch_size=32.0), "not a whole number"),
        (
            lambda: Experiment("a", NoiseReducer(), GaussianNoise(), Data(image_size=(30, 45))),
            "multiple of 4.*--data.image-size 28 44 or 32 48",
        ),
        (
            lambda: Experiment(
                "a", NoiseReducer(), GaussianNoise(), Data(image_size=(32, 32), channels=3)
            ),
            "3 channels.*takes 1.*--data.channels 1",
        ),
    ],
)
def test_settings_are_checked_when_built(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_experiments_are_hashable_and_frozen():
    experiment = Experiment("a", NoiseReducer(), GaussianNoise())
    assert hash(experiment) == hash(Experiment("a", NoiseReducer(), GaussianNoise()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.name = "b"
