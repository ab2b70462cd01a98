"""Training on crops of photographs, from pairs, and from trained networks, end to end."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from conftest import save_pictures
from PIL import Image
from test_training import change, newest, signal_in_step

import aecore
from aecore import cli
from aecore.degradations import Compose, Downscale, GaussianNoise
from aecore.errors import ConfigError, Interrupted
from aecore.models import UNet, Upscaler
from aecore.saved import checkpoints, exported, weights
from aecore.training import feeds

SIZES = [(40, 56), (56, 40), (48, 48), (33, 70), (44, 41)] * 3


def save(folder, sizes, seed=0, coarse=6):
    """Smooth pictures of several sizes."""
    folder.mkdir(exist_ok=True, parents=True)
    random = np.random.default_rng(seed)
    for index, (height, width) in enumerate(sizes):
        small = random.integers(0, 256, (coarse, coarse, 3), np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:02}.png")


@pytest.fixture
def photos(tmp_path):
    save(tmp_path / "photos", SIZES)
    return tmp_path / "photos"


@pytest.fixture
def denoise(photos, tmp_path):
    return aecore.Experiment(
        "photos",
        UNet((4, 8), channels=3, patch=2),
        GaussianNoise((0, 0.2), clip=False),
        aecore.Data("folder", str(photos), crop=16, turn=True, crops_per_image=2),
        training=aecore.Training(batch_size=8, epochs=2, loss="mae"),
        run_dir=str(tmp_path / "run"),
    )


def upscale(experiment, scale=2):
    return dataclasses.replace(
        experiment,
        model=Upscaler(4, 1, scale=scale),
        degradation=Downscale(scale),
        data=dataclasses.replace(experiment.data, crop=24),
        run_dir=experiment.run_dir + f"-x{scale}",
    )


def pairs(experiment, tmp_path, scale):
    """The same from pairs whose degraded pictures are made beforehand."""
    save(tmp_path / "pairs/original", [(scale * 20, scale * 28)] * 7)
    for path in (tmp_path / "pairs/original").iterdir():
        image = Image.open(path)
        small = image.resize((image.width // scale, image.height // scale))
        (tmp_path / "pairs/degraded").mkdir(exist_ok=True)
        small.save(tmp_path / "pairs/degraded" / path.name)
    return dataclasses.replace(
        upscale(experiment, scale),
        degradation=Compose(),
        data=aecore.Data("pairs", str(tmp_path / "pairs"), crop=24, crops_per_image=3),
        run_dir=experiment.run_dir + "-pairs",
    )


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("kind", ["denoise", "upscale", "pairs"])
def test_all_feeds_and_forms_train_alike_and_resume_exactly(kind, denoise, tmp_path, monkeypatch):
    experiment = {
        "denoise": lambda: denoise,
        "upscale": lambda: upscale(denoise),
        "pairs": lambda: pairs(denoise, tmp_path, 2),
    }[kind]()
    experiment = change(experiment, degrade_on="device")
    summary = aecore.train(experiment, progress=False)
    assert summary["evaluation"]["images"] == {"denoise": 2, "upscale": 2, "pairs": 1}[kind]
    expected, _ = newest(experiment.run_dir)
    for name, settings in {
        "resident": dict(feed="resident"),
        "pmap": dict(parallel="pmap", devices=4),
        "resident pmap": dict(feed="resident", parallel="pmap", devices=2),
    }.items():
        whole = change(experiment, run_dir=f"{experiment.run_dir} {name}", **settings)
        aecore.train(whole, progress=False)
        state, description = newest(whole.run_dir)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            state.params,
            expected.params,
        )
        stopped = dataclasses.replace(whole, run_dir=f"{whole.run_dir} stopped")
        with monkeypatch.context() as patch:
            kinds = feeds.ResidentCrops if "resident" in name else feeds.Stream
            signal_in_step(patch, 2, kind=kinds)
            with pytest.raises(Interrupted):
                aecore.train(stopped, progress=False)
        aecore.train(stopped, progress=False)
        resumed, resumed_description = newest(stopped.run_dir)
        assert_equal(resumed, state)
        assert resumed_description.metrics == description.metrics
    assert (tmp_path / experiment.run_dir / "samples.png").exists()


def test_a_network_that_enlarges_is_scored_against_bicubic_and_restores(denoise, photos):
    experiment = change(upscale(denoise, 3), epochs=1)
    summary = aecore.train(experiment, progress=False)
    # Untrained it is the interpolation, and a step of Adam changes it little.
    assert summary["evaluation"]["psnr"] == pytest.approx(summary["baseline"]["psnr"], abs=3)
    image = Image.open(photos / "00.png")
    assert aecore.restore(image, experiment.run_dir).size == (3 * 56, 3 * 40)
    # Layers are shown for a crop of 24×24, which comes in as 8×8.
    assert "8x8x4" in aecore.Restorer.load(experiment.run_dir).summary()


def test_training_goes_on_from_another_run(denoise, tmp_path):
    first = change(denoise, epochs=1)
    aecore.train(first, progress=False)
    state_before, _ = newest(first.run_dir)
    second = change(
        denoise,
        start_from=first.run_dir,
        epochs=1,
        run_dir=str(tmp_path / "second"),
        optimizer=aecore.Optimizer(learning_rate=1e-9, ema=0.9),
    )
    aecore.train(second, progress=False)
    state, description = newest(second.run_dir)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, state_before.params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, state_before.params
    )
    assert description.started_from == {"source": first.run_dir, "name": "photos", "step": 3}
    trained = weights.load(second.run_dir)
    assert f"starting from {first.run_dir} after 3 steps" in aecore.Restorer(trained).summary()
    exported.save(tmp_path / "net.aecore", trained, with_functions=False)
    assert str(tmp_path).encode() not in (tmp_path / "net.aecore").read_bytes()
    # It is resumed even when what it started from is gone.
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    aecore.train(change(second, epochs=2), progress=False)
    assert newest(second.run_dir)[1].started_from == description.started_from


def test_another_network_can_not_be_started_from(denoise):
    aecore.train(change(denoise, epochs=1), progress=False)
    wider = dataclasses.replace(
        change(denoise, start_from=denoise.run_dir, run_dir=denoise.run_dir + "-2"),
        model=UNet((4, 16), channels=3, patch=2),
    )
    message = r"start_from .* is another network \(features: \(4, 8\) -> \(4, 16\)\)"
    with pytest.raises(ConfigError, match=message):
        aecore.train(wider, progress=False)
    assert not checkpoints.exists(wider.run_dir)
    for source, message in [("nowhere", "does not exist"), ("lfw-enhance", "another network")]:
        with pytest.raises(ConfigError, match=message):
            aecore.train(change(wider, start_from=source), progress=False)


def test_the_command_takes_the_network_that_it_starts_from(denoise, tmp_path, capsys):
    wider = dataclasses.replace(change(denoise, epochs=1), model=UNet((4, 16), channels=3, patch=2))
    aecore.train(wider, progress=False)
    words = ["--run-dir", str(tmp_path / "second"), "--training.epochs"]
    start = ["--training.start-from", wider.run_dir]
    cli.main(denoise, [*words, "1", *start])
    assert newest(tmp_path / "second")[1].build_model() == wider.model
    # The run has it, also when what it started from is gone.
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    cli.main(denoise, [*words, "2", *start])
    assert newest(tmp_path / "second")[1].build_model() == wider.model
    # What --model says is not overruled.
    other = ["--model.features", "8", "8", "--run-dir", str(tmp_path / "third")]
    with pytest.raises(SystemExit):
        cli.main(denoise, [*other, "--training.start-from", str(tmp_path / "elsewhere")])
    assert "is another network (features: (4, 16) -> (8, 8))" in capsys.readouterr().err


def test_a_network_no_better_than_its_input_is_noted(denoise, caplog):
    bad = change(denoise, epochs=2, optimizer=aecore.Optimizer(learning_rate=1.0))
    with caplog.at_level(logging.WARNING, "aecore"):
        aecore.train(bad, progress=False)
    said = [r.message for r in caplog.records if "no better than its input" in r.message]
    assert len(said) == 1 and "--optimizer.learning-rate" in said[0]


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        (lambda e: dataclasses.replace(e, degradation=Downscale(2)), "2 times smaller"),
        (lambda e: dataclasses.replace(e, model=Upscaler(scale=2)), "2 times larger"),
        (
            lambda e: dataclasses.replace(e, data=dataclasses.replace(e.data, crop=18)),
            "crop 18x18 is not a multiple of 4, the model's stride; use --data.crop 16 16 or 20 20",
        ),
        (
            lambda e: dataclasses.replace(upscale(e), data=dataclasses.replace(e.data, crop=25)),
            "25x25 is not a multiple of 2, the model's stride times its scale",
        ),
    ],
)
def test_what_does_not_fit_is_refused(denoise, change_of, message):
    with pytest.raises(ConfigError, match=message):
        change_of(denoise)


def test_pictures_smaller_than_the_crop(denoise, tmp_path):
    save_pictures(tmp_path / "small", 12, (12, 12), "RGB")
    data = dataclasses.replace(denoise.data, data_dir=str(tmp_path / "small"))
    with pytest.raises(aecore.errors.DataError, match="smaller than 16x16.*smaller --data.crop"):
        aecore.train(dataclasses.replace(denoise, data=data), progress=False)


def test_a_run_on_crops_is_evaluated_as_in_its_summary(denoise, tmp_path):
    aecore.train(denoise, progress=False)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    scores = aecore.evaluate(denoise.run_dir)
    assert scores == {name: summary[name] for name in ("evaluation", "baseline")}
