import concurrent.futures
import copy
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from etils import epath
from PIL import Image

import aecore
from aecore import models
from aecore.degradations import CameraNoise, Compose, GaussianNoise, Pixelate, Sometimes
from aecore.errors import CheckpointError, ConfigError, ImageError
from aecore.media import images
from aecore.models import (
    NoiseReducer,
    ResolutionEnhancer,
    SubpixelAutoencoder,
    UNet,
    Upscaler,
)
from aecore.networks.network import LinenNetwork
from aecore.networks.receptive_field import ReceptiveField
from aecore.restoring import engine, expectations, kept
from aecore.restoring.restorer import Restorer
from aecore.saved import exported
from aecore.saved.descriptions import Description, describe
from aecore.saved.trained import TrainedNetwork

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
    return {program.kind.shape for program in restorer._engine.programs.compiled}


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
@pytest.mark.every_room
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
    apply = jax.jit(restorer.network.model.apply)
    expected = apply({"params": restorer.params}, image[None, ..., None])
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
        (np.zeros((0, 8), np.uint8), r"shape \(0, 8\) is empty"),
        (jnp.zeros((8, 8), jnp.bfloat16), "bfloat16 is not supported; use float16, float32 or"),
        ([np.zeros((8, 8)), np.zeros((8, 9))], "images differ in size; .* each"),
        (["a.png", "b.png"], "list of text is not an image; .* one path"),
        ("", "the image's path is empty"),
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


def test_what_is_no_array_has_no_differences_and_is_not_taken_by_each(trained):
    restorer = aecore.Restorer.load(trained)
    with pytest.raises(ImageError, match="dtype int64 is not supported"):
        restorer.differences([[1, 2]])
    with pytest.raises(ImageError, match="a Pillow image is not an array; call the restorer"):
        list(restorer.each([Image.new("L", (8, 8))]))


def test_a_torch_tensor_of_bfloat16_is_refused(trained):
    torch = pytest.importorskip("torch")
    with pytest.raises(ImageError, match="bfloat16 is not supported; use float16, float32 or"):
        aecore.Restorer.load(trained)(torch.zeros((8, 8), dtype=torch.bfloat16))


def test_swapped_arguments_are_not_printed_whole():
    with pytest.raises(CheckpointError, match="is not a run directory") as raised:
        aecore.restore("photo-denoise", np.zeros((8, 8)))
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 1), np.uint8), "dtype uint8 is not supported; use floats"),
        (np.zeros((8, 8, 1), np.float32), r"shape \(8, 8, 1\) is no batch of images"),
        (np.zeros((0, 8, 8, 1), np.float32), r"shape \(0, 8, 8, 1\) is no batch of images"),
        (np.zeros((1, 8, 8, 3), np.float32), "3 channels, the model NoiseReducer takes 1"),
        (np.zeros((1, 8, 9, 1), np.float32), "8x9 pixels are not multiples of 4, the stride of"),
    ],
)
def test_batches_that_do_not_fit_are_refused_within_jit_too(trained, images, message):
    restorer = aecore.Restorer.load(trained)
    for apply in (restorer.apply, jax.jit(restorer.apply)):
        with pytest.raises(ImageError, match=message):
            apply(restorer.params, images)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_batches_of_any_float_are_taken_and_of_symbolic_sizes(trained, dtype):
    restorer = aecore.Restorer.load(trained)
    assert restorer.apply(restorer.params, jnp.zeros((1, 8, 8, 1), dtype)).shape == (1, 8, 8, 1)
    shape = jax.export.symbolic_shape("n, h, w, 1")
    images = jax.ShapeDtypeStruct(shape, dtype)
    assert jax.eval_shape(restorer.apply, restorer.params, images).shape[0] == shape[0]


