import dataclasses
import io
import itertools
import json
import runpy
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
from PIL import Image

from aecore import Data, Experiment, train
from aecore.data.batches import training_batches
from aecore.data.ops import TensorFlowOps
from aecore.degradations import (
    JPEG,
    REGISTRY,
    Blur,
    CameraNoise,
    Compose,
    Degradation,
    Downscale,
    GaussianBlur,
    GaussianNoise,
    JaxOps,
    Mask,
    MotionBlur,
    OneOf,
    Pixelate,
    Resize,
    SaltAndPepper,
    ShotNoise,
    Shuffled,
    Sinc,
    Sometimes,
)
from aecore.errors import ConfigError, ImageError
from aecore.models import NoiseReducer
from aecore.saved.descriptions import describe, experiment_from_json
from aecore.scoring import evaluation

RANDOM = np.random.default_rng(0)


def run_in_tf_data(degradation, images, seed=(3, 4)):
    import tensorflow as tf

    def degrade(batch):
        return degradation.apply(batch, TensorFlowOps(tf.constant(seed, tf.int64)))

    dataset = tf.data.Dataset.from_tensors(tf.constant(images)).map(degrade)
    return next(dataset.as_numpy_iterator())


def degraded(run, degradation, images):
    if run == "tf":
        return run_in_tf_data(degradation, images)
    return np.asarray(jax.jit(degradation)(images, jax.random.key(0)))


def opencv_pixelate(image, scale):
    height, width = image.shape[:2]
    small = (max(int(width * scale), 1), max(int(height * scale), 1))
    down = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(down, (width, height), interpolation=cv2.INTER_AREA)


def test_pixelate_is_opencvs_area_resize_at_80():
    images = RANDOM.random((4, 80, 80, 3), np.float32)
    expected = np.stack([opencv_pixelate(image, 0.4) for image in images])
    np.testing.assert_allclose(Pixelate(0.4)(images), expected, atol=1e-5)


@pytest.mark.parametrize("size", [*range(8, 34), 63, 64, 100, 127, 128, 191, 255, 256, 257])
def test_pixelate_is_opencvs_area_resize_and_keeps_the_size(size):
    image = RANDOM.random((size, size + 1, 1), np.float32)
    pixelated = Pixelate(0.4)(image[None])[0]
    assert pixelated.shape == image.shape
    np.testing.assert_allclose(pixelated[..., 0], opencv_pixelate(image, 0.4), atol=2e-5)


def test_pixelate_keeps_every_size():
    for size in range(8, 258):
        shape = (1, size, 8, 1)
        assert jax.eval_shape(Pixelate(0.4), jax.ShapeDtypeStruct(shape, "float32")).shape == shape


def test_pixelate_at_scale_1_is_the_identity():
    images = RANDOM.random((2, 9, 11, 1), np.float32)
    np.testing.assert_allclose(Pixelate(1.0)(images), images, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 3.0])
