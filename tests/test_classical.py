import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

import aecore
from aecore.data.indexed import ArraySource
from aecore.data.sources import Dataset
from aecore.degradations import Compose, GaussianBlur, GaussianNoise, Pixelate
from aecore.errors import ConfigError
from aecore.scoring import classical, evaluation

RANDOM = np.random.default_rng(0)
QUICK = ("median", "gaussian", "total variation")


def smooth(count, side=24, channels=1):
    noise = RANDOM.random((count, side, side, channels))
    values = scipy.ndimage.gaussian_filter(noise, (0, 3, 3, 0))
    low, high = values.min(), values.max()
    return ((values - low) / (high - low) * 255).astype(np.uint8)


def of_arrays(train, validation):
    return Dataset(ArraySource(train), ArraySource(validation))


def classical_scores(degradation, dataset, names):
    return classical.scores(classical.methods(degradation, names), degradation, dataset)


def test_methods_are_tuned_and_scored_on_the_inputs_of_the_network():
    dataset = of_arrays(smooth(20), smooth(7))
    degradation = GaussianNoise(0.2)
    scores = classical_scores(degradation, dataset, QUICK)
    originals = dataset.validation.array / np.float32(255)
    degraded = evaluation.degraded(degradation, dataset.validation.array)
    identity = ((degraded - originals) ** 2).mean()
    for name in QUICK:
        assert scores[name]["images"] == 7
        assert scores[name]["mse"] < identity / 2
    calibrated = [name for name in scores if name.endswith(classical.CALIBRATED)]
    assert len(scores) == len(QUICK) + len(calibrated) == 4
    sigma = scores["gaussian"]["settings"]["sigma"]
    by_hand = scipy.ndimage.gaussian_filter(degraded, (0, sigma, sigma, 0))
    assert scores["gaussian"]["mse"] == pytest.approx(((by_hand - originals) ** 2).mean(), rel=1e-4)


def test_settings_come_from_the_training_images_alone():
    def settings(train, validation):
        found = classical_scores(GaussianNoise(0.2), of_arrays(train, validation), QUICK)
        return {name: scores["settings"] for name, scores in found.items()}

    flat, busy = np.full((20, 24, 24, 1), 128, np.uint8), RANDOM.integers(0, 256, (20, 24, 24, 1))
    busy = busy.astype(np.uint8)
    assert settings(flat, busy) == settings(flat, flat) != settings(busy, flat)


