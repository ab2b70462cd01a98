import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import aecore
from aecore import models
from aecore.errors import CheckpointError, ImageError

RANDOM = np.random.default_rng(0)


class Identity(models.Autoencoder):
    """Gives back what it gets; strides are checked."""

    channels: int = 3
    stride: int = 4

    def encode(self, images):
        assert images.shape[1] % 4 == images.shape[2] % 4 == 0
        return images

    def decode(self, codes):
        return codes


class Doubling(Identity):
    def decode(self, codes):
        return 2 * codes


def identity(channels):
    return aecore.Restorer(Identity(channels=channels), {}, {})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "channels"), [((9, 14), 1), ((9, 14, 1), 1), ((16, 8, 3), 3), ((70, 5, 6, 3), 3)]
)
def test_arrays_come_back_as_they_went_in(shape, channels, dtype):
    image = RANDOM.random(shape)
    if np.issubdtype(dtype, np.integer):
        image = image * np.iinfo(dtype).max
    image = image.astype(dtype)
    restored = identity(channels)(image)
    assert restored.dtype == dtype
    np.testing.assert_allclose(restored, image, atol=1e-7 if dtype == np.float64 else 0)


@pytest.mark.parametrize(
    ("mode", "dtype", "channels"),
    [("L", np.uint8, 1), ("I;16", np.uint16, 1), ("RGB", np.uint8, 3)],
)
def test_pillow_images_and_paths(tmp_path, mode, dtype, channels):
    shape = (9, 13) if channels == 1 else (9, 13, 3)
    array = RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype)
    image = Image.fromarray(array)
    assert image.mode == mode
    restored = identity(channels)(image)
    assert restored.mode == mode
    np.testing.assert_array_equal(np.asarray(restored), array)

    path = tmp_path / "image.png"
    image.save(path)
    for name in (path, str(path)):
        np.testing.assert_array_equal(np.asarray(identity(channels)(name)), array)


def test_results_are_clipped():
    doubling = aecore.Restorer(Doubling(channels=1), {}, {})
    image = np.array([[0, 100, 200, 255]], np.uint8)
    np.testing.assert_array_equal(doubling(image), [[0, 200, 255, 255]])
    assert doubling(np.ones((4, 4), np.float32)).max() == 1


def test_sides_are_padded_by_reflection():
    class MeanOfAll(Identity):
        def decode(self, codes):
            return codes * 0 + codes.mean(axis=(1, 2), keepdims=True)

    image = RANDOM.random((6, 5), np.float32)
    padded = np.pad(image, [(0, 2), (0, 3)], mode="reflect")
    restored = aecore.Restorer(MeanOfAll(channels=1), {}, {})(image)
    np.testing.assert_allclose(restored, np.full((6, 5), padded.mean()), atol=1e-6)


def test_many_images_are_restored_as_one_by_one(trained):
    restorer = aecore.Restorer.load(trained)
    images = RANDOM.integers(0, 256, (130, 15, 18, 1), np.uint8)
    together = restorer(images)
    for index in (0, 63, 64, 129):
        single = restorer(images[index])
        assert np.abs(together[index].astype(int) - single.astype(int)).max() <= 1


def test_restore_is_the_network(trained):
    restorer = aecore.Restorer.load(str(trained))
    image = RANDOM.random((16, 20), np.float32)
    expected = restorer.model.apply({"params": restorer.params}, image[None, ..., None])
    np.testing.assert_allclose(aecore.restore(image, trained), expected[0, ..., 0], atol=1e-6)
    codes = restorer.encode(image)
    assert codes.shape == (1, 4, 5, 8)
    np.testing.assert_allclose(restorer.decode(codes), expected, atol=1e-6)


def test_a_checkpoint_of_eight_devices_is_restored_on_one(trained):
    leaves = jax.tree.leaves(aecore.Restorer.load(trained).params)
    assert all(len(leaf.devices()) == 1 for leaf in leaves)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "3 channels, the model NoiseReducer takes 1"),
        (np.zeros((8, 8, 2), np.uint8), "2 channels"),
        (np.zeros(8, np.uint8), r"shape \(8,\) is no image"),
        (np.zeros((0, 8), np.uint8), r"shape \(0, 8\) is no image"),
        (np.zeros((8, 8), np.int64), "dtype int64 is not supported; use uint8"),
        (np.full((8, 8), 255.0), r"must lie in \[0, 1\], these in \[255, 255\]"),
        (np.full((8, 8), np.nan), "values that are NaN"),
        (Image.new("RGBA", (8, 8)), "mode RGBA is not supported; convert it to L"),
        ("no/such/file.png", "no/such/file.png can't be read: No such file"),
    ],
)
def test_images_that_do_not_fit_are_refused(trained, image, message):
    with pytest.raises(ImageError, match=message):
        aecore.Restorer.load(trained)(image)


def test_runs_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        aecore.restore(np.zeros((8, 8)), tmp_path / "nothing")


def test_a_model_of_ones_own(tiny):
    import dataclasses

    class OwnModel(models.Autoencoder):
        channels: int = 1
        stride: int = 1

        def setup(self):
            self.layer = nn.Conv(1, (3, 3))

        def encode(self, images):
            return self.layer(images)

        def decode(self, codes):
            return codes

    aecore.train(dataclasses.replace(tiny, model=OwnModel()), progress=False)
    image = RANDOM.random((8, 8), np.float32)
    with pytest.raises(CheckpointError, match="'OwnModel' is not registered"):
        aecore.restore(image, tiny.run_dir)
    assert aecore.restore(image, tiny.run_dir, model=OwnModel()).shape == (8, 8)