def test_gaussian_blur_is_scipys(sigma):
    images = RANDOM.random((2, 20, 24, 3), np.float32)
    expected = scipy.ndimage.gaussian_filter(
        images, (0, sigma, sigma, 0), mode="reflect", truncate=12
    )
    np.testing.assert_allclose(GaussianBlur(sigma)(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    "degradation",
    [
        Pixelate(0.4),
        GaussianBlur(1.5),
        Compose((GaussianBlur(1.0), Pixelate(0.5))),
        Blur(2.0, 0.7, angle=30.0, beta=0.8, radius=6),
        MotionBlur(9.0, 25.0),
        Sinc(1.2),
        Resize(0.6, "bicubic"),
        Downscale(2, "lanczos"),
    ],
)
@pytest.mark.every_room
def test_the_same_numbers_eagerly_under_jit_and_in_tf_data(degradation):
    images = RANDOM.random((3, 30, 22, 3), np.float32)
    eager = np.asarray(degradation(images))
    # Sums of 441 weights, of either sign, are rounded differently.
    atol = 2e-6 if isinstance(degradation, Sinc) else 1e-6
    np.testing.assert_allclose(jax.jit(degradation)(images), eager, atol=atol)
    np.testing.assert_allclose(run_in_tf_data(degradation, images), eager, atol=atol)


@pytest.mark.parametrize("sigma", [0.1, (0.05, 0.3)])
def test_noise_agrees_in_distribution_between_tf_data_and_jax(sigma):
    # Gray, far enough from 0 and 1 for clipping not to hide the tails.
    images = np.full((400, 16, 16, 1), 0.5, np.float32)
    jax_noise = np.asarray(GaussianNoise(sigma)(images, jax.random.key(0))) - 0.5
    tf_noise = run_in_tf_data(GaussianNoise(sigma), images) - 0.5
    for noise in (jax_noise, tf_noise):
        assert abs(noise.mean()) < 2e-3
    assert scipy.stats.ks_2samp(jax_noise.ravel(), tf_noise.ravel()).pvalue > 1e-3
    if isinstance(sigma, tuple):
        # Each image has its own strength, and they fill the range.
        strengths = [noise.std(axis=(1, 2, 3)) for noise in (jax_noise, tf_noise)]
        assert scipy.stats.ks_2samp(*strengths).pvalue > 1e-3
        assert all(s.min() < 0.08 and s.max() > 0.25 for s in strengths)


def test_shot_noise_is_poisson_in_tf_data_and_in_jax():
    images = np.tile(np.float32([0.1, 0.5])[:, None, None], (200, 1, 16, 16))
    images = images.reshape(200, 16, 32, 1)
    noisy = [
        np.asarray(ShotNoise(12.0)(images, jax.random.key(0))),
        run_in_tf_data(ShotNoise(12.0), images),
    ]
    for level in (0.1, 0.5):
        counts = [np.rint(values[images == np.float32(level)] * 12) for values in noisy]
        # Beyond 12 all are clipped.
        expected = scipy.stats.poisson(12 * level).pmf(np.arange(12)) * counts[0].size
        for drawn in counts:
            found = np.bincount(drawn.astype(int), minlength=12)[:12]
            many = expected > 20
            chi2 = ((found - expected) ** 2 / expected)[many].sum()
            assert chi2 < scipy.stats.chi2(many.sum()).ppf(1 - 1e-4)


def test_fewer_photons_are_noisier_and_black_stays_black():
    images = np.zeros((2, 8, 8, 1), np.float32)
    images[1] = 0.4
    errors = [
        np.asarray(ShotNoise(peak)(images, jax.random.key(0)) - images).std(axis=(1, 2, 3))
        for peak in (10.0, 1000.0)
    ]
    assert errors[0][0] == errors[1][0] == 0
    # The variance of a count is its mean.
    assert errors[1][1] == pytest.approx((0.4 / 1000) ** 0.5, rel=0.2)
    assert errors[0][1] > 5 * errors[1][1]


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_salt_and_pepper_replaces_the_share_that_it_says(run):
    images = np.full((100, 16, 16, 3), 0.5, np.float32)
    noisy = degraded(run, SaltAndPepper(0.2), images)
    assert set(np.unique(noisy)) == {0.0, 0.5, 1.0}
    for value in (0, 1):
        assert (noisy == value).mean() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_a_mask_blanks_boxes_and_pixels_in_all_channels(run):
    images = np.full((300, 20, 30, 3), 0.5, np.float32)

    one_box = degraded(run, Mask(boxes=1, size=0.25, value=1.0), images) == 1
    assert (one_box == one_box[..., :1]).all()
    assert (one_box[..., 0].sum(axis=(1, 2)) == 5 * 8).all()
    # Boxes reach every edge, and are whole.
    assert one_box[..., 0].any(axis=(0, 1)).all()
    assert one_box[..., 0].any(axis=(0, 2)).all()
    assert (one_box[..., 0].any(axis=2).sum(axis=1) == 5).all()

    counts = degraded(run, Mask(boxes=(0, 2), size=(0.1, 0.2)), images)[..., 0] == 0
    assert {0} < set(counts.sum(axis=(1, 2)))
    assert counts.any(axis=(1, 2)).mean() == pytest.approx(2 / 3, abs=0.1)

    pixels = degraded(run, Mask(pixels=0.3, boxes=0), images) == 0
    assert (pixels == pixels[..., :1]).all()
    assert pixels.mean() == pytest.approx(0.3, abs=0.01)


def smooth_images(shape):
    noise = RANDOM.random(shape, np.float32)
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    low, high = smooth.min(), smooth.max()
    return np.rint((smooth - low) / (high - low) * 255).astype(np.uint8)


@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("shape", [(32, 48, 1), (45, 51, 1), (32, 48, 3), (45, 51, 3)])
def test_jpeg_is_libjpegs(quality, shape):
    images = smooth_images((3, *shape))
    degraded = np.asarray(JPEG(quality)(images / np.float32(255))) * 255
    for image, result in zip(images, degraded, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        expected = np.asarray(Image.open(file), np.float32).reshape(shape)
        own_error = np.abs(expected - image).mean()
        # libjpeg rounds within its transforms, which now and then flips a coefficient.
        assert np.abs(result - expected).mean() < 0.4 * max(own_error, 0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_libjpegs_to_few_levels_where_coefficients_are_kept(channels):
    images = smooth_images((1, 45, 51, channels))
    result = np.asarray(JPEG(100)(images / np.float32(255)))[0] * 255
    file = io.BytesIO()
    Image.fromarray(images[0].squeeze()).save(file, "JPEG", quality=100, subsampling="4:2:0")
    expected = np.asarray(Image.open(file), np.float32).reshape(result.shape)
    # The image itself is further away in colour, whose resolution is halved.
    assert np.abs(result - expected).max() <= (1.01 if channels == 1 else 6)
    assert np.abs(result - expected).mean() < 0.7


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_the_same_in_tf_data_but_for_ties(channels):
    images = smooth_images((4, 30, 44, channels)) / np.float32(255)
    in_jax = np.asarray(JPEG(30)(images))
    in_tf = run_in_tf_data(JPEG(30), images)
    # A coefficient half way between two steps may be rounded either way.
    assert (np.abs(in_jax - in_tf) < 1e-6).mean() > 0.98
    assert np.abs(in_jax - in_tf).max() < 0.2


def test_a_range_of_jpeg_qualities_draws_one_for_each_image():
    images = np.tile(smooth_images((1, 32, 32, 1)), (40, 1, 1, 1)) / np.float32(255)
    for results in (
        np.asarray(JPEG((5, 60))(images, jax.random.key(0))),
        run_in_tf_data(JPEG((5, 60)), images),
    ):
        each = [
            np.abs(JPEG(quality)(images[:1]) - results).mean(axis=(1, 2, 3))
            for quality in range(5, 61)
        ]
        nearest = np.array(each)
        assert nearest.min(axis=0).max() < 1e-3
        assert len(set(nearest.argmin(axis=0))) > 10


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_ranges_of_whole_numbers_draw_both_ends(run):
    images = np.tile(smooth_images((1, 24, 24, 1)), (40, 1, 1, 1)) / np.float32(255)

    results = degraded(run, JPEG((99, 100)), images)
    errors = [np.abs(results - JPEG(q)(images)).mean(axis=(1, 2, 3)) for q in (98, 99, 100)]
    assert set(np.argmin(errors, axis=0)) == {1, 2}
    boxes = (degraded(run, Mask(boxes=(1, 2), size=0.05, value=0.0), images / 2 + 0.5) == 0).sum(
        axis=(1, 2, 3)
    )
    assert set(boxes) == {1, 2}


RANDOM_ONES = [
    GaussianNoise(0.3),
    ShotNoise((5.0, 90.0)),
    SaltAndPepper(0.3),
    JPEG((10, 90)),
    Mask(0.1, (0, 3), (0.1, 0.5), (0.0, 1.0)),
    GaussianNoise((0.0, 0.3), gray=0.5),
    CameraNoise((0.0, 0.1), (0.0, 0.1)),
    Blur((0.2, 3.0), (0.2, 3.0), (0.0, 180.0), (0.5, 4.0), radius=(1, 10)),
    MotionBlur((0.0, 8.0)),
    Sinc((1.0, 3.0), (3, 10)),
    Resize((0.3, 1.5), ("area", "bilinear", "bicubic")),
    Downscale(2, ("bicubic", "area")),
    OneOf((Blur((0.2, 3.0)), Sinc()), (0.9, 0.1)),
    Shuffled(
        (GaussianBlur((0.5, 2.0)), Sometimes(0.5, ShotNoise((5.0, 90.0))), GaussianNoise(0.1))
    ),
]


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=lambda value: type(value).__name__)
def test_noise_of_an_image_depends_on_its_key_alone(degradation):
    images = RANDOM.random((6, 8, 8, 1), np.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    together = degradation(images, keys)
    apart = [degradation(images[i : i + 1], keys[i : i + 1])[0] for i in range(6)]
    # Products of matrices are rounded differently for other numbers of images on some CPUs.
    multiplies = isinstance(degradation, Resize | Shuffled)
    np.testing.assert_allclose(together, np.stack(apart), rtol=0, atol=1e-6 if multiplies else 0)


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=lambda value: type(value).__name__)
def test_a_share_of_a_batch_is_degraded_in_tf_data_as_in_the_whole_batch(degradation):
    array = RANDOM.integers(0, 256, (20, 12, 12, 1), np.uint8)
    whole, share = (
        next(training_batches(array, degradation, batch_size=8, seed=3, flip=True, share=part))
        for part in (slice(0, 8), slice(4, 8))
    )
    np.testing.assert_array_equal(share.original, whole.original[4:])
    # Rates are the same; sums over few and over many are rounded differently.
    close = np.abs(share.degraded - whole.degraded[4:]) < 1e-6
    assert close.mean() > 0.99


def test_parts_of_a_sequence_draw_different_noise():
    once = GaussianNoise(0.05)
    gray = np.full((1, 32, 32, 1), 0.5, np.float32)
    twice = np.asarray(Compose((once, once))(gray, jax.random.key(0))) - 0.5
    # Independent variances add up; the same noise twice would have a deviation of 0.1.
    assert twice.std() == pytest.approx(0.05 * 2**0.5, rel=0.1)


def test_a_range_for_pixelate_draws_one_scale_an_image():
    images = np.tile(RANDOM.random((1, 20, 20, 1), np.float32), (50, 1, 1, 1))
    pixelated = np.asarray(Pixelate((0.2, 0.9))(images, jax.random.key(0)))
    fixed = np.stack([Pixelate(small / 20 + 1e-3)(images[:1])[0] for small in range(4, 18)])
    distance = np.abs(pixelated[:, None] - fixed[None]).max(axis=(2, 3, 4))
    assert distance.min(axis=1).max() < 1e-5
    assert len(set(distance.argmin(axis=1))) > 5


@pytest.mark.parametrize("degradation", [Pixelate(0.4), GaussianBlur(2.5)])
def test_white_stays_white(degradation):
    white = np.ones((1, 64, 64, 1), np.float32)
    degraded = np.asarray(degradation(white))
    np.testing.assert_allclose(degraded, white, atol=1e-6)
    assert degraded.max() <= 1


def test_results_stay_in_range():
    images = RANDOM.integers(0, 2, (4, 16, 16, 1)).astype(np.float32)
    noisy = np.asarray(GaussianNoise(1.0)(images, jax.random.key(0)))
    assert noisy.min() == 0
    assert noisy.max() == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianNoise(-0.1), "sigma -0.1 is out of bounds; use 0 <= sigma <= 1$"),
        (
            lambda: GaussianNoise(25.0),
            r"sigma 25.0 is out of bounds; use 0 <= sigma <= 1, as values are in \[0, 1\]; "
            r"did you mean 25 / 255 = 0.098\?$",
        ),
        (lambda: GaussianNoise((0, 51)), r"did you mean 0 / 255 = 0 to 51 / 255 = 0.2\?$"),
        (lambda: CameraNoise(read=5), r"did you mean 5 / 255 = 0.0196\?$"),
        (lambda: GaussianNoise(float("nan")), "sigma nan is out of bounds"),
        (lambda: GaussianNoise((0.5, 0.1)), "low above high"),
        (lambda: GaussianNoise((0.1, 0.2, 0.3)), "not a number or a"),
        (lambda: GaussianNoise("x"), "GaussianNoise: sigma 'x' is not a number"),
        (lambda: GaussianNoise(True), "sigma True is not a number"),
        (lambda: GaussianNoise((0.1, None)), r"sigma \(0.1, None\) is not a number"),
        (lambda: Pixelate(0.0), "use 0 < scale <= 1"),
        (lambda: Pixelate(1.5), "use 0 < scale <= 1"),
        (lambda: ShotNoise(0.0), "use 0 < peak <= 1000000"),
        (lambda: SaltAndPepper(1.1), "use 0 <= amount <= 1"),
        (lambda: JPEG(0), "use 1 <= quality <= 100"),
        (lambda: JPEG((30.5, 60)), "quality .* is not a whole number"),
        (lambda: Mask(boxes=1.5), "boxes 1.5 is not a whole number"),
        (lambda: Mask(boxes=True), "boxes True is not a whole number"),
        (lambda: Mask(boxes=(-1, 2)), "use 0 <= boxes"),
        (lambda: Mask(size=2.0), "use 0 <= size <= 1"),
        (lambda: GaussianBlur(-1.0), "use 0 <= sigma"),
        (lambda: GaussianBlur(float("inf")), "sigma inf is out of bounds"),
        (lambda: GaussianNoise(clip=1), "GaussianNoise: clip 1 is not True or False"),
        (lambda: GaussianNoise(gray=(0.1, 0.2)), r"gray \(0.1, 0.2\) is not a number$"),
        (lambda: Blur(sigma_y="x"), "sigma_y 'x' is not a number"),
        (lambda: Blur(radius=11), "use 1 <= radius <= 10"),
        (lambda: MotionBlur((0.0, 21.0)), "use 0 <= length <= 20"),
        (lambda: Sinc(3.2), "use 0 < cutoff <= 3.14159265"),
        (lambda: Resize(kernel="nearest"), "kernel 'nearest' is unknown; use any of area, bil"),
        (lambda: Resize(kernel=()), r"kernel \(\) is unknown"),
        (lambda: JPEG(subsampling=("4:2:0", "4:2:2")), "subsampling .* is unknown"),
        (lambda: Downscale(5), "scale 5 is unknown; use 2, 3 or 4"),
        (lambda: Downscale((2, 3)), "is unknown; use 2, 3 or 4"),
        (lambda: Downscale(4)(np.zeros((1, 30, 44, 1))), "30x44 .* smaller by 4; .* 28x44"),
        (lambda: Sometimes(1.5, JPEG(50)), "Sometimes: p 1.5 is out of bounds"),
        (lambda: Sometimes(0.5, 3), "3 is not a degradation"),
        (lambda: Sometimes(0.5, Downscale(2)), "makes images smaller"),
        (lambda: OneOf((JPEG(50), Downscale(2))), "parts reduce by 1, 2"),
        (lambda: OneOf(()), "OneOf: there are no parts"),
        (lambda: OneOf((JPEG(50), JPEG(60)), (1.0,)), "don't fit 2 parts; use a number for each"),
        (lambda: OneOf((JPEG(50),), ()), "don't fit 1 part; use"),
        (lambda: OneOf((JPEG(50), JPEG(60)), (0.0, 0.0)), "not all 0"),
        (lambda: Shuffled((JPEG(50),) * 5), "5 parts are not possible; use 1 to 4"),
        (lambda: Shuffled((1, 2)), "Shuffled: .* not a tuple of degradations"),
        (lambda: Shuffled((JPEG(50), Downscale(2))), "makes images smaller"),
        (lambda: GaussianNoise(0.1)(np.zeros((1, 8, 8, 1))), "pass key="),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: JPEG(np.int64(30), ["4:2:0", "4:4:4"]), JPEG(30, ("4:2:0", "4:4:4"))),
        (lambda: JPEG([np.uint8(30), 60]), JPEG((30, 60))),
        (lambda: GaussianNoise(np.float32(0.5), clip=np.False_), GaussianNoise(0.5, clip=False)),
        (lambda: GaussianNoise(np.float64(0.1)), GaussianNoise(0.1)),
        (lambda: GaussianNoise(np.array([0.1, 0.2])), GaussianNoise((0.1, 0.2))),
        (lambda: GaussianNoise([0.1, 0.2]), GaussianNoise((0.1, 0.2))),
        (lambda: Downscale(np.int64(2), ["area", "bicubic"]), Downscale(2, ("area", "bicubic"))),
        (lambda: Sometimes(np.float32(0.5), JPEG()), Sometimes(0.5, JPEG())),
        (
            lambda: OneOf([JPEG(50), JPEG(60)], [np.float32(1.0), 2]),
            OneOf((JPEG(50), JPEG(60)), (1.0, 2)),
        ),
    ],
)
def test_numbers_of_numpy_become_pythons_and_lists_tuples(build, expected):
    given = build()
    assert given == expected
    assert repr(given) == repr(expected)
    assert hash(given) == hash(expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 16, 16, 3), np.uint8), r"dtype uint8 and shape \(4, 16, 16, 3\)"),
        (np.zeros((4, 16, 16, 3), np.int64), "dtype int64"),
        (np.zeros((16, 16, 3), np.float32), r"dtype float32 and shape \(16, 16, 3\)"),
        (np.zeros((16, 16), np.float32), r"shape \(16, 16\)"),
        (Image.new("RGB", (16, 8)), r"dtype uint8 and shape \(8, 16, 3\)"),
        (None, "no array"),
    ],
)
@pytest.mark.parametrize("sigma", [0.1, (0.1, 0.2)])
def test_only_batches_of_floats_are_degraded(images, message, sigma):
    degradation = GaussianNoise(sigma)
    with pytest.raises(ImageError, match=f"{message}"):
        degradation(images, jax.random.key(0))
    if isinstance(images, np.ndarray):
        with pytest.raises(ImageError, match=r"pass \(N, H, W, C\) floats in \[0, 1\]"):
            jax.eval_shape(degradation.__call__, jnp.asarray(images), jax.random.key(0))


