"""Results that agree with what came in, and how far others are from that."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params
from PIL import Image

import aecore
from aecore import cli
from aecore.degradations import (
    JPEG,
    Blur,
    Compose,
    Downscale,
    GaussianBlur,
    GaussianNoise,
    Mask,
    Pixelate,
    Sometimes,
)
from aecore.errors import ConfigError, ImageError
from aecore.models import UNet, Upscaler
from aecore.networks.network import LinenNetwork
from aecore.saved.descriptions import Description, describe
from aecore.saved.trained import TrainedNetwork

RANDOM = np.random.default_rng(0)


def smooth(height=48, width=60):
    coarse = RANDOM.integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def restorer(degradation, **settings):
    scale = degradation.reduction
    model = Upscaler(4, 1, scale=scale) if scale > 1 else UNet((4,), channels=3)
    description = Description.from_json(describe(aecore.Experiment("a", model, degradation)))
    trained = TrainedNetwork(LinenNetwork(model), random_params(model), description)
    return aecore.Restorer(trained, **settings)


def degraded(degradation, image):
    result = degradation(image[None].astype(np.float32) / 255, jax.random.key(1))[0]
    return np.rint(np.clip(np.asarray(result), 0, 1) * 255).astype(np.uint8)


LINEAR = [
    Downscale(2),
    Downscale(4, "lanczos"),
    Downscale(3, "matlab"),
    Downscale(2, "area"),
    Pixelate(0.4),
    Compose((Pixelate(0.5),)),
]


@pytest.mark.parametrize("degradation", LINEAR)
def test_consistent_results_degrade_to_what_came_in(degradation):
    image = degraded(degradation, smooth())
    plain, consistent = restorer(degradation), restorer(degradation, consistent=True)
    result = consistent(image)
    assert (result.shape, result.dtype) == (plain(image).shape, np.uint8)
    again = degraded(degradation, result)
    assert np.abs(again.astype(int) - image).max() <= 1
    before, after = (each.consistency(each(image), image) for each in (plain, consistent))
    assert after.distance < 0.5 / 255 < before.distance
    exact = np.asarray(degradation(smooth()[None].astype(np.float32) / 255)[0])
    in_floats = np.asarray(degradation(consistent(exact)[None])[0])
    np.testing.assert_allclose(in_floats, exact, atol=1e-3)


def test_a_projection_changes_nothing_that_agrees():
    degradation = Downscale(2)
    original = smooth()
    image = np.asarray(degradation(original[None].astype(np.float32) / 255)[0])
    project = restorer(degradation, consistent=True)._project
    np.testing.assert_allclose(project(original / 255, image), original / 255, atol=1e-3)


def test_pixels_that_were_not_blanked_stay_as_they_are():
    degradation = Mask(pixels=0.3, boxes=2)
    image = degraded(degradation, smooth())
    result = restorer(degradation, consistent=True)(image)
    known = (image > 0).any(axis=2)
    np.testing.assert_array_equal(result[known], image[known])
    assert restorer(degradation).consistency(result, image).distance == 0
    assert (result[~known] > 0).any()


@pytest.mark.parametrize("degradation", [Downscale(2), Pixelate(0.4), Mask(pixels=0.3)])
def test_consistent_results_of_floats_out_of_range_lie_in_it(degradation):
    image = 3 * RANDOM.random((24, 30, 3), np.float32) - 1
    result = restorer(degradation, in_range=False, consistent=True)(image)
    assert result.min() >= 0 and result.max() <= 1
    if isinstance(degradation, Mask):
        np.testing.assert_array_equal(result, np.clip(image, 0, 1))


@pytest.mark.parametrize("degradation", [GaussianNoise(0.1), JPEG(50), Pixelate((0.3, 0.5))])
def test_what_has_no_projection_is_refused(degradation):
    with pytest.raises(ConfigError, match="results can't be made consistent with"):
        restorer(degradation, consistent=True)


@pytest.mark.parametrize(
    "degradation", [Downscale(2), Pixelate(0.4), JPEG(30), GaussianBlur(1.5), JPEG((20, 40))]
)
def test_the_original_is_consistent_and_what_is_invented_shows(degradation):
    original = smooth()
    image, judge = degraded(degradation, original), restorer(degradation)
    right = judge.consistency(original, image)
    assert right.distance < 0.6 / 255
    invented = original.copy()
    invented[10:20, 10:20] = 255 - invented[10:20, 10:20]
    wrong = judge.consistency(invented, image)
    assert wrong.distance > 3 * right.distance
    where = np.argwhere(wrong.picture[0].max(axis=2) == wrong.picture.max())[0]
    assert (where * degradation.reduction <= 32).all()


@pytest.mark.parametrize("noise", [GaussianNoise(0.2), GaussianNoise((0.0, 0.3), clip=False)])
def test_what_was_removed_should_look_like_noise(noise):
    original = smooth(96, 96)
    image, judge = degraded(noise, original), restorer(noise)
    right = judge.consistency(original, image)
    assert right.distance < 0.02
    blurred = np.asarray(GaussianBlur(8.0)(original[None].astype(np.float32) / 255)[0])
    assert judge.consistency(blurred, image).distance > 3 * max(right.distance, 0.01)
    assert "lost or invented" in right.meaning


def test_noise_that_isnt_clipped_is_not_taken_for_structure():
    noise = GaussianNoise(0.3, clip=False)
    bright = np.full((96, 96, 3), 0.95, np.float32)
    image = np.asarray(noise(bright[None], jax.random.key(1))[0])
    judge = restorer(noise, in_range=False)
    right = judge.consistency(bright, image).distance
    assert right < 0.02 < judge.consistency(bright, image.clip(0, 1) - 0.1).distance


@pytest.mark.parametrize(
    ("degradation", "strengths"),
    [
        (JPEG((20, 60)), [JPEG(25), JPEG(55)]),
        (GaussianNoise((0.02, 0.4)), [GaussianNoise(0.03), GaussianNoise(0.35)]),
    ],
)
def test_several_images_are_measured_as_each_alone(degradation, strengths):
    model = restorer(degradation)
    originals = np.stack([smooth() for _ in strengths])
    pairs = zip(strengths, originals, strict=True)
    inputs = np.stack([degraded(one, original) for one, original in pairs])
    together = model.consistency(originals, inputs)
    alone = [model.consistency(*pair) for pair in zip(originals, inputs, strict=True)]
    assert together.difference.shape == inputs.shape
    for index, each in enumerate(alone):
        np.testing.assert_allclose(together.difference[index], each.difference[0], atol=1e-6)
    if isinstance(degradation, JPEG):
        assert together.distance < 0.6 / 255
        assert all(str(one) in together.meaning for one in strengths)


def test_what_is_not_known_is_refused():
    image = smooth()
    for degradation in (Sometimes(0.5, JPEG(50)), Blur((0.1, 2.0)), Pixelate((0.3, 0.5))):
        with pytest.raises(ConfigError, match="it isn't known what it did"):
            restorer(degradation).consistency(image, image)
    with pytest.raises(ConfigError, match="is not known"):
        aecore.Restorer.of(
            UNet((4,), channels=3), random_params(UNet((4,), channels=3))
        ).consistency(image, image)
    with pytest.raises(ImageError, match="which is to be 2 times as large"):
        restorer(Downscale(2)).consistency(image, image)


def test_pairs_are_not_known():
    judge = restorer(Compose())
    description = dataclasses.replace(judge.description, data={"dataset": "pairs"})
    judge.trained = dataclasses.replace(judge.trained, description=description)
    with pytest.raises(ConfigError, match="it was trained on pairs"):
        judge.consistency(smooth(), smooth())


def test_the_command_makes_results_consistent(tmp_path, capfd):
    small = degraded(Downscale(2), smooth())
    Image.fromarray(small).save(tmp_path / "small.png")
    far = []
    for flags in ([], ["--consistent"]):
        out = tmp_path / f"large{len(flags)}.png"
        words = ["restore", tmp_path / "small.png", "-o", out, "-m", "photo-upscale-2x", *flags]
        with pytest.raises(SystemExit) as ended:
            cli.run([str(word) for word in words])
        assert ended.value.code == 0
        again = degraded(Downscale(2), np.asarray(Image.open(out)))
        far.append(np.abs(again.astype(int) - small).max())
    assert far[1] <= 1 < far[0]
