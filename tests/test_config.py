import dataclasses
import json

import flax.linen as nn
import numpy as np
import pytest

from aecore import Data, Experiment, Optimizer, Training
from aecore.config.settings import OnResume, on_resume
from aecore.degradations import Compose, GaussianBlur, GaussianNoise, Pixelate
from aecore.errors import ConfigError
from aecore.models import Autoencoder, NoiseReducer, ResolutionEnhancer
from aecore.saved.descriptions import changes, describe, experiment_from_json


@pytest.mark.parametrize(
    "experiment",
    [
        Experiment("a", NoiseReducer(features=(4, 8, 16)), GaussianNoise((0.1, 0.5))),
        Experiment(
            "b",
            ResolutionEnhancer(channels=1),
            Compose((GaussianBlur(1.0), Pixelate((0.3, 0.5)), GaussianNoise(0.1))),
            Data(dataset="folder", data_dir="/x", image_size=(32, 48), channels=1),
            Optimizer(learning_rate=0.01),
            Training(steps=7, patience=2, seed=5),
            run_dir="elsewhere",
        ),
    ],
)
@pytest.mark.every_room
def test_an_experiment_survives_json(experiment):
    text = json.dumps(describe(experiment))
    assert experiment_from_json(json.loads(text)) == experiment


def test_json_names_nothing_outside_the_registries():
    class Unregistered(Autoencoder):
        channels: int = 1
        stride: int = 1

    experiment = Experiment("a", Unregistered(), GaussianNoise(0.1))
    description = describe(experiment)
    with pytest.raises(ConfigError, match="'Unregistered' is not registered.*pass model="):
        experiment_from_json(description)
    assert experiment_from_json(description, model=Unregistered()).degradation == GaussianNoise(0.1)

    description["model"] = {"type": "os.system", "command": "false"}
    with pytest.raises(ConfigError, match="not registered"):
        experiment_from_json(description)
    description["model"] = {"type": "NoiseReducer", "no_such_field": 1}
    with pytest.raises(ConfigError, match="no_such_field"):
        experiment_from_json(description)


def test_a_field_without_a_form_in_json_is_refused():
    class Typed(Autoencoder):
        channels: int = 1
        stride: int = 1
        dtype: type = float

    with pytest.raises(ConfigError, match="not JSON serializable"):
        describe(Experiment("a", Typed(), GaussianNoise(0.1)))


def test_changes_name_fields_by_their_flags_and_say_whether_a_resumed_run_may_change_them():
    old = Experiment("a", NoiseReducer(), GaussianNoise(0.1))
    new = Experiment(
        "a",
        NoiseReducer(),
        GaussianNoise(0.2),
        optimizer=Optimizer(learning_rate=0.1),
        training=Training(epochs=3, feed="resident"),
    )
    found = [(name, on_resume(field), *values) for name, field, *values in changes(old, new)]
    assert found == [
        ("degradation.sigma", OnResume.FIXED, 0.1, 0.2),
        ("optimizer.learning_rate", OnResume.FIXED, 0.001, 0.1),
        ("training.epochs", OnResume.SAME_RATES, 10, 3),
        ("training.feed", OnResume.FREE, "stream", "resident"),
    ]
    assert not list(changes(old, old))


def test_an_older_description_lacks_fields_and_gets_their_defaults():
    experiment = Experiment("a", NoiseReducer(), GaussianNoise(0.1), Data(channels=1))
    description = describe(experiment)
    for part, field in (
        ("model", "features"),
        ("degradation", "sigma"),
        ("data", "memory_limit"),
        ("optimizer", "ema"),
        ("training", "loss"),
    ):
        del description[part][field]
    rebuilt = experiment_from_json(description)
    assert rebuilt.degradation == GaussianNoise()
    assert dataclasses.replace(rebuilt, degradation=GaussianNoise(0.1)) == experiment


def test_a_model_of_ones_own_is_rebuilt_by_the_class_at_hand():
    class Unregistered(Autoencoder):
        width: int = 3
        channels: int = 1
        stride: int = 1

    description = describe(Experiment("a", Unregistered(width=5), GaussianNoise(0.1)))
    del description["model"]["channels"]
    assert experiment_from_json(description, like=Unregistered()).model == Unregistered(width=5)