@pytest.mark.parametrize("count", [None, 3])
def test_raw_keys_draw_what_typed_ones_draw(count):
    images = RANDOM.random((3, 8, 8, 1), np.float32)
    typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
    if count:
        typed, raw = jax.random.split(typed, count), np.asarray(jax.random.split(raw, count))
    for degradation in (GaussianNoise(0.1), ShotNoise((5.0, 90.0))):
        expected = degradation(images, typed)
        np.testing.assert_array_equal(degradation(images, raw), expected)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (0, "key 0 can't be used for 4 images"),
        ("seed", "key 'seed' can't"),
        (np.zeros((4,), np.uint32), r"of dtype uint32 and shape \(4,\) can't"),
        (np.zeros((4, 2), np.float32), "of dtype float32"),
        (jax.random.split(jax.random.key(0), 3), r"of dtype key<fry> and shape \(3,\) can't"),
        (jax.random.split(jax.random.PRNGKey(0), 3), r"of dtype uint32 and shape \(3, 2\) can't"),
    ],
)
def test_what_is_no_key_is_refused(key, message):
    with pytest.raises(ConfigError, match=f"{message}.*pass jax.random.key"):
        GaussianNoise(0.1)(np.zeros((4, 8, 8, 1), np.float32), key)


@dataclasses.dataclass(frozen=True)
class Forgetful(Degradation):
    """Noise that doesn't say that it is `noisy`."""

    def apply(self, images, ops):
        return images + ops.normal(f"{self.label}.noise", images)


