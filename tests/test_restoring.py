import concurrent.futures

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from PIL import Image

import aecore
from aecore.errors import CheckpointError, ConfigError, ImageError
from aecore.models import NoiseReducer, ResolutionEnhancer, SubpixelAutoencoder, UNet
from aecore.networks import models
from aecore.restoring import engine

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


def compiled_shapes(restorer):
    return {key[0].shape for key in restorer._engine._known if isinstance(key, tuple)}


def sizes_of(images):
    return {index: image.shape[:2] for index, image in enumerate(images)}


def reading(images):
    return lambda order: ((index, images[index]) for index in order)


def identity(channels):
    return aecore.Restorer.of(Identity(channels=channels), {})


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
    swapped = image.astype(image.dtype.newbyteorder())
    np.testing.assert_allclose(identity(channels)(swapped), image, atol=1e-7)
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
    doubling = aecore.Restorer.of(Doubling(channels=1), {})
    image = np.array([[0, 100, 200, 255]], np.uint8)
    np.testing.assert_array_equal(doubling(image), [[0, 200, 255, 255]])
    assert doubling(np.ones((4, 4), np.float32)).max() == 1


def test_sides_are_padded_by_reflection():
    class MeanOfAll(Identity):
        def decode(self, codes):
            return codes * 0 + codes.mean(axis=(1, 2), keepdims=True)

    image = RANDOM.random((6, 5), np.float32)
    padded = np.pad(image, [(0, 2), (0, 3)], mode="reflect")
    restored = aecore.Restorer.of(MeanOfAll(channels=1), {})(image)
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
    expected = restorer.network.model.apply({"params": restorer.params}, image[None, ..., None])
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
        (np.zeros((8, 8, 4), np.uint8), "4 channels, the model NoiseReducer takes 1"),
        (np.zeros((8, 8, 2), np.uint8), "2 channels"),
        (np.zeros(8, np.uint8), r"shape \(8,\) is no image"),
        (np.zeros((0, 8), np.uint8), r"shape \(0, 8\) is no image"),
        (np.zeros((8, 8), np.int64), "dtype int64 is not supported; use uint8"),
        (np.full((8, 8), 255.0), r"must lie in \[0, 1\], these in \[255, 255\]"),
        (np.full((8, 8), np.nan), "values that are NaN"),
        (Image.new("F", (8, 8)), "no known range"),
        ("no/such/file.png", "no/such/file.png can't be read: No such file"),
    ],
)
def test_images_that_do_not_fit_are_refused(trained, image, message):
    with pytest.raises(ImageError, match=message):
        aecore.Restorer.load(trained)(image)


