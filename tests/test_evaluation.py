import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import save_pictures

import aecore
from aecore.degradations import Downscale, GaussianNoise, Pixelate, PlacedJaxOps
from aecore.errors import CheckpointError, ConfigError, ImageError
from aecore.scoring import evaluation
from aecore.steps.devices import Devices
from aecore.steps.step import score

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 1), np.uint8)


def identity(params, images):
    del params
    return images


@pytest.mark.parametrize(
    ("devices", "batch_size"),
    [(1, 1), (1, 21), (1, 64), (8, 1), (8, 21), (8, 64), *((n, 5) for n in range(1, 9))]
    + [(n, None) for n in (1, 2, 3, 8)],
)
def test_each_image_counts_once_at_any_batch_size_on_any_number_of_devices(
    devices, batch_size, monkeypatch
):
    monkeypatch.setattr(evaluation, "_VALUES_ON_CPU", 5 * IMAGES[0].size)
    chosen = Devices(jax.devices()[:devices])
    scores = evaluation.Evaluator(identity, GaussianNoise(0.3), chosen, batch_size)({}, IMAGES)

    original = IMAGES / np.float32(255)
    degraded = np.asarray(GaussianNoise(0.3)(original, evaluation.keys(np.arange(21))))
    mse = ((degraded - original) ** 2).mean(axis=(1, 2, 3), dtype=np.float64)
    assert scores["images"] == 21
    assert scores["mse"] == pytest.approx(mse.mean(), rel=1e-5)
    assert scores["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), abs=1e-4)


def test_batches_are_as_large_as_devices_like_and_alike(monkeypatch):
    monkeypatch.setattr(evaluation, "_VALUES_ON_CPU", 5 * IMAGES[0].size)
    for devices, size in [(1, 5), (2, 8), (8, 24)]:
        evaluator = evaluation.Evaluator(
            identity, GaussianNoise(0.3), Devices(jax.devices()[:devices])
        )
        assert evaluator._size_of_batches(len(IMAGES), IMAGES.shape[1:]) == size


def test_what_is_compiled_ahead_is_not_compiled_again():
    traced = []

    def network(params, images):
        traced.append(images.shape)
        return images * params

    params = Devices().replicate(np.float32(0.5))
    evaluator = evaluation.Evaluator(network, GaussianNoise(0.3), Devices())
    evaluator.compile_ahead(params, IMAGES)
    scores = evaluator(params, IMAGES)
    assert len(traced) == 1
    expected = evaluation.Evaluator(network, GaussianNoise(0.3), Devices())
    assert scores == expected(params, IMAGES)
    assert evaluator(params, IMAGES[:3]) == expected(params, IMAGES[:3])


class Pictures:
    """Noise of several sizes, of which some are broken."""

    channels = 3

    def __init__(self, sizes, broken=()):
        random = np.random.default_rng(1)
        self.images = [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        self.broken = broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise ImageError(f"picture {index} is broken")
        return self.images[index]

    def shape(self, index):
        return self.images[index].shape


NOISE = GaussianNoise((0.1, 0.3), clip=False)


@jax.jit
def add_noise(original, key):
    return NOISE.apply(original, PlacedJaxOps(key))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("multiple", [1, 16])
def test_pictures_of_many_sizes_count_once_and_as_if_alone(devices, multiple, caplog):
    sizes = [(20 + 3 * n % 17, 20 + 5 * n % 31) for n in range(12)] + [(8, 40)]
    source = Pictures(sizes, broken={4})
    chosen = Devices(jax.devices()[:devices])
    evaluator = evaluation.Evaluator(identity, NOISE, chosen, multiple=multiple)
    evaluator.compile_ahead({}, source)
    values = evaluator.per_image({}, source)
    kept = [index for index in range(12) if index != 4]
    assert len(values["mse"]) == len(kept)
    score_alone = jax.jit(score)
    for place, index in enumerate(kept):
        original = source[index][None] / np.float32(255)
        key = evaluation.keys(np.array([index]))
        degraded = np.asarray(add_noise(original, key))
        assert values["mse"][place] == pytest.approx(((degraded - original) ** 2).mean(), rel=1e-5)
        alone = {name: float(v[0]) for name, v in score_alone(degraded, original).items()}
        assert values["psnr"][place] == pytest.approx(alone["psnr"], abs=1e-4)
        assert values["ssim"][place] == pytest.approx(alone["ssim"], abs=1e-5)
    evaluator.per_image({}, source)
    assert [record.message for record in caplog.records] == [
        "skipped: 1 of the pictures have sides below 11 pixels",
        "skipped: picture 4 is broken",
    ]


def test_mse_is_of_the_output_as_it_is_and_psnr_of_the_clipped_one():
    def overshoot(params, images):
        return images + 2.0

    white = np.full((3, 16, 16, 1), 255, np.uint8)
    scores = evaluation.Evaluator(overshoot, Pixelate(1.0), Devices(), 8)({}, white)
    assert scores["mse"] == pytest.approx(4.0)
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1.0)


def test_evaluate_reproduces_the_summary_exactly(trained):
    summary = json.loads((trained / "summary.json").read_text())
    scores = aecore.evaluate(str(trained))
    assert scores == {name: summary[name] for name in ("evaluation", "baseline")}


def test_evaluate_at_another_batch_size_and_place(trained, pictures, tmp_path):
    expected = aecore.evaluate(str(trained))
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in pictures.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    scores = aecore.evaluate(str(trained), data_dir=str(moved), batch_size=3)
    for name in ("evaluation", "baseline"):
        intervals = [values.pop("ci95") for values in (scores[name], expected[name])]
        assert intervals[0] == pytest.approx(intervals[1], rel=1e-4)
        assert scores[name] == pytest.approx(expected[name], rel=1e-5)


def test_evaluate_refuses_what_does_not_fit(trained, tmp_path):
    with pytest.raises(ConfigError, match="batch_size -1 is not possible"):
        aecore.evaluate(str(trained), batch_size=-1)
    save_pictures(tmp_path, 4, mode="RGB")
    with pytest.raises(ConfigError, match="3 channels"):
        aecore.evaluate(str(trained), data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="2 times smaller, the degradation of"):
        aecore.evaluate(str(trained), degradation=Downscale(2))


def test_images_without_any_error_leave_the_mean_finite():
    scores = evaluation.Evaluator(identity, GaussianNoise(0.0), Devices(), 8)({}, IMAGES)
    assert scores["psnr"] == 100


def test_a_run_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        aecore.evaluate(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        aecore.evaluate(str(tmp_path))


def test_the_noise_does_not_depend_on_the_run(tiny, tmp_path):
    first = aecore.train(tiny, progress=False)
    other = dataclasses.replace(
        tiny,
        run_dir=str(tmp_path / "other"),
        training=dataclasses.replace(tiny.training, seed=7),
    )
    second = aecore.train(other, progress=False)
    assert first["baseline"] == second["baseline"]
    assert first["evaluation"]["mse"] != second["evaluation"]["mse"]