def test_what_draws_without_a_key_is_told_to_say_that_it_is_noisy():
    images = np.zeros((2, 8, 8, 1), np.float32)
    for degradation in (Forgetful(), Compose((GaussianBlur(1.0), Forgetful()))):
        with pytest.raises(ConfigError, match=r"Forgetful.noise is drawn.*set noisy = True"):
            degradation(images)
        assert np.asarray(degradation(images, jax.random.key(0))).std() > 0.5


@dataclasses.dataclass(frozen=True)
class Unfinished(Degradation):
    """A degradation of one's own, before its `apply` is written."""


@dataclasses.dataclass(frozen=True)
class Half(Unfinished):
    """Half the size, which it doesn't say."""

    def apply(self, images, ops):
        return images[:, ::2, ::2]


@dataclasses.dataclass(frozen=True)
class Colourless(Unfinished):
    def apply(self, images, ops):
        return images[..., :1]


@dataclasses.dataclass(frozen=True)
class Returnless(Unfinished):
    def apply(self, images, ops):
        del images, ops


@dataclasses.dataclass(frozen=True)
class Undefined(Unfinished):
    """NaN where images are black."""

    def apply(self, images, ops):
        return images / images


@pytest.mark.parametrize(
    ("degradation", "message"),
    [
        (Unfinished(), r"Unfinished has no apply; define apply\(self, images, ops\)"),
        (Half(), r"Half\(\) makes .* \(2, 4, 4, 3\) .*reduction 1 they must be \(2, 8, 8, 3\)"),
        (Compose((Half(),)), r"Half\(\),\)\) makes arrays of shape \(2, 4, 4, 3\)"),
        (Colourless(), r"makes arrays of shape \(2, 8, 8, 1\)"),
        (Returnless(), r"Returnless\(\) makes arrays of shape \(\)"),
        (Undefined(), r"Undefined\(\) makes values that are NaN or infinite"),
    ],
)
def test_degradations_of_ones_own_must_do_what_they_say(degradation, message):
    images = np.full((2, 8, 8, 3), 200, np.uint8)
    images[1, 0, 0] = 0
    with pytest.raises(ConfigError, match=message):
        evaluation.degraded(degradation, images)