class Coder(nn.Module):
    """A network but for what it lacks."""

    channels: int = 1

    def encode(self, images):
        return images

    decode = encode


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Training(epochs=0), "training.epochs 0 is out of bounds; use at least 1"),
        (lambda: Training(batch_size=-3), "training.batch_size -3"),
        (lambda: Training(steps=0), "training.steps 0"),
        (lambda: Training(keep=0), "training.keep 0"),
        (lambda: Training(min_delta=-1.0), "training.min_delta"),
        (lambda: Optimizer(learning_rate=0.0), "optimizer.learning_rate"),
        (lambda: Data(image_size=(0, 80)), "data.image_size .* at least 1"),
        (
            lambda: Experiment("a", NoiseReducer(), GaussianNoise(), Data(image_size=(8, 80))),
            "8x80 is too small for SSIM; use --data.image-size with at least 12 12",
        ),
        (lambda: Data(channels=2), "data.channels 2"),
        (lambda: Data(data_dir="photos"), "data_dir photos .*; use --data.dataset folder"),
        (lambda: Data(validation_fraction=1.0), "data.validation_fraction"),
        (lambda: Experiment("", NoiseReducer(), GaussianNoise()), "name is empty"),
        (lambda: Experiment("a", NoiseReducer(), 0.4), "not a Degradation"),
        (
            lambda: Experiment("a", NoiseReducer, GaussianNoise()),
            r"use one such as NoiseReducer\(\)",
        ),
        (lambda: Experiment("a", "UNet", GaussianNoise()), "model 'UNet' is not a network"),
        (lambda: Experiment("a", Coder(), GaussianNoise()), "Coder lacks __call__, stride"),
        (lambda: Compose((1, 2)), "not a tuple of degradations"),
        (lambda: NoiseReducer(features=3), "can't have features 3"),
        (
            lambda: Data(image_size=28),
            "data.image_size 28 is not possible; use 2 whole numbers or None",
        ),
        (lambda: Training(batch_size=32.0), "training.batch_size 32.0 .* use a whole number"),
        *[
            (lambda settings=settings: Training(**settings), f"training.{next(iter(settings))}")
            for settings in (
                {"steps": 2.5},
                {"seed": 1.5},
                {"batch_size": True},
                {"flip": "no"},
                {"devices": 1.0},
                {"min_delta": None},
                {"min_delta": float("inf")},
                {"distributed": 5},
                {"distributed": "foo"},
                {"distributed": "host:1,2,2"},
                {"distributed": "host:0,2,0"},
                {"distributed": "host:65536,2,0"},
                {"loss": "l3"},
            )
        ],
        (lambda: Data(image_size=(28.5, 28)), "data.image_size"),
        (lambda: Data(memory_limit=float("inf")), "data.memory_limit inf"),
        (lambda: Data(resize="nearest"), "use antialiased or bilinear"),
        (
            lambda: Experiment("a", NoiseReducer(), GaussianNoise(), Data(image_size=(13, 13))),
            r"--data.image-size 12 12 or 16 16$",
        ),
        (
            lambda: Experiment(
                "a", ResolutionEnhancer(), GaussianNoise(), Data(image_size=(256, 255))
            ),
            r"--data.image-size 256 254 or 256 256$",
        ),
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


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Training(epochs=np.int64(3), flip=np.True_), Training(epochs=3, flip=True)),
        (lambda: Data(crop=np.int64(32)), Data(crop=32)),
        (lambda: Data(crop=[32, np.uint8(48)]), Data(crop=(32, 48))),
        (lambda: Data(image_size=(np.int64(32), 48)), Data(image_size=(32, 48))),
        (lambda: Optimizer(learning_rate=np.float32(0.5)), Optimizer(learning_rate=0.5)),
    ],
)
def test_numbers_of_numpy_become_pythons_and_lists_tuples(build, expected):
    given = build()
    assert repr(given) == repr(expected)
    assert hash(given) == hash(expected)


def test_experiments_are_hashable_and_frozen():
    experiment = Experiment("a", NoiseReducer(), GaussianNoise())
    assert hash(experiment) == hash(Experiment("a", NoiseReducer(), GaussianNoise()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.name = "b"