@pytest.mark.parametrize("shape", [(9, 13, 3), (2, 9, 13, 3)])
def test_colour_on_a_network_for_gray_is_restored_channel_by_channel(trained, shape, caplog):
    restorer = aecore.Restorer.load(trained)
    image = RANDOM.integers(0, 256, shape, np.uint8)
    restored = restorer(image)
    for channel in range(3):
        expected = restorer(image[..., channel : channel + 1])
        np.testing.assert_array_equal(restored[..., channel : channel + 1], expected)
    said = "colour pictures are restored channel by channel: the network is for gray"
    assert [record.message for record in caplog.records].count(said) == 1


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
        ({"tile": True}, "tile True is not possible"),
        ({"batch_size": True}, "batch_size True is not possible"),
        ({"strength": True}, "strength True is not possible"),
        ({"strength": np.nan}, "strength nan is not possible"),
        ({"in_range": "no"}, "in_range 'no' is not possible; use True or False"),
        ({"consistent": 1}, "consistent 1 is not possible; use True or False"),
    ],
)
def test_wrong_settings_are_refused(trained, settings, message):
    with pytest.raises(ConfigError, match=message):
        aecore.Restorer.load(trained, **settings)(np.zeros((100, 100), np.uint8))


@pytest.mark.parametrize("scalar", [np.int64, np.array, jnp.asarray])
def test_settings_may_be_scalars_of_arrays(trained, scalar):
    restorer = aecore.Restorer.load(
        trained,
        tile=scalar(64),
        batch_size=scalar(3),
        devices=scalar(2),
        strength=scalar(0.5) if scalar is not np.int64 else np.float32(0.5),
        in_range=scalar(1) == 1,
    )
    settings = restorer._settings
    for name, value in {"tile": 64, "batch_size": 3, "strength": 0.5, "in_range": True}.items():
        assert (settings[name], type(settings[name])) == (value, type(value))
    assert len(restorer.devices) == 2
    image = RANDOM.random((100, 80), np.float32)
    plain = aecore.Restorer.load(trained, tile=64, batch_size=3, devices=2)
    np.testing.assert_array_equal(restorer(image), plain.with_strength(0.5)(image))
    np.testing.assert_array_equal(restorer.with_strength(scalar(1))(image), plain(image))


def test_floats_may_lie_anywhere_where_the_range_is_not_kept():
    image = 3 * RANDOM.random((8, 12, 1), np.float32) - 1
    restorer = aecore.Restorer.of(Identity(channels=1), {}, in_range=False)
    np.testing.assert_array_equal(restorer.encode(image)[0], image)
    for strength in (0, 0.5, 1):
        result = restorer.with_strength(strength)(image)
        np.testing.assert_allclose(result, np.clip(image, 0, 1), atol=1e-6)
        assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_no_numbers_are_refused_in_any_range(value, caplog):
    image = RANDOM.random((8, 12, 1))
    image[3, 4] = value
    restorer = aecore.Restorer.of(Identity(channels=1), {}, in_range=False)
    for function in (restorer, restorer.encode):
        with pytest.raises(ImageError, match="has values that are .*; replace them"):
            function(image)


def exhausting(restorer, too_large):
    """Has a restorer's compiled functions run out of memory for larger shapes."""
    compile_ = restorer._engine.programs._compile

    def compiled(program):
        function = compile_(program)

        def execute(*args):
            if max(program.kind.shape) > too_large:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return function(*args)

        return execute

    restorer._engine.programs._compile = compiled


def test_tiles_are_halved_where_memory_does_not_suffice(trained, caplog):
    images = [RANDOM.random((900, 40), np.float32), RANDOM.random((30, 20), np.float32)]
    restorer = aecore.Restorer.load(trained)
    exhausting(restorer, 300)
    restored = list(restorer.each(images))
    whole = aecore.Restorer.load(trained, tile=0)
    for image, result in zip(images, restored, strict=True):
        np.testing.assert_allclose(result, whole(image), atol=1e-5)
    assert [
        record.message.split("; ")[1] for record in caplog.records if ";" in record.message
    ] == ["going on with tiles of 96 pixels"]


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


@pytest.mark.parametrize("model", [UNet((4, 6), channels=3, patch=2), Upscaler(4, 1, scale=2)])
def test_what_a_correction_is_added_to_keeps_its_bits(model):
    """Untrained, the correction is zero."""
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    image = RANDOM.random((16, 20, 3), np.float32)
    exact, rounded = (
        aecore.Restorer.of(model, params, precision=precision)(image)
        for precision in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded, exact, atol=1e-6)