def test_training_does_not_begin_with_a_degradation_that_makes_nan(monkeypatch, tmp_path):
    monkeypatch.setitem(REGISTRY, "Undefined", Undefined)
    experiment = Experiment(
        "a", NoiseReducer(), Undefined(), Data(image_size=(16, 16)), run_dir=str(tmp_path / "run")
    )
    with pytest.raises(ConfigError, match=r"Undefined\(\) makes values that are NaN"):
        train(experiment)


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_a_part_draws_the_same_whatever_other_parts_there_are(run):
    gray = np.full((3, 8, 8, 1), 0.5, np.float32)
    noise = GaussianNoise((0.01, 0.05))
    nothing = [SaltAndPepper(0.0), Mask(boxes=(0, 2), size=0.0), GaussianBlur((0.0, 1e-3))]
    alone = degraded(run, noise, gray)
    for parts in (
        (noise, *nothing),
        (*nothing, noise),
        (nothing[0], Compose((nothing[1], Compose((noise,)))), nothing[2]),
    ):
        np.testing.assert_array_equal(degraded(run, Compose(parts), gray), alone)


def test_streams_are_told_apart_by_the_whole_path():
    keys = jax.random.split(jax.random.key(0), 2)
    images = np.zeros((2, 4, 4, 1), np.float32)
    ops = JaxOps(keys)
    drawn = [
        np.asarray(own.normal(name, images))
        for own, name in [
            (ops, "a"),
            (ops, "b"),
            (ops.within("a"), "a"),
            (ops.within("a").within("b"), "a"),
            (ops.within("b"), "a"),
        ]
    ]
    assert len({values.tobytes() for values in drawn}) == len(drawn)
    np.testing.assert_array_equal(JaxOps(keys).normal("a", images), drawn[0])


