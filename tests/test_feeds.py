"""Crops reach the steps by every feed alike."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_crops import SIZES, Made, crops_of, save_pairs

import aecore
from aecore import Data
from aecore.data import sources
from aecore.degradations import Compose, GaussianBlur, GaussianNoise
from aecore.errors import ConfigError
from aecore.models import NoiseReducer
from aecore.steps import memory
from aecore.steps.state import TrainState
from aecore.training import assembly, feeds

DEGRADATION = Compose((GaussianBlur((0.1, 1.0)), GaussianNoise((0.1, 0.3))))
PICTURES = [*SIZES, (10, 40), (20, 9)]


class Noise(Made):
    """Pictures in which any two places differ."""

    def __getitem__(self, index, /):
        size = super().__getitem__(index).shape
        return np.random.default_rng(index).integers(0, 256, size, np.uint8)


def some_crops(**options):
    return crops_of(Noise(PICTURES, broken={5}), per_image=2, **options)


def probe(state, batch, *, prepare, axis_name):
    """In place of a training step: its loss tells which images it was given, and in what order."""
    size = jax.tree.leaves(batch)[0].shape[0]
    places = lax.axis_index(axis_name) * size + jnp.arange(size)
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(state.step), place))(places)
    degraded, original = prepare(batch, keys)
    values = jnp.concatenate([degraded.reshape(size, -1), original.reshape(size, -1)], axis=1)
    weights = jax.random.normal(jax.random.key(1), values.shape[1:])
    value = lax.psum(jnp.sum(jnp.sin(places + 1.0) * (values @ weights)), axis_name)
    return state.replace(step=state.step + 1), value


class Probed(assembly.Assembly):
    """Has `probe` in place of the training step."""

    def train_step(self, before, batch, *, axis_name=None):
        return probe(before, batch, prepare=self.prepare, axis_name=axis_name)


def run(crops, steps=12, start=0, **training):
    """What `probe` tells of some steps, of which an epoch has 4."""
    settings = dict(batch_size=16, seed=8, degrade_on="device") | training
    experiment = aecore.Experiment(
        "feeds",
        NoiseReducer(features=(4,), channels=crops.shapes[0][2]),
        DEGRADATION,
        aecore.Data("pairs" if len(crops.shapes) == 2 else "folder", crop=crops.shapes[-1][:2]),
        training=aecore.Training(**settings),
    )
    devices = assembly.devices(experiment.training)
    assembled = assembly.assemble(experiment, crops.shapes[-1], devices, last_step=1)
    feed = feeds.create(crops, DEGRADATION, experiment.training, Probed(**vars(assembled)))
    state = devices.replicate(TrainState(jnp.int32(start), {}, {}))
    values, step = [], start
    while step < start + steps:
        state, losses, count = feed.launch(state, step, start + steps - step)
        values += np.atleast_1d(jax.device_get(losses))[:count].tolist()
        step += count
        feed.seconds_per_step(0.1)
    return np.array(values)


def assert_agree(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-2)


@functools.cache
def streamed(small="skip"):
    return run(some_crops(small=small, turn=True), devices=1)


@pytest.mark.parametrize("small", ["skip", "pad"])
@pytest.mark.parametrize(("form", "devices"), [("jit", 1), ("jit", 8), ("pmap", 8)])
def test_resident_crops_are_those_of_the_stream(form, devices, small):
    crops = some_crops(small=small, turn=True)
    found = run(crops, feed="resident", parallel=form, devices=devices)
    assert_agree(found, streamed(small))


@pytest.mark.parametrize("feed", ["stream", "resident"])
def test_a_feed_starts_at_any_step(feed):
    rest = run(some_crops(turn=True), 7, start=5, feed=feed, devices=1)
    assert_agree(rest, streamed()[5:])


def test_the_probe_tells_crops_apart():
    """What the other tests of this file rely on."""
    for options in (dict(turn=False), dict(turn=True, grid=2)):
        other = run(some_crops(**options), devices=1)
        assert np.abs(other - streamed()).min() > 1


@pytest.mark.parametrize("scale", [1, 2])
def test_resident_pairs_are_those_of_the_stream(tmp_path, scale):
    save_pairs(tmp_path, PICTURES, scale)
    data = Data(
        dataset="pairs", data_dir=str(tmp_path), crop=16, turn=True, crops_per_image=2, small="pad"
    )
    crops = sources.load(data).examples()
    if scale == 1:
        assert_agree(*(run(crops, feed=feed, devices=2) for feed in ("stream", "resident")))
    examples = np.arange(40)
    packed = crops.pack()
    places = crops.places(examples, seed=3, epoch=1)
    read = crops.read(examples, seed=3, epoch=1)
    for expected, pictures, shape in zip(read, packed, crops.shapes, strict=True):
        located = (values.astype(np.int32) for values in pictures.layout.locate(places))
        found = feeds.cut(pictures.planes, *located, places.turn, shape[:2])
        np.testing.assert_array_equal(found, expected)


def test_flipped_crops_are_mirrored_by_every_feed():
    flipped = [run(some_crops(), flip=True, devices=1, feed=f) for f in ("stream", "resident")]
    assert_agree(*flipped)
    assert np.abs(flipped[0] - run(some_crops(), devices=1)).min() > 1


def test_pictures_that_do_not_fit_on_the_devices(monkeypatch):
    def statistics(device):
        return {"bytes_limit": 100_000}

    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", statistics, raising=False)
    with pytest.raises(ConfigError, match=r"the images need 0.0 GiB .* use --training.feed stream"):
        run(some_crops(), feed="resident")


def test_pictures_that_do_not_fit_are_not_decoded_first(monkeypatch):
    monkeypatch.setattr(memory, "physical", lambda: 100_000)
    crops = some_crops()
    monkeypatch.setattr(crops, "_parts", ())
    with pytest.raises(ConfigError, match="the machine's"):
        run(crops, feed="resident")


def test_a_training_that_ends_reads_no_further_batches(tiny, monkeypatch):
    real, ended = feeds.training_batches, []

    def batches(*args, **settings):
        try:
            yield from real(*args, **settings)
        finally:
            ended.append(True)

    monkeypatch.setattr(feeds, "training_batches", batches)
    gc.disable()  # What closes them is not that they are found to be garbage.
    try:
        aecore.train(tiny, progress=False)
        assert ended == [True]
    finally:
        gc.enable()