def test_nothing_is_printed(trained, capfd):
    restorer = aecore.Restorer.load(trained)
    restorer(np.zeros((700, 900, 3), np.uint8))
    restorer.summary()
    assert capfd.readouterr() == ("", "")


def test_runs_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; name a run"):
        aecore.restore(np.zeros((8, 8)), tmp_path / "nothing")


def test_a_model_of_ones_own(tiny):
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


class Normed(Identity):
    """Keeps statistics besides its parameters."""

    def setup(self):
        self.norm = nn.BatchNorm(use_running_average=True)

    def decode(self, codes):
        return self.norm(codes)


def test_a_model_with_other_variables_than_parameters_is_refused(tiny):
    model = Normed(channels=1)
    with pytest.raises(ConfigError, match="needs batch_stats besides parameters; use"):
        aecore.train(dataclasses.replace(tiny, model=model), progress=False)
    params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)))["params"]
    with pytest.raises(ConfigError, match="alone: .*batch_stats"):
        Restorer.of(model, params)(np.zeros((8, 8)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda params: {"params": params},
        lambda params: jax.tree.map(lambda leaf: leaf[..., :1], params),
        lambda params: {},
        lambda params: None,
    ],
    ids=["variables", "shapes", "missing", "none"],
)
def test_parameters_of_another_model_are_refused(wrong):
    restorer = Restorer.of(NoiseReducer(), wrong(random_params(NoiseReducer())))
    for function in (restorer, restorer.encode):
        with pytest.raises(ConfigError, match="NoiseReducer can't compute with these parameters"):
            function(np.zeros((8, 8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Restorer.of(5, {}), "model 5 is not a network"),
        (lambda: Restorer.of(NoiseReducer, {}), "is not a network; use one such as"),
        (lambda: Restorer.of(nn.Dense(3), {}), "Dense lacks encode, decode, channels"),
        (lambda: Restorer("photo-denoise"), "'photo-denoise' is not a .* use Restorer.load"),
    ],
)
def test_what_is_no_network_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- Kinds of arrays, devices, processes


@pytest.mark.parametrize("shape", [(8, 12), (2, 8, 12, 1)])
def test_jax_arrays_come_back_as_such_where_they_were(trained, shape):
    device = jax.local_devices()[3]
    image = jax.device_put(RANDOM.random(shape, np.float32), device)
    restorer = aecore.Restorer.load(trained)
    for result in (restorer(image), restorer.decode(restorer.encode(image))):
        assert isinstance(result, jax.Array)
        assert result.devices() == {device}
    assert isinstance(next(restorer.each([image[0] if image.ndim == 4 else image])), jax.Array)
    np.testing.assert_array_equal(restorer(image), restorer(np.asarray(image)))


@pytest.mark.parametrize(
    ("shape", "axes", "code_axes"),
    [
        ((8, 12), ("images",), ()),
        ((8, 12), (None, "images"), ()),
        ((8, 12, 1), ("images",), ()),
        ((2, 8, 12, 1), ("images",), ("images",)),
        ((3, 4, 12, 1), (None, "images"), ()),  # Whose codes have one row.
    ],
)
def test_codes_lie_on_the_devices_of_a_divided_image(trained, shape, axes, code_axes):
    mesh = jax.make_mesh((2,), ("images",))

    def divided(axes):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    restorer = aecore.Restorer.load(trained)
    image = RANDOM.random(shape, np.float32)
    placed = jax.device_put(image, divided(axes))
    codes = restorer.encode(placed)
    np.testing.assert_array_equal(codes, restorer.encode(image))
    assert codes.sharding.is_equivalent_to(divided(code_axes), 4)
    assert restorer.decode(codes).sharding.is_equivalent_to(divided(code_axes), 4)
    assert restorer(placed).sharding.is_equivalent_to(divided(axes), len(shape))


def test_within_jit_the_error_names_what_to_use(trained):
    with pytest.raises(ImageError, match=r"use restorer\.apply there"):
        jax.jit(aecore.Restorer.load(trained))(jnp.zeros((8, 8)))