def impulse(side=41):
    image = np.zeros((1, side, side, 1), np.float32)
    image[0, side // 2, side // 2] = 1
    return image


def centre(image, radius=10):
    middle = slice(image.shape[1] // 2 - radius, image.shape[1] // 2 + radius + 1)
    return image[0, middle, middle, 0]


@pytest.mark.parametrize(
    ("blur", "covariance"),
    [
        (Blur(1.7), np.diag([1.7**2, 1.7**2])),
        (Blur(3.0, 0.8, angle=35.0), None),
        (Blur(2.0, 1.0, angle=-100.0, beta=0.6), None),
        (Blur(1.5, beta=3.5, radius=4), np.diag([1.5**2, 1.5**2])),
        (Blur(2.5, 1.2, angle=60.0, beta=1.4, plateau=True, radius=7), None),
    ],
)
def test_blur_is_the_formula_of_real_esrgan(blur, covariance):
    if covariance is None:
        angle = np.deg2rad(blur.angle)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        covariance = turn @ np.diag([blur.sigma**2, blur.sigma_y**2]) @ turn.T
    y, x = np.mgrid[-10:11, -10:11]
    places = np.stack([x, y], -1)
    form = np.einsum("ijk,kl,ijl->ij", places, np.linalg.inv(covariance), places)
    power = form**blur.beta
    kernel = 1 / (1 + power) if blur.plateau else np.exp(-power / 2)
    kernel[(abs(x) > blur.radius) | (abs(y) > blur.radius)] = 0
    kernel /= kernel.sum()
    np.testing.assert_allclose(centre(blur(impulse())), kernel, atol=1e-6)
    # Edges, also of an image that is smaller than the kernel.
    for size in (23, 6):
        images = RANDOM.random((2, size, size + 3, 3), np.float32)
        expected = scipy.ndimage.correlate(images, kernel[None, :, :, None], mode="reflect")
        np.testing.assert_allclose(blur(images), expected, atol=1e-5)


@pytest.mark.parametrize(("length", "angle"), [(0.0, 0.0), (7.0, 0.0), (12.5, 33.0), (20.0, 135.0)])
def test_motion_blur_is_the_mean_of_shifted_images(length, angle):
    direction = np.array([np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])
    picture = impulse()[0, ..., 0]
    moments = np.linspace(-length / 2, length / 2, 1001)
    expected = np.mean(
        [scipy.ndimage.shift(picture, moment * direction, order=1) for moment in moments], axis=0
    )
    result = MotionBlur(length, angle)(impulse(), jax.random.key(0))[0, ..., 0]
    np.testing.assert_allclose(result, expected, atol=3e-3)
    assert np.asarray(result).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("cutoff", "radius"), [(np.pi / 5, 10), (np.pi / 2, 3), (np.pi, 10)])
def test_sinc_is_the_formula_of_real_esrgan(cutoff, radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    distance = np.sqrt(x**2 + y**2)
    distance[radius, radius] = 1
    kernel = cutoff * scipy.special.j1(cutoff * distance) / (2 * np.pi * distance)
    kernel[radius, radius] = cutoff**2 / (4 * np.pi)
    kernel /= kernel.sum()
    # On gray, so that nothing is clipped.
    result = np.asarray(Sinc(float(cutoff), radius)(0.5 + 0.2 * impulse())) - 0.5
    np.testing.assert_allclose(centre(result, radius), 0.2 * kernel, atol=1e-6)


def pillow_resize(image, size, kernel):
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1], kernel))
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, -1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("kernel", ["area", "bicubic", "lanczos", "matlab"])
def test_downscale_is_pillows_opencvs_and_matlabs(scale, kernel):
    image = RANDOM.random((12 * 4, 12 * 3, 3), np.float32)
    small = (image.shape[0] // scale, image.shape[1] // scale)
    if kernel == "area":
        expected = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
    elif kernel == "matlab":
        # MATLAB's weights are Pillow's, but at the edges, which are far away once mirrored.
        edges = ((12, 12), (12, 12), (0, 0))
        large = tuple(side + 24 // scale for side in small)
        padded = np.pad(image, edges, "symmetric")
        expected = pillow_resize(padded, large, Image.Resampling.BICUBIC)
        edge = 12 // scale
        expected = expected[edge:-edge, edge:-edge]
    else:
        expected = pillow_resize(image, small, Image.Resampling[kernel.upper()])
    result = Downscale(scale, kernel)(image[None])[0]
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected.clip(0, 1), atol=1e-6)


OPENCV = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def opencv_there_and_back(image, factor, there, back):
    height, width = image.shape[:2]
    other = (int(width * factor + 1e-4), int(height * factor + 1e-4))
    image = cv2.resize(image, other, interpolation=OPENCV[there])
    return cv2.resize(image, (width, height), interpolation=OPENCV[back]).clip(0, 1)


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.77, 1.0, 1.4])
@pytest.mark.parametrize("kernel", ["area", "bilinear", "bicubic"])
def test_resize_is_opencvs_there_and_back(factor, kernel):
    image = RANDOM.random((40, 31, 3), np.float32)
    expected = opencv_there_and_back(image, factor, kernel, kernel)
    np.testing.assert_allclose(Resize(factor, kernel)(image[None])[0], expected, atol=2e-5)


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_resize_draws_a_factor_and_two_kernels_for_each_image(run):
    images = np.tile(RANDOM.random((1, 16, 16, 3), np.float32), (60, 1, 1, 1))
    kernels = ("area", "bicubic")
    results = degraded(run, Resize((0.5, 1.5), kernels), images)
    known = {
        (size, there, back): opencv_there_and_back(images[0], size / 16, there, back)
        for size in range(8, 24)
        for there in kernels
        for back in kernels
    }
    distance = np.abs(results[:, None] - np.stack(list(known.values()))).max(axis=(2, 3, 4))
    assert distance.min(axis=1).max() < 2e-5
    drawn = {list(known)[index] for index in distance.argmin(axis=1)}
    assert len({size for size, _, _ in drawn}) > 8
    assert len({(there, back) for _, there, back in drawn}) == 4


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_gaussian_noise_may_leave_the_range_and_may_be_gray(run):
    images = np.full((400, 8, 8, 3), 0.1, np.float32)
    noise = degraded(run, GaussianNoise(0.3, clip=False, gray=0.25), images) - 0.1
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    gray = (noise == noise[..., :1]).all(axis=(1, 2, 3))
    assert gray.mean() == pytest.approx(0.25, abs=0.07)
    others = noise[~gray]
    assert np.corrcoef(others[..., 0].ravel(), others[..., 1].ravel())[0, 1] < 0.05


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_camera_noise_grows_with_brightness(run):
    levels = np.float32([0.2, 0.5, 0.8])
    images = np.tile(levels[None, :, None, None], (50, 1, 200, 1))
    noise = degraded(run, CameraNoise(0.004, 0.02), images) - images
    np.testing.assert_allclose(noise.var(axis=(0, 2, 3)), 0.004 * levels + 0.02**2, rtol=0.06)


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_at_full_colour_is_libjpegs(quality):
    image = smooth_images((1, 45, 51, 3))[0]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    expected = np.asarray(Image.open(file), np.float32)
    full, half = (
        np.asarray(JPEG(quality, subsampling)(image[None] / np.float32(255)))[0] * 255
        for subsampling in ("4:4:4", "4:2:0")
    )
    error = np.abs(full - expected).mean()
    assert error < 0.4 * max(np.abs(expected - image).mean(), 0.5)
    assert error < 0.5 * np.abs(half - expected).mean()


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_jpeg_draws_its_subsampling_for_each_image(run):
    image = smooth_images((1, 24, 24, 3)) / np.float32(255)
    results = degraded(run, JPEG(80, ("4:2:0", "4:4:4")), np.tile(image, (40, 1, 1, 1)))
    distances = [
        np.abs(JPEG(80, subsampling)(image) - results).mean(axis=(1, 2, 3))
        for subsampling in ("4:2:0", "4:4:4")
    ]
    # Coefficients that lie between two multiples may be rounded either way.
    assert np.min(distances, axis=0).max() < np.max(distances, axis=0).min() / 4
    assert np.argmin(distances, axis=0).mean() == pytest.approx(0.5, abs=0.3)
    only = JPEG(80, ("4:4:4",))
    assert not only.is_random
    np.testing.assert_array_equal(only(image), JPEG(80, "4:4:4")(image))


