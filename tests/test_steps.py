"""Every compiled form of the training step does the same."""

import dataclasses
import functools
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import aecore
from aecore.data.batches import epoch_order, training_batches
from aecore.degradations import Compose, GaussianBlur, GaussianNoise
from aecore.errors import ConfigError
from aecore.models import NoiseReducer, ResolutionEnhancer
from aecore.steps.devices import equally_many
from aecore.steps.step import degrading
from aecore.training import assembly, feeds

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 1), np.uint8)
ADAM = aecore.Optimizer()
DEGRADATION = Compose((GaussianBlur((0.1, 1.0)), GaussianNoise((0.1, 0.3))))


def experiment(model=None, **training):
    # Where a ReLU's input is 0 but for rounding, forms may take either side, and then differ by
    # more; this happens with one seed in ten or so, but not with this one.
    settings = dict(batch_size=32, seed=4) | training
    return aecore.Experiment(
        name="forms",
        model=model or NoiseReducer(features=(8, 4)),
        degradation=DEGRADATION,
        training=aecore.Training(**settings),
    )


def on_pictures(pictures, tmp_path, **training):
    """A whole training, of a network and a degradation that are quickly compiled."""
    return dataclasses.replace(
        experiment(NoiseReducer(features=(4,)), batch_size=8, **training),
        degradation=GaussianNoise((0.1, 0.3)),
        data=aecore.Data(dataset="folder", data_dir=str(pictures)),
        run_dir=str(tmp_path / "run"),
    )


def run(
    steps,
    model=None,
    start=None,
    images=IMAGES,
    optimizer=ADAM,
    **training,
):
    """Losses of some steps and the state after them."""
    chosen = dataclasses.replace(experiment(model, **training), optimizer=optimizer)
    devices = assembly.devices(chosen.training)
    parts = assembly.assemble(chosen, images.shape[1:], devices, last_step=20)
    feed = feeds.create(images, DEGRADATION, chosen.training, parts)
    state = devices.compile_create(parts.create)() if start is None else devices.replicate(start)
    losses, step = [], int(state.step)
    last = step + steps
    while step < last:
        state, values, count = feed.launch(state, step, last - step)
        losses += np.atleast_1d(jax.device_get(values))[:count].tolist()
        step += count
        feed.seconds_per_step(1e-3)
    assert int(state.step) == last
    return np.array(losses), jax.device_get(state)


