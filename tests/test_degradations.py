import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from aecore import data
from aecore.degradations import Compose, GaussianBlur, GaussianNoise, Pixelate
from aecore.errors import ConfigError

RANDOM = np.random.default_rng(0)


def run_in_tf_data(degradation, images, seed=(3, 4)):
    import tensorflow as tf

    def degrade(batch):
        return degradation.apply(batch, data._TensorFlowOps(tf.constant(seed, tf.int64)))

    dataset = tf.data.Dataset.from_tensors(tf.constant(images)).map(degrade)
    return next(dataset.as_numpy_iterator())


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
    "degradation", [Pixelate(0.4), GaussianBlur(1.5), Compose((GaussianBlur(1.0), Pixelate(0.5)))]
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


def test_noise_of_an_image_depends_on_its_key_alone():
    images = RANDOM.random((6, 8, 8, 1), np.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    together = GaussianNoise(0.3)(images, keys)
    apart = [GaussianNoise(0.3)(images[i : i + 1], keys[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, np.stack(apart))


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
        (lambda: GaussianNoise(-0.1), "sigma -0.1 is out of bounds"),
        (lambda: GaussianNoise(float("nan")), "sigma nan is out of bounds"),
        (lambda: GaussianNoise((0.5, 0.1)), "low above high"),
        (lambda: GaussianNoise((0.1, 0.2, 0.3)), "not a number or a"),
        (lambda: Pixelate(0.0), "use 0 < scale <= 1"),
        (lambda: Pixelate(1.5), "use 0 < scale <= 1"),
        (lambda: GaussianBlur(-1.0), "use sigma >= 0"),
        (lambda: GaussianNoise(0.1)(np.zeros((1, 8, 8, 1))), "pass key="),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
