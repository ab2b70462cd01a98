"""Tensors of other libraries, their pipelines, and trackers of experiments."""

import contextlib
import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import random_params
from test_experiments import script

import aecore
from aecore.errors import ImageError, Interrupted
from aecore.models import NoiseReducer, Upscaler

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def restorer():
    return aecore.Restorer.of(NoiseReducer(), random_params(NoiseReducer()))


@pytest.fixture(scope="module")
def tools():
    return script("other_tools")


# ---- Tensors


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("is_variable", [False, True])
def test_tensorflow_tensors_come_back_as_such(restorer, dtype, is_variable):
    tf = pytest.importorskip("tensorflow")
    image = (RANDOM.random((8, 12)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    tensor = tf.Variable(image) if is_variable else tf.constant(image)
    restored = restorer(tensor)
    assert isinstance(restored, tf.Tensor)
    assert restored.dtype == tensor.dtype
    assert restored.device == tensor.device
    np.testing.assert_array_equal(restored.numpy(), restorer(image))
    codes = restorer.encode(tensor)
    assert isinstance(codes, tf.Tensor)
    assert isinstance(restorer.decode(codes), tf.Tensor)
    assert isinstance(next(restorer.each([tensor])), tf.Tensor)


def test_within_a_tensorflow_function_the_error_names_what_to_use(restorer):
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(ImageError, match=r"use tf\.numpy_function\(restorer, "):
        tf.function(lambda images: restorer(images), autograph=False)(tf.zeros((8, 8)))


def test_torch_tensors_may_lie_in_memory_as_they_like(restorer):
    torch = pytest.importorskip("torch")
    images = torch.rand(2, 1, 8, 12, requires_grad=True)
    restored = restorer(images.movedim(1, 3)).movedim(3, 1)
    assert isinstance(restored, torch.Tensor)
    assert not restored.requires_grad
    expected = restorer(images.detach().numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(restored, expected)


def test_channels_that_come_first_are_noticed(restorer):
    for shape in ((1, 8, 12), (2, 1, 8, 12)):
        with pytest.raises(ImageError, match=r"channels come last, as after movedim\(-3, -1\)"):
            restorer(np.zeros(shape, np.uint8))


# ---- Pipelines


@pytest.mark.parametrize("model", [NoiseReducer(), Upscaler(4, 1, scale=2)])
def test_restoring_within_tf_data(model, tools):
    tf = pytest.importorskip("tensorflow")
    restorer = aecore.Restorer.of(model, random_params(model))
    images = RANDOM.random((6, 8, 12, model.channels), np.float32)
    pipeline = tools["in_tf_data"](restorer, tf.data.Dataset.from_tensor_slices(images).batch(2))
    side = 8 * restorer.network.scale
    assert pipeline.element_spec.shape.as_list()[1:2] == [side]
    restored = np.concatenate(list(pipeline.as_numpy_iterator()))
    np.testing.assert_allclose(restored, restorer(images), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_restoring_after_a_data_loader(workers, restorer, tools):
    torch = pytest.importorskip("torch")
    images = torch.rand(5, 8, 12, 1)
    context = "spawn" if workers else None
    batches = tools["in_data_loader"](
        restorer, images, batch_size=2, num_workers=workers, multiprocessing_context=context
    )
    restored = list(batches)
    assert [len(batch) for batch in restored] == [2, 2, 1]
    assert all(isinstance(batch, torch.Tensor) for batch in restored)
    np.testing.assert_allclose(torch.cat(restored), restorer(images), atol=1e-6)


# ---- Trackers


def test_the_callback_is_told_what_the_metrics_hold(tiny):
    told = []
    aecore.train(
        tiny, progress=False, callback=lambda step, scores: told.append({"step": step, **scores})
    )
    lines = (Path(tiny.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert told == [json.loads(line) for line in lines]
    assert [set(line) - {"step"} for line in told if "loss" not in line] == 2 * [
        {"validation_mse", "validation_psnr", "validation_ssim"}
    ]
    assert [line["step"] for line in told if "loss" in line] == [2, 4, 6, 8]


def test_a_callback_that_fails_ends_the_training_and_the_run_can_go_on(tiny):
    def fail(step, scores):
        if step == 6:
            raise Interrupted("no more")

    told = []
    with pytest.raises(Interrupted, match="no more"):
        aecore.train(tiny, progress=False, callback=fail)
    aecore.train(tiny, progress=False, callback=lambda step, scores: told.append(step))
    assert told[0] == 6
    assert told[-1] == 8


class Tracker:
    """As much of wandb and mlflow as the examples use."""

    def __init__(self):
        self.logged = []
        self.described = None
        self.open = False

    @contextlib.contextmanager
    def started(self, **settings):
        self.described = settings.get("config", self.described)
        self.open = True
        yield self
        self.open = False

    def log(self, scores, step):
        assert self.open
        self.logged.append((step, scores))

    def log_dict(self, values, name):
        assert name == "experiment.json"
        self.described = values


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_get_every_line(name, tiny, tools, monkeypatch):
    tracker = Tracker()
    fakes = {
        "wandb": types.SimpleNamespace(init=tracker.started),
        "mlflow": types.SimpleNamespace(
            set_experiment=lambda name: None,
            start_run=tracker.started,
            log_dict=tracker.log_dict,
            log_metrics=tracker.log,
        ),
    }
    monkeypatch.setitem(sys.modules, name, fakes[name])
    training = dataclasses.replace(tiny.training, epochs=1)
    summary = tools[f"train_with_{name}"](dataclasses.replace(tiny, training=training))
    assert tracker.described["name"] == "tiny"
    assert not tracker.open
    steps = [step for step, scores in tracker.logged if "loss" in scores]
    assert steps == [2, 4]
    scores = next(scores for _, scores in tracker.logged if "validation_psnr" in scores)
    assert scores["validation_psnr"] == summary["evaluation"]["psnr"]