class Tensor:
    """A torch tensor that requires grad, as far as aecore looks at it."""

    device = "somewhere"

    def __init__(self, array, is_detached=False):
        self.array, self.is_detached = array, is_detached

    def detach(self):
        return Tensor(self.array, True)

    def cpu(self):
        return self

    def to(self, device):
        assert device == "somewhere"
        return self

    def __array__(self, dtype=None, copy=None):
        if not self.is_detached:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self.array


def test_torch_tensors_come_back_as_such(trained, monkeypatch):
    torch = types.SimpleNamespace(Tensor=Tensor, from_numpy=Tensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    image = RANDOM.random((8, 12), np.float32)
    restorer = aecore.Restorer.load(trained)
    restored = restorer(Tensor(image))
    assert isinstance(restored, Tensor)
    np.testing.assert_array_equal(restored.array, restorer(image))


def test_real_torch_tensors_come_back_as_such(trained):
    torch = pytest.importorskip("torch")
    image = torch.rand((8, 12), requires_grad=True)
    restored = aecore.restore(image, trained)
    assert isinstance(restored, torch.Tensor)
    np.testing.assert_array_equal(restored, aecore.restore(image.detach().numpy(), trained))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ma.masked_array(np.zeros((8, 8)), np.ones((8, 8))), "masked arrays are not supported"),
        (np.full((8, 8), None), "ndarray of objects is not an image"),
        (None, "NoneType of objects is not an image"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(trained, image, message):
    with pytest.raises(ImageError, match=message):
        aecore.Restorer.load(trained)(image)


def test_devices_may_be_named(trained):
    image = RANDOM.random((8, 8), np.float32)
    expected = aecore.Restorer.load(trained)(image)
    np.testing.assert_array_equal(aecore.Restorer.load(trained, device="cpu")(image), expected)
    for device in ("gpu", "nonsense", 3):
        with pytest.raises(ConfigError, match=f"there is no device {device!r} here; use cpu"):
            aecore.Restorer.load(trained, device=device)
    chosen = jax.local_devices()[2:5]
    assert aecore.Restorer.load(trained).devices == tuple(jax.local_devices())
    assert aecore.Restorer.load(trained, device="cpu").devices == tuple(jax.local_devices())
    assert aecore.Restorer.load(trained, devices=2).devices == tuple(jax.local_devices()[:2])
    assert aecore.Restorer.load(trained, devices=chosen).devices == tuple(chosen)
    for devices in (0, 9, True, "all", [], [3]):
        with pytest.raises(ConfigError, match="devices"):
            aecore.Restorer.load(trained, devices=devices)
    with pytest.raises(ConfigError, match="leave devices out"):
        aecore.Restorer.load(trained, device=chosen[0], devices=1)
    with pytest.raises(ConfigError, match="devices names JAX devices already; leave device 'cpu'"):
        aecore.Restorer.load(trained, device="cpu", devices=chosen)
    with pytest.raises(ConfigError, match="more than once; name each once"):
        aecore.Restorer.load(trained, devices=[chosen[0], *chosen])


def spread(restorer, monkeypatch):
    """Makes a restorer note on which devices each of its results lie."""
    used = []
    start = restorer._engine.programs.start

    def noting(*args):
        restored = start(*args)
        used.append({device for array in restored for device in array.devices()})
        return restored

    monkeypatch.setattr(restorer._engine.programs, "start", noting)
    return used


@pytest.mark.parametrize("name", ["fashion-mnist-denoise", "lfw-enhance", "photo-upscale-2x"])
def test_all_devices_work_and_give_what_one_gives(name, monkeypatch):
    tile = {"lfw-enhance": 288}.get(name, 160)
    every = aecore.Restorer.load(name, tile=tile, batch_size=2)
    one = aecore.Restorer.load(name, tile=tile, batch_size=2, devices=1)
    used = spread(every, monkeypatch)
    # Tiles of a picture, and images for five devices, of which the last one gets a single one.
    picture = RANDOM.integers(0, 256, (400, 300, every.network.channels), np.uint8)
    images = RANDOM.random((9, 28, 28, every.network.channels), np.float32)
    for given in (picture, images):
        used.clear()
        np.testing.assert_array_equal(every(given), one(given))
        assert used == [set(jax.local_devices())]


def test_encode_and_decode_use_all_devices_as_one(trained):
    every, one = aecore.Restorer.load(trained), aecore.Restorer.load(trained, devices=1)
    images = RANDOM.random((200, 8, 8), np.float32)
    codes = every.encode(images[..., None])
    np.testing.assert_array_equal(codes, one.encode(images[..., None]))
    np.testing.assert_array_equal(every.decode(codes), one.decode(codes))


def test_pictures_of_many_sizes_on_all_devices(trained):
    sizes = {n: (8 + n % 5, 8 + n % 7) for n in range(300)}
    images = {n: RANDOM.random(size, np.float32) for n, size in sizes.items()}

    def read(order):
        for n in order:
            yield n, images[n]

    every, one = (
        dict(aecore.Restorer.load(trained, devices=devices).many(sizes, read))
        for devices in (None, 1)
    )
    assert every.keys() == one.keys() == sizes.keys()
    for n in sizes:
        np.testing.assert_array_equal(every[n], one[n])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_apply_takes_arrays_that_are_divided_among_devices(trained, kind):
    restorer = aecore.Restorer.load(trained)
    mesh = jax.make_mesh((8,), ("images",), axis_types=(jax.sharding.AxisType[kind],))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("images"))
    images = RANDOM.random((16, 8, 8, 1), np.float32)
    expected = jax.jit(restorer.apply)(restorer.params, images)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for params in (restorer.params, jax.device_put(restorer.params, whole)):
        for apply in (jax.jit(restorer.apply), restorer.apply):
            result = apply(params, jax.device_put(images, divided))
            assert result.sharding.is_equivalent_to(divided, 4)
            np.testing.assert_allclose(result, expected, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda params, x: restorer.apply(params, x).sum()))
    for leaf, other in zip(
        jax.tree.leaves(gradient(params, jax.device_put(images, divided))),
        jax.tree.leaves(gradient(restorer.params, images)),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_exported", [False, True])
def test_restorers_can_be_pickled_and_copied(trained, tmp_path, is_exported):
    source = trained
    if is_exported:
        source = tmp_path / "a.aecore"
        exported.save(epath.Path(source), aecore.Restorer.load(trained).trained)
    device = jax.local_devices()[2]
    restorer = aecore.Restorer.load(source, batch_size=3, device=device)
    image = RANDOM.random((8, 8), np.float32)
    expected = restorer(image)
    for same in (pickle.loads(pickle.dumps(restorer)), copy.copy(restorer)):
        np.testing.assert_array_equal(same(image), expected)
        assert same.description == restorer.description
        assert same.devices == (device,)
        assert same._engine.most_images((8, 8)) == 3


def test_after_a_fork_there_is_an_error_instead_of_waiting(trained):
    code = f"""
import aecore, multiprocessing, numpy as np, warnings
warnings.simplefilter("ignore")
restorer = aecore.Restorer.load({str(trained)!r})
image = np.zeros((8, 8), np.float32)
restorer(image)
def work(name):
    try:
        if name == "called":
            restorer(image)
        else:
            aecore.restore(image, {str(trained)!r})
    except aecore.errors.ConfigError as error:
        return str(error)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print("\\n".join(pool.map(work, ["called", "loaded"])))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.count("this process was forked after its parent used JAX") == 2


# ---- Restoring without a restorer


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(kept, "_kept", [])


@pytest.fixture
def loaded(nothing_kept, monkeypatch):
    """The sources that were loaded."""
    sources = []
    load = aecore.Restorer.load

    def counting(source, **settings):
        sources.append(source)
        return load(source, **settings)

    monkeypatch.setattr(aecore.Restorer, "load", counting)
    return sources


def test_networks_are_kept_for_the_next_call(trained, loaded):
    image = RANDOM.random((8, 8), np.float32)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: aecore.restore(image, trained), range(8)))
    assert loaded == [trained]
    np.testing.assert_array_equal(results[0], results[-1])
    aecore.restore(image, os.path.relpath(trained))
    assert len(loaded) == 1
    aecore.restore(image, trained, model=NoiseReducer())
    assert len(loaded) == 2


def test_networks_that_changed_are_loaded_again(trained, tmp_path, loaded):
    image = RANDOM.random((8, 8), np.float32)
    path = tmp_path / "a.aecore"
    results = []
    for seed in (0, 1):
        params = random_params(NoiseReducer(), seed)
        exported.save(epath.Path(path), TrainedNetwork.of(NoiseReducer(), params))
        results += [aecore.restore(image, path) for _ in range(2)]
    assert len(loaded) == 2
    assert np.abs(results[1] - results[2]).max() > 1e-3


def test_a_run_that_went_on_is_loaded_again(tiny, loaded):
    image = RANDOM.random((8, 8), np.float32)
    for epochs in (1, 2):
        training = dataclasses.replace(tiny.training, epochs=epochs)
        aecore.train(dataclasses.replace(tiny, training=training), progress=False)
        loaded.clear()
        for _ in range(2):
            aecore.restore(image, tiny.run_dir)
        assert len(loaded) == 1


def test_few_networks_are_kept(trained, tmp_path, loaded):
    network = TrainedNetwork.of(NoiseReducer(), random_params(NoiseReducer()))
    image = np.zeros((8, 8), np.float32)
    for index in range(6):
        path = tmp_path / f"{index}.aecore"
        exported.save(epath.Path(path), network, with_functions=False)
        aecore.restore(image, path, model=NoiseReducer())
    assert len(kept._kept) == 4


# ---- What a network was not trained on


@pytest.mark.parametrize(
    ("degradation", "leaves_gray_noise"),
    [
        (GaussianNoise(0.1), True),
        (Compose((Pixelate(0.5), GaussianNoise(0.1))), True),
        (Compose((Sometimes(0.5, CameraNoise()), Pixelate(0.5))), True),
        (GaussianNoise(0.1, gray=0.3), False),
        (Compose((Pixelate(0.5), Sometimes(0.5, GaussianNoise(0.1, gray=0.3)))), False),
        (Pixelate(0.5), False),
    ],
)
def test_what_is_said_of_gray_pictures_depends_on_the_noise_of_the_training(
    degradation, leaves_gray_noise
):
    experiment = aecore.Experiment(name="noise", model=NoiseReducer(), degradation=degradation)
    described = Description.from_json(describe(experiment))
    assert ("little of the noise" in expectations.of_gray(described)) == leaves_gray_noise
    assert "little of the noise" not in expectations.of_gray(Description())


@pytest.mark.parametrize("kind", [["GaussianNoise"], {}, 1, None])
def test_a_description_of_no_known_degradation_says_nothing_of_noise(kind):
    described = Description(degradation={"type": "Compose", "parts": [{"type": kind}]})
    assert "little of the noise" not in expectations.of_gray(described)


@pytest.fixture
def photographs(photos_dir):
    paths = sorted(Path(photos_dir, "cbsd68").glob("*.png"))[:24]
    return [np.asarray(Image.open(path).convert("RGB"))[:256, :256] for path in paths]


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def small(image, side=80):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def pixelated(image):
    return np.asarray(Pixelate(0.4)(image[None].astype(np.float32) / 255)[0])


def noticed(name, images, words):
    description = aecore.Restorer.load(name).description
    return sum(
        any(words in note for note in expectations.differences(description, image))
        for image in images
    )


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_files_of_colour_of_16_bits_are_refused_before_they_are_restored(tmp_path, ending):
    values = RANDOM.integers(0, 65536, (8, 8, 3), np.uint16)
    path = epath.Path(tmp_path / f"a{ending}")
    images.write_picture(images.Picture((images.Frame(values, mode="RGB;16"),), ""), path)
    restorer = identity(3)
    with pytest.raises(
        ImageError, match=r"RGB;16; restore the array .* the command aecore restore"
    ):
        restorer(path)
    assert not compiled_shapes(restorer)
    assert np.array_equal(restorer(images.read_picture(path).frames[0].values), values)


@pytest.mark.parametrize("ending", [".gif", ".tif"])
def test_restoring_a_path_says_that_other_frames_are_left_out(tmp_path, ending, caplog):
    frames = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)]
    path = tmp_path / f"a{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    identity(3)(path)
    said = f"{path}: only the first of 3 frames or pages is used; the command aecore restore"
    assert said in caplog.text
    frames[0].save(path)
    caplog.clear()
    identity(3)(path)
    assert "only the first" not in caplog.text


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300])
def test_values_that_are_refused_are_not_warned_of_before(value, caplog):
    image = RANDOM.random((40, 40))
    image[10, 10:12] = value, -value
    with pytest.raises(ImageError, match=r"in \[0, 1\]|NaN"):
        aecore.Restorer.load("fashion-mnist-denoise")(image)
    assert not caplog.records


@pytest.mark.parametrize(
    "refused",
    [np.full((280, 28), 127.5), np.full((1, 3, 28, 5), 0.5)],
    ids=["range", "channels"],
)
def test_notes_are_kept_for_images_that_are_accepted(refused, caplog):
    restorer = aecore.Restorer.load("fashion-mnist-denoise")
    with pytest.raises(ImageError):
        restorer(refused)
    with pytest.raises(ImageError):
        list(restorer.each([refused]))
    assert not caplog.records
    restorer(np.full((280, 28), 127, np.uint8))
    assert len(caplog.records) == 2


def test_notes_on_a_file_are_kept_until_it_fits(tmp_path, caplog):
    frames = [Image.new("RGBA", (8, 8), (index, 2, 3, 4)) for index in range(3)]
    frames[0].convert("RGB").save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="channels"):
        identity(4)(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="channels"):
        identity(4).encode(tmp_path / "a.gif")
    assert not caplog.records
    identity(3).encode(tmp_path / "a.gif")
    assert "only the first of" in caplog.text


def test_restoring_says_once_what_a_picture_is_unlike(caplog):
    restorer = aecore.Restorer.load("fashion-mnist-denoise")
    for _ in range(2):
        restorer(np.full((28, 28), 0.5))
        restorer(np.full((2, 300, 28, 1), 0.5))
        list(restorer.each([np.full((28, 28), 99, np.uint8)]))
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 2
    assert messages[0].startswith("less noise or fine detail than the network was trained on")
    assert messages[1].startswith("much larger than the 28x28 pixels")


def test_pictures_to_enlarge_are_compared_with_small_ones():
    model = models.Upscaler(4, 1, scale=4, channels=1)
    description = Description(image_size=(80, 60))
    trained = TrainedNetwork(LinenNetwork(model), random_params(model), description)

    def notes(height, width):
        restorer = aecore.Restorer(trained)
        restorer(np.zeros((height, width), np.uint8))
        return restorer._said

    assert notes(20, 15) == set()
    assert notes(9, 7) == {"much smaller than the 20x15 pixels that the network was trained on"}
    assert notes(90, 65) == {"much larger than the 20x15 pixels that the network was trained on"}


def test_photographs_are_unlike_pixelated_faces_and_noisy_clothes(photographs):
    images = [small(image) for image in photographs]
    assert noticed("lfw-enhance", images, "not pixelated to 40%") == len(images)
    floats = [pixelated(image) for image in images]
    saved = [np.rint(image * 255).astype(np.uint8) for image in floats]
    for own in (floats, saved, [jpeg(image, 90) for image in saved]):
        assert noticed("lfw-enhance", own, "") <= 0.05 * len(own)
    grays = [small(image, 28)[..., 1] for image in photographs]
    assert noticed("fashion-mnist-denoise", grays, "less noise") == len(grays)


@pytest.mark.parametrize("knows_blockiness", [True, False])
def test_jpeg_is_unlike_noise(knows_blockiness, photographs):
    noise = GaussianNoise((0.0, 0.1) if knows_blockiness else (0.02, 0.1))
    random = np.random.default_rng(0)

    def degrade(image):
        values = image / 255 + random.normal(0, random.uniform(0.02, 0.1), image.shape)
        return np.clip(values, 0, 1).astype(np.float32)

    inputs = expectations.describe(np.stack([degrade(image) for image in photographs[::2]]))
    if not knows_blockiness:
        del inputs["blockiness"]
    description = Description(
        inputs=inputs,
        degradation={"type": "GaussianNoise", "sigma": list(noise.sigma)},
        image_size=(256, 256),
    )

    def count(images):
        return sum(
            any("8x8" in note for note in expectations.differences(description, image))
            for image in images
        )

    assert count([jpeg(image, 40) for image in photographs]) >= 0.9 * len(photographs)
    own = [degrade(image) for image in photographs]
    assert sum(bool(expectations.differences(description, image)) for image in own) <= 1


# ---- Networks that enlarge


class DoublingSize(nn.Module):
    """Repeats each pixel twice along both axes, and looks at neighbours."""

    channels: int = 1
    stride: int = 2

    def setup(self):
        self.layer = nn.Conv(self.channels, (3, 3))

    def encode(self, images):
        return images

    def decode(self, codes):
        return self.layer(codes.repeat(2, axis=1).repeat(2, axis=2))

    def __call__(self, images):
        return self.decode(self.encode(images))


class Enlarging(LinenNetwork):
    scale = 2

    def receptive_field(self, params):
        return ReceptiveField(2, 2)


@pytest.mark.parametrize("tile", [0, 32])
@pytest.mark.parametrize("shape", [(50, 71), (50, 71, 1), (3, 50, 71, 1), (51, 72, 3)])
def test_a_network_may_enlarge(tile, shape):
    model = DoublingSize()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    params = jax.tree.map(lambda leaf: np.abs(leaf) / 4, params)
    image = RANDOM.random(shape, np.float32)
    restorer = aecore.Restorer(TrainedNetwork(Enlarging(model), params), tile=tile)
    restored = restorer(image)
    axis = 1 if len(shape) == 4 else 0
    expected_shape = tuple(
        2 * side if index in (axis, axis + 1) else side for index, side in enumerate(shape)
    )
    assert restored.shape == expected_shape
    planes = image.reshape(-1, 50, 71, 1) if shape[-1] != 3 else image.transpose(2, 0, 1)[..., None]
    height, width = planes.shape[1:3]
    padded = np.pad(planes, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="reflect")
    expected = model.apply({"params": params}, padded)[:, : 2 * height, : 2 * width]
    if shape[-1] == 3:
        expected = expected[..., 0].transpose(1, 2, 0)
    np.testing.assert_allclose(restored, np.clip(expected.reshape(expected_shape), 0, 1), atol=1e-6)
    if shape[-1] == 1 and axis == 1:
        np.testing.assert_allclose(
            restorer.decode(restorer.encode(image))[:, : 2 * height, : 2 * width],
            restored,
            atol=1e-6,
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_strength_says_how_much_of_the_correction_is_applied(dtype, trained, loaded):
    random = np.random.default_rng(0)
    image = random.random((20, 24)).astype(np.float32)
    if dtype != np.float32:
        image = (image * np.iinfo(dtype).max).astype(dtype)
    whole = aecore.restore(image, trained)
    np.testing.assert_array_equal(aecore.restore(image, trained, strength=0), image)
    half = aecore.restore(image, trained, strength=0.5).astype(np.float64)
    mean = (image.astype(np.float64) + whole) / 2
    assert np.abs(half - mean).max() <= (1e-6 if dtype == np.float32 else 0.5)
    np.testing.assert_array_equal(aecore.restore(image, trained, strength=1), whole)
    assert len(loaded) == 1
    for wrong in (-0.1, 1.1, "all"):
        with pytest.raises(ConfigError, match="strength .* use a number from 0 to 1"):
            aecore.restore(image, trained, strength=wrong)


def test_strength_of_a_network_that_enlarges():
    model = Upscaler(4, 1, scale=2)
    restorer = Restorer.of(model, random_params(model), strength=0.0)
    image = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), np.uint8)
    expected = np.stack([images.enlarged(each, 2) for each in image])
    np.testing.assert_array_equal(restorer(image), expected)


def test_a_runs_parameters_lie_on_no_device_until_it_restores(trained):
    params = Restorer.load(str(trained), device="cpu").trained.params
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