@pytest.mark.parametrize("shape", [(9, 13, 3), (2, 9, 13, 3)])
def test_colour_on_a_network_for_gray_is_restored_channel_by_channel(trained, shape, caplog):
    restorer = aecore.Restorer.load(trained)
    image = RANDOM.integers(0, 256, shape, np.uint8)
    restored = restorer(image)
    for channel in range(3):
        expected = restorer(image[..., channel : channel + 1])
        np.testing.assert_array_equal(restored[..., channel : channel + 1], expected)
    assert [record.message for record in caplog.records] == [
        "colour pictures are restored channel by channel: the network is for gray"
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_on_a_network_for_colour_is_the_mean_of_equal_channels(dtype, caplog):
    class Uneven(Identity):
        def decode(self, codes):
            return codes * np.array([0.5, 0.75, 1.0], np.float32)

    image = RANDOM.integers(0, np.iinfo(dtype).max, (9, 14), dtype)
    restored = aecore.Restorer.of(Uneven(channels=3), {})(image)
    np.testing.assert_allclose(restored, np.rint(0.75 * image), atol=1)
    np.testing.assert_array_equal(identity(3)(image), image)
    assert "as if in colour" in caplog.text


@pytest.mark.parametrize(
    ("model", "tile"),
    [
        (NoiseReducer(), 64),
        (NoiseReducer(), 101),
        (ResolutionEnhancer((6, 5, 4)), 64),
        # Whose convolutions are computed in tiles of their own on CPUs.
        (ResolutionEnhancer((36, 34, 33)), 64),
        (SubpixelAutoencoder(), 64),
        (UNet((4, 6), channels=3), 96),
    ],
)
def test_tiles_and_wholes_are_the_same(model, tile):
    params = random_params(model)
    image = RANDOM.random((130, 117, model.channels), np.float32)
    whole = aecore.Restorer.of(model, params, tile=0)
    tiled = aecore.Restorer.of(model, params, tile=tile)
    np.testing.assert_allclose(tiled(image), whole(image), atol=1e-5)
    # As what is seen by each tile must matter, a tile alone is not the same.
    alone = whole(image[:64, :64])
    assert np.abs(alone - whole(image)[:64, :64]).max() > 1e-3


def test_tiles_and_wholes_are_the_same_in_bytes():
    model = NoiseReducer()
    params = random_params(model)
    image = RANDOM.integers(0, 256, (230, 187), np.uint8)
    tiled = aecore.Restorer.of(model, params, tile=64)(image).astype(int)
    assert np.abs(tiled - aecore.Restorer.of(model, params, tile=0)(image)).max() <= 1


def test_large_pictures_are_restored_in_tiles_of_themselves(monkeypatch):
    monkeypatch.setitem(engine._TILE, "cpu", 64)
    model = NoiseReducer()
    params = random_params(model)
    image = RANDOM.random((300, 200), np.float32)
    restorer = aecore.Restorer.of(model, params)
    whole = aecore.Restorer.of(model, params, tile=0)(image)
    np.testing.assert_allclose(restorer(image), whole, atol=1e-5)
    assert max(compiled_shapes(restorer)) <= (64, 64)


def test_a_network_that_sees_everything_is_not_tiled(monkeypatch):
    class Centered(Identity):
        def decode(self, codes):
            return codes - codes.mean(axis=(1, 2), keepdims=True)

    monkeypatch.setitem(engine._TILE, "cpu", 16)
    image = RANDOM.random((40, 40), np.float32)
    restored = aecore.Restorer.of(Centered(channels=1), {})(image)
    np.testing.assert_allclose(restored, np.clip(image - image.mean(), 0, 1), atol=1e-6)
    with pytest.raises(ConfigError, match="looks at whole pictures at once"):
        aecore.Restorer.of(Centered(channels=1), {}, tile=16)(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 8}, "too small for NoiseReducer, which sees 4 and 8 pixels beyond; use at least"),
        ({"tile": -1}, "tile -1 is not possible"),
        ({"batch_size": 0}, "batch_size 0 is not possible"),
        ({"precision": "float16"}, "precision 'float16' is unknown"),
    ],
)
def test_wrong_settings_are_refused(trained, settings, message):
    with pytest.raises(ConfigError, match=message):
        aecore.Restorer.load(trained, **settings)(np.zeros((100, 100), np.uint8))


def exhausting(restorer, too_large):
    """Has a restorer's compiled functions run out of memory for larger shapes."""
    compile_ = restorer._engine._compile

    def compiled(kind, *args):
        function = compile_(kind, *args)

        def execute(*args):
            if max(kind.shape) > too_large:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return function(*args)

        return execute

    restorer._engine._compile = compiled


def test_tiles_are_halved_where_memory_does_not_suffice(trained, caplog):
    images = [RANDOM.random((900, 40), np.float32), RANDOM.random((30, 20), np.float32)]
    restorer = aecore.Restorer.load(trained)
    exhausting(restorer, 300)
    restored = list(restorer.each(images))
    whole = aecore.Restorer.load(trained, tile=0)
    for image, result in zip(images, restored, strict=True):
        np.testing.assert_allclose(result, whole(image), atol=1e-5)
    assert [record.message.split("; ")[1] for record in caplog.records] == [
        "going on with tiles of 128 pixels"
    ]


@pytest.mark.parametrize("tile", [0, "auto", 128])
def test_where_no_tile_is_small_enough_the_error_says_so(trained, tile):
    restorer = aecore.Restorer.load(trained, tile=tile)
    exhausting(restorer, 10)
    with pytest.raises(ImageError, match="does not suffice for"):
        restorer(np.zeros((900, 900), np.uint8))


def test_images_of_many_sizes_share_shapes():
    model = NoiseReducer()
    params = random_params(model)
    images = [
        RANDOM.integers(0, 256, (*RANDOM.integers(5, 200, 2), 1), np.uint8) for _ in range(60)
    ]
    announced, unannounced = (aecore.Restorer.of(model, params) for _ in range(2))
    together = dict(announced.many(sizes_of(images), reading(images)))
    assert len(compiled_shapes(announced)) <= 4
    restored = list(unannounced.each(images))
    assert len(compiled_shapes(unannounced)) <= 7
    whole = aecore.Restorer.of(model, params)
    for index in range(0, len(images), 20):
        whole._engine._shapes.clear()
        alone = whole(images[index]).astype(int)
        assert np.abs(alone - restored[index]).max() <= 1
        assert np.abs(alone - together[index]).max() <= 1