def test_the_bias_of_clipped_noise_is_undone_by_calibration():
    dark = of_arrays(smooth(30) // 4, smooth(10) // 4)
    scores = classical_scores(GaussianNoise(0.4), dataset=dark, names=["gaussian"])
    assert scores["gaussian, calibrated"]["mse"] < scores["gaussian"]["mse"] / 4


def test_stronger_noise_is_smoothed_more():
    dataset = of_arrays(smooth(20), smooth(5))
    weights = [
        classical_scores(GaussianNoise(sigma), dataset, ["total variation"])["total variation"]
        for sigma in (0.05, 0.4)
    ]
    assert weights[0]["settings"]["weight"] < weights[1]["settings"]["weight"]


@pytest.mark.parametrize(("side", "scale"), [(80, 0.4), (28, 0.4), (50, 0.73), (33, 0.3)])
def test_bicubic_enlarges_the_small_image_that_was_kept(side, scale):
    original = RANDOM.random((side, side, 1), np.float32)
    small = int(side * scale + 1e-4)
    kept = cv2.resize(original, (small, small), interpolation=cv2.INTER_AREA)
    expected = Image.fromarray(kept).resize((side, side), Image.Resampling.BICUBIC)
    pixelated = np.asarray(Pixelate(scale)(original[None]))[0]
    found = classical._bicubic(pixelated, scale)[..., 0]
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_is_for_pixelation_and_beats_it(channels):
    dataset = of_arrays(smooth(4, 40, channels), smooth(4, 40, channels))
    assert "bicubic" not in classical.methods(GaussianBlur(1.0))
    assert "bicubic" in classical.methods(Compose((GaussianBlur(1.0), Pixelate(0.5))))
    scores = classical_scores(Pixelate(0.4), dataset, ["bicubic"])["bicubic"]
    pixelated = evaluation.degraded(Pixelate(0.4), dataset.validation.array)
    identity = evaluation.summarize(evaluation.image_scores(pixelated, dataset.validation.array))
    assert scores["psnr"] > identity["psnr"] + 2


def test_every_method_takes_gray_and_colour():
    for channels in (1, 3):
        image = smooth(1, 24, channels)[0] / np.float32(255)
        for name, method in classical.methods(Pixelate(0.5)).items():
            settings = next(method.settings())
            restored = method.restore(image, **settings)
            assert restored.shape == image.shape, name
            assert np.abs(restored - image).mean() < 0.1, name


def test_intervals_are_of_the_mean():
    values = RANDOM.normal(5, 2, 400).astype(np.float32)
    scores = evaluation.summarize({"mse": values})
    assert scores["mse"] == pytest.approx(values.mean(), rel=1e-5)
    assert scores["ci95"]["mse"] == pytest.approx(1.96 * 2 / 20, rel=0.15)
    assert "ci95" not in evaluation.summarize({"mse": values[:1]})


def test_ranks_are_those_of_psnr():
    psnr = RANDOM.permutation(101).astype(np.float32)
    ranked = evaluation.ranked(psnr)
    assert psnr[ranked["best"]].tolist() == [100, 99, 98]
    assert psnr[ranked["median"]].tolist() == [51, 50, 49]
    assert psnr[ranked["worst"]].tolist() == [2, 1, 0]


@pytest.mark.parametrize("count", range(1, 11))
def test_of_few_images_none_is_ranked_twice(count):
    psnr = RANDOM.permutation(count).astype(np.float32)
    ranked = np.concatenate([*evaluation.ranked(psnr).values()])
    shown = count if count < 3 else 3 * min(count // 3, 3)
    assert len(set(ranked.tolist())) == len(ranked) == shown
    assert psnr[ranked[0]] == count - 1
    assert psnr[ranked[-1]] == 0


def test_evaluate_saves_what_it_found(tiny):
    summary = aecore.train(tiny, progress=False)
    first = aecore.evaluate(tiny.run_dir, classical=["median"], save=True)
    aecore.evaluate(tiny.run_dir, classical=["gaussian"], save=True)
    with open(f"{tiny.run_dir}/summary.json") as file:  # noqa: PTH123
        saved = json.load(file)
    assert saved.keys() == summary.keys() | {"classical"}
    methods = {"median", "gaussian", "median, calibrated", "gaussian, calibrated"}
    assert saved["classical"].keys() == methods
    assert saved["classical"]["median"] == first["classical"]["median"]
    assert saved["evaluation"] == summary["evaluation"]
    with open(f"{tiny.run_dir}/ranked.png", "rb") as file:  # noqa: PTH123
        assert file.read(4) == b"\x89PNG"
    # The same experiment again loses nothing.
    assert aecore.train(tiny, progress=False)["classical"] == saved["classical"]
    with pytest.raises(ConfigError, match="leave out save"):
        aecore.evaluate(tiny.run_dir, degradation=GaussianNoise(0.3), save=True)


def test_a_network_can_be_scored_against_another_degradation(trained):
    weak, own = (
        aecore.evaluate(str(trained), degradation=degradation)
        for degradation in (GaussianNoise(0.05), None)
    )
    assert weak["baseline"]["psnr"] > own["baseline"]["psnr"] + 5


def test_unknown_methods_are_refused(trained):
    with pytest.raises(ConfigError, match="no classical method 'mean' here; use median"):
        aecore.evaluate(str(trained), classical=["mean"])


def test_the_command_shows_them_beside_the_network(trained, tmp_path):
    file = tmp_path / "scores.json"
    command = [sys.executable, "-m", "aecore", "evaluate", str(trained)]
    done = subprocess.run(
        [*command, "--methods", "median", "gaussian", "--json", str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    words = [line.split()[0] for line in done.stdout.splitlines() if "±" in line]
    assert set(words) <= {"degraded", "median", "median,", "gaussian", "gaussian,", "restored"}
    assert len(words) == 5
    assert words[-1] == "restored"
    assert json.loads(file.read_text())["classical"].keys() > {"median", "gaussian"}