@dataclasses.dataclass(frozen=True)
class Line(Degradation):
    """`slope * images + offset`."""

    slope: float
    offset: float

    def apply(self, images, ops):
        return images * self.slope + self.offset


def shares(values):
    """The values of images that each have one value, and how often they occur."""
    assert (values == values[:, :1, :1, :1]).all()
    first = values[:, 0, 0, 0].astype(np.float64)
    found, counts = np.unique(first.round(4), return_counts=True)
    return dict(zip(found.tolist(), counts / len(values), strict=True))


@pytest.mark.parametrize("run", ["jax", "tf"])
def test_parts_are_chosen_for_each_image(run):
    images = np.full((2000, 1, 2, 1), 0.4, np.float32)
    half, more, less = Line(0.5, 0.0), Line(1.0, 0.1), Line(1.0, -0.3)
    found = shares(degraded(run, Sometimes(0.2, half), images))
    assert found == {0.2: pytest.approx(0.2, abs=0.04), 0.4: pytest.approx(0.8, abs=0.04)}

    found = shares(degraded(run, OneOf((half, more, less), (1, 5, 4)), images))
    assert found == {
        0.2: pytest.approx(0.1, abs=0.03),
        0.5: pytest.approx(0.5, abs=0.05),
        0.1: pytest.approx(0.4, abs=0.05),
    }

    steps = (half, more, Line(-0.7, 0.9))
    expected = {}
    for order in itertools.permutations(steps):
        value = 0.4
        for step in order:
            value = value * step.slope + step.offset
        expected[round(value, 4)] = pytest.approx(1 / 6, abs=0.03)
    assert len(expected) == 6
    assert shares(degraded(run, Shuffled(steps), images)) == expected


