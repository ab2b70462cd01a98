import io

import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from aecore.data.batches import training_batches
from aecore.data.ops import TensorFlowOps
from aecore.degradations import (
    JPEG,
    Compose,
    GaussianBlur,
    GaussianNoise,
    JaxOps,
    Mask,
    Pixelate,
    SaltAndPepper,
    ShotNoise,
)
from aecore.errors import ConfigError

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
    return np.asarray(degradation(images, jax.random.key(0)))


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
    ],
)
def test_the_same_numbers_eagerly_under_jit_and_in_tf_data(degradation):
    images = RANDOM.random((3, 30, 22, 3), np.float32)
    eager = np.asarray(degradation(images))
    np.testing.assert_allclose(jax.jit(degradation)(images), eager, atol=1e-6)
    np.testing.assert_allclose(run_in_tf_data(degradation, images), eager, atol=1e-6)


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
]


@pytest.mark.parametrize("degradation", RANDOM_ONES, ids=lambda value: type(value).__name__)
def test_noise_of_an_image_depends_on_its_key_alone(degradation):
    images = RANDOM.random((6, 8, 8, 1), np.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    together = degradation(images, keys)
    apart = [degradation(images[i : i + 1], keys[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, np.stack(apart))


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
    noisy = np.asarray(GaussianNoise(2.0)(images, jax.random.key(0)))
    assert noisy.min() == 0
    assert noisy.max() == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianNoise(-0.1), "sigma -0.1 is out of bounds; use 0 <= sigma$"),
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
        (lambda: GaussianNoise(0.1)(np.zeros((1, 8, 8, 1))), "pass key="),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


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