def assert_agree(one, other, tolerance):
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=tolerance)
    for a, b in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(other[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@functools.cache
def run_on_one_device(degrade_on):
    return run(20, devices=1, accumulation=1, degrade_on=degrade_on)


@pytest.mark.parametrize(
    "form",
    [
        dict(parallel="jit", devices=8, degrade_on="host"),
        dict(parallel="jit", devices=8, degrade_on="device"),
        dict(parallel="pmap", devices=8, degrade_on="host"),
        dict(parallel="pmap", devices=1, degrade_on="device"),
        dict(parallel="jit", devices=1, degrade_on="host", accumulation=4),
        dict(parallel="pmap", devices=8, degrade_on="device", accumulation=4),
    ],
    ids=str,
)
def test_forms_agree(form):
    assert_agree(run_on_one_device(form["degrade_on"]), run(20, **form), 1e-5)


def test_the_average_is_the_exponential_one():
    settings = dict(devices=1, accumulation=1, degrade_on="device")
    optimizer = aecore.Optimizer(learning_rate=1e-2, ema=0.3)
    _, state = run(0, optimizer=optimizer, **settings)
    expected = jax.tree.map(np.array, state.params)
    for step in range(6):  # The decay is at its limit from the fourth on.
        _, state = run(1, start=state, optimizer=optimizer, **settings)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
    for found, value in zip(*map(jax.tree.leaves, (state.ema, expected)), strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6)


@pytest.mark.parametrize("run_in", ["tf", "jax"])
def test_flips_mirror_half_of_the_images_left_to_right(run_in):
    array = np.random.default_rng(0).integers(0, 256, (200, 12, 14, 1), np.uint8)
    identity = Compose(())
    if run_in == "tf":
        batches = training_batches(array, identity, batch_size=200, seed=0, flip=True)
        degraded, original = next(batches)
        order = epoch_order(0, 0, 200)
    else:
        keys = jax.random.split(jax.random.key(0), 200)
        degraded, original = map(np.asarray, degrading(identity, flip=True)(array, keys))
        order = np.arange(200)
    source = array[order] / np.float32(255)
    np.testing.assert_array_equal(degraded, original)
    kept, mirrored = (
        np.isclose(original, images, atol=1e-6).all(axis=(1, 2, 3))
        for images in (source, source[:, :, ::-1])
    )
    assert (kept ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_forms_agree_on_averages_losses_flips_and_clipping():
    settings = dict(
        optimizer=aecore.Optimizer(schedule="cosine", warmup_steps=5, clip_norm=0.1, ema=0.9),
        loss="charbonnier",
        flip=True,
        degrade_on="device",
    )
    one = run(20, devices=1, accumulation=1, **settings)
    for form in (
        dict(parallel="jit", devices=8),
        dict(parallel="pmap", devices=8, accumulation=2),
        dict(parallel="jit", devices=8, feed="resident"),
    ):
        other = run(20, **settings, **form)
        assert_agree(one, other, 1e-5)
        for a, b in zip(*map(jax.tree.leaves, (one[1].ema, other[1].ema)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_forms_agree_for_the_other_network():
    model = ResolutionEnhancer((40, 36, 32), channels=1)
    # Not more steps: with so many channels, what differs by rounding has grown to 1e-5 by the 15th.
    losses, state = run(10, model, devices=1, accumulation=1)
    for form in ("jit", "pmap"):
        other_losses, other_state = run(10, model, devices=8, parallel=form)
        np.testing.assert_allclose(losses, other_losses, rtol=0, atol=1e-5)
        # Adam's first steps are as large for a gradient that is nothing but rounding as for any
        # other, so that some of its many parameters differ, with XLA's own convolutions too.
        differences = jax.tree.map(lambda a, b: np.abs(a - b), state.params, other_state.params)
        differences = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(differences)])
        assert np.quantile(differences, 0.97) < 1e-5


@pytest.mark.parametrize("form", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 8])
def test_images_held_on_the_devices_give_the_same_steps(form, devices):
    streamed = run_on_one_device("device")
    held = run(20, devices=devices, parallel=form, feed="resident")
    assert_agree(streamed, held, 1e-5)


def test_resident_steps_are_the_same_bits_however_they_are_divided():
    _, whole = run(20, devices=8, feed="resident")
    state = None
    for count in (1, 7, 1, 11):
        _, state = run(count, devices=8, feed="resident", start=state)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.every_room
def test_bfloat16_keeps_parameters_and_loss_in_float32():
    losses, state = run(20, precision="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    exact, _ = run(20)
    assert not np.array_equal(losses, exact)
    np.testing.assert_allclose(losses, exact, rtol=0.02)


def test_a_run_resumes_under_every_other_form(pictures, tmp_path):
    forms = [
        dict(parallel="jit", devices=1),
        dict(parallel="pmap", devices=8),
        dict(feed="resident", devices=2),
        dict(precision="bfloat16", parallel="pmap", devices=4, accumulation=2),
        dict(feed="resident", parallel="pmap", degrade_on="device"),
    ]
    for epoch, form in enumerate(forms, 1):
        chosen = on_pictures(pictures, tmp_path, epochs=epoch, **form)
        summary = aecore.train(chosen, progress=False)
        assert summary["steps"] == epoch * 4
        assert summary["devices"] == form.get("devices", 8)


@pytest.mark.parametrize("feed", ["stream", "resident"])
@pytest.mark.parametrize("form", ["jit", "pmap"])
def test_a_run_compiles_each_step_once_and_moves_no_data_implicitly(
    feed, form, pictures, tmp_path, caplog
):
    settings = dict(epochs=6, feed=feed, parallel=form, checkpoint_every=3)
    chosen = on_pictures(pictures, tmp_path, **settings)
    # For all threads; as a context it would be for this one.
    jax.config.update("jax_log_compiles", True)
    try:
        with jax.transfer_guard("disallow"), caplog.at_level(logging.WARNING, logger="jax"):
            aecore.train(chosen, progress=False)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [
        record.getMessage().split()[4]
        for record in caplog.records
        if record.getMessage().startswith("Finished XLA compilation of")
    ]
    # pmap names what it compiles `_fun`.
    steps = [name for name in compiled if "train_step" in name or "_fun" in name]
    assert len(steps) == 1, compiled
    assert len(list(Path(tmp_path, "run", "checkpoints").iterdir())) > 1


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (dict(devices=9), "9 is more than the 8 there are"),
        (dict(batch_size=30), "not divisible by 8 devices; use 24 or 32"),
        (dict(accumulation=3), "does not divide the 4 images of a device; use one of 1, 2, 4"),
    ],
)
def test_impossible_divisions_are_refused(training, message):
    with pytest.raises(ConfigError, match=message):
        run(1, **training)


@pytest.mark.parametrize(
    "training",
    [dict(feed="both"), dict(parallel="smap"), dict(precision="float16"), dict(accumulation=0)],
)
def test_impossible_settings_are_refused(training):
    with pytest.raises(ConfigError):
        aecore.Training(**training)


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_a_batch_are_the_batch(count):
    def batches(**share):
        return training_batches(
            IMAGES[:, :15, :15], DEGRADATION, batch_size=20, seed=1, start_step=3, **share
        )

    size = 20 // count
    shares = [batches(share=slice(i * size, (i + 1) * size)) for i in range(count)]
    whole = batches()
    for _ in range(4):
        parts = zip(*(next(share) for share in shares), strict=True)
        for field, pieces in zip(next(whole), parts, strict=True):
            # A product's rounding may depend on how many are computed at once.
            np.testing.assert_allclose(field, np.concatenate(pieces), atol=1e-6)


def test_processes_have_equally_many_devices():
    def chosen(count, *processes):
        available = [SimpleNamespace(process_index=process) for process in processes]
        found = equally_many(available, count)
        return [device.process_index for device in found]

    assert chosen(2, 0, 0, 0) == [0, 0]
    assert chosen(4, 0, 0, 0, 1, 1, 1) == [0, 0, 1, 1]
    for count, message in [(3, "use 2 or 4$"), (1, "use 2$"), (5, "use 4 or 6$"), (7, "the 6")]:
        with pytest.raises(ConfigError, match=message):
            chosen(count, 0, 0, 0, 1, 1, 1)
    for count in (5, 6):
        with pytest.raises(ConfigError, match="use 4$"):
            chosen(count, 0, 0, 1, 1, 1, 1)


def test_a_batch_is_divided_as_suits_the_cache():
    chosen = experiment(ResolutionEnhancer((256, 128, 64)), devices=1)
    devices = assembly.devices(chosen.training)
    assert assembly.assemble(chosen, (80, 80, 3), devices, 1).parts == 32
    chosen = experiment(NoiseReducer(), devices=1)
    assert assembly.assemble(chosen, (28, 28, 1), devices, 1).parts == 1