def test_one_of_several_blurs_is_the_blur_itself():
    images = np.tile(RANDOM.random((1, 12, 12, 3), np.float32), (30, 1, 1, 1))
    blurs = (Blur(0.8, radius=4), MotionBlur(8.0, 30.0), Sinc(1.5))
    results = np.asarray(OneOf(blurs)(images, jax.random.key(0)))
    each = np.stack([blur(images[:1]) for blur in blurs])
    distance = np.abs(results[None] - each).max(axis=(2, 3, 4))
    assert distance.min(axis=0).max() < 1e-6
    assert set(distance.argmin(axis=0)) == {0, 1, 2}


def test_parts_that_are_chosen_draw_noise_of_their_own():
    gray = np.full((1, 64, 64, 1), 0.5, np.float32)
    noise = GaussianNoise(0.05, clip=False)
    for parts in ((noise, noise), (Compose((noise,)), noise)):
        shuffled = np.asarray(Shuffled(parts)(gray, jax.random.key(0))) - 0.5
        assert shuffled.std() == pytest.approx(0.05 * 2**0.5, rel=0.1)


def test_a_degradation_says_by_how_much_it_reduces_and_where_jpegs_blocks_lie():
    jpeg, full = JPEG(50), JPEG(50, "4:4:4")
    both = JPEG(50, ("4:2:0", "4:4:4"))
    assert [d.grid for d in (GaussianNoise(0.1), full, jpeg, both)] == [1, 8, 16, 16]
    assert Compose((GaussianBlur(1.0), full, GaussianNoise(0.1))).grid == 8
    assert Sometimes(0.5, full).grid == OneOf((full, full)).grid == Shuffled((full,)).grid == 8
    small = Compose((Downscale(3), full, Downscale(2), GaussianNoise(0.1)))
    assert (small.reduction, small.grid) == (6, 24)
    assert OneOf((Downscale(2), Downscale(2, "area"))).reduction == 2
    images = RANDOM.random((1, 36, 48, 1), np.float32)
    assert small(images, jax.random.key(0)).shape == (1, 6, 8, 1)
    # A crop at a multiple of the grid is degraded as that part of the whole.
    images = smooth_images((1, 64, 64, 3)) / np.float32(255)
    crop = slice(16, 48)
    np.testing.assert_allclose(
        full(images[:, crop, crop]), full(images)[:, crop, crop], atol=1.01 / 255
    )


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=lambda value: type(value).__name__)
def test_degradations_survive_json(degradation):
    experiment = Experiment("a", NoiseReducer(), degradation)
    text = json.dumps(describe(experiment))
    assert experiment_from_json(json.loads(text)).degradation == degradation


@pytest.mark.parametrize("name", ["photo_real_esrgan", "photo_bsrgan"])
def test_pipelines_for_photographs_degrade(name):
    path = Path(__file__).parent.parent / "experiments" / f"{name}.py"
    experiment = runpy.run_path(str(path), run_name="script")["experiment"]
    images = smooth_images((4, 32, 32, 3)) / np.float32(255)
    keys = jax.random.split(jax.random.key(0), 4)
    worse = np.asarray(jax.jit(experiment.degradation.__call__)(images, keys))
    assert worse.shape == images.shape
    assert worse.min() >= 0
    assert worse.max() <= 1
    assert (np.abs(worse - images).mean(axis=(1, 2, 3)) > 0.005).all()
    description = json.loads(json.dumps(describe(experiment)))
    assert experiment_from_json(description) == experiment