def test_images_that_can_not_be_read_do_not_stop_the_others(trained):
    images = [RANDOM.random((8 + 4 * (i % 3), 12), np.float32) for i in range(9)]

    def read(order):
        for index in order:
            if index == 4:  # Which can't be read,
                continue
            yield index, images[index]
            if index == 5:  # and which has two frames.
                yield index, 1 - images[index]

    restorer = aecore.Restorer.load(trained)
    restored = list(restorer.many(sizes_of(images), read))
    assert sorted(key for key, _ in restored) == [0, 1, 2, 3, 5, 5, 6, 7, 8]
    # Images of one size are neighbours.
    heights = [result.shape[0] for _, result in restored]
    assert heights == sorted(heights)
    for key in (3, 8):
        np.testing.assert_allclose(dict(restored)[key], restorer(images[key]), atol=1e-6)
    frames = [result for key, result in restored if key == 5]
    np.testing.assert_allclose(frames[1], restorer(1 - images[5]), atol=1e-6)


def test_images_before_one_whose_reading_fails_are_restored(trained):
    def read(order):
        yield order[0], np.zeros((8, 8))
        raise OSError("gone")

    restored = aecore.Restorer.load(trained).many({"a": (8, 8), "b": (8, 8)}, read)
    assert next(restored)[0] == "a"
    with pytest.raises(OSError, match="gone"):
        next(restored)


def test_networks_that_pad_otherwise_get_arrays_of_their_own_shape():
    class Reflecting(Identity):
        def decode(self, codes):
            padded = jnp.pad(codes, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
            return (padded[:, 2:, 2:] + padded[:, :-2, :-2]) / 2

    images = [RANDOM.random((4 * count, 8), np.float32) for count in range(2, 9)]
    restorer = aecore.Restorer.of(Reflecting(channels=1), {})
    for index, restored in restorer.many(sizes_of(images), reading(images)):
        padded = np.pad(images[index], 1, mode="reflect")
        np.testing.assert_allclose(restored, (padded[2:, 2:] + padded[:-2, :-2]) / 2, atol=1e-6)


def test_long_and_thin_images_do_not_get_large_arrays(trained):
    restorer = aecore.Restorer.load(trained)
    for shape in ((28, 28), (32, 32), (4, 30000), (5, 20000), (300, 200)):
        restorer(np.zeros(shape, np.uint8))
    assert all(height * width <= 2**18 for height, width in compiled_shapes(restorer))


def test_images_before_one_that_does_not_fit_are_restored(trained):
    restored = aecore.Restorer.load(trained).each([np.zeros((8, 8)), np.zeros((8, 8)), np.ones(3)])
    assert next(restored).shape == next(restored).shape == (8, 8)
    with pytest.raises(ImageError, match=r"shape \(3,\) is no image"):
        next(restored)


def test_memory_that_runs_out_late_is_blamed_on_the_batch_that_needed_it(trained, monkeypatch):
    restorer = aecore.Restorer.load(trained)
    images = [RANDOM.random((400, 300), np.float32)] * 2 + [RANDOM.random((28, 28), np.float32)]
    expected = [restorer(image) for image in images]
    device_get = jax.device_get

    def get(array):
        if getattr(array, "ndim", 0) == 4 and array.shape[1] > 200:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return device_get(array)

    monkeypatch.setattr(jax, "device_get", get)
    for result, image in zip(aecore.Restorer.load(trained).each(images), expected, strict=True):
        np.testing.assert_allclose(result, image, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 4, 4, 99), np.float32), "99 features, those of NoiseReducer 8"),
        ("text", "holds no codes"),
        ([[1.0], [1.0, 2.0]], "not an array"),
    ],
)
def test_codes_that_do_not_fit_are_refused(trained, codes, message):
    with pytest.raises(ImageError, match=message):
        aecore.Restorer.load(trained).decode(codes)


def test_threads_may_share_a_restorer(trained):
    restorer = aecore.Restorer.load(trained)
    images = [RANDOM.integers(0, 256, (8 * (i % 5 + 1), 24), np.uint8) for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        together = list(threads.map(restorer, images))
    fresh = aecore.Restorer.load(trained)
    for image, restored in zip(images, together, strict=True):
        assert np.abs(restored.astype(int) - fresh(image)).max() <= 1


def test_bfloat16_is_close(trained):
    image = RANDOM.random((16, 20), np.float32)
    exact = aecore.Restorer.load(trained)(image)
    rounded = aecore.Restorer.load(trained, precision="bfloat16")(image)
    assert 0 < np.abs(exact - rounded).max() < 0.02


def test_nothing_is_printed(trained, capfd):
    restorer = aecore.Restorer.load(trained)
    restorer(np.zeros((700, 900, 3), np.uint8))
    restorer.summary()
    assert capfd.readouterr() == ("", "")


def test_runs_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; name a run"):
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
