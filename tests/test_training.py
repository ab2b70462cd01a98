import dataclasses
import errno
import functools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from conftest import ONE_DEVICE, save_pictures
from etils import epath
from tensorboardX.proto import event_pb2

import aecore
from aecore.data import sources
from aecore.data.batches import training_batches
from aecore.degradations import GaussianNoise
from aecore.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    NonFiniteLossError,
    SavingError,
)
from aecore.models import Autoencoder, NoiseReducer, ResolutionEnhancer
from aecore.networks.network import LinenNetwork
from aecore.saved import checkpoints, weights
from aecore.saved.descriptions import Description, experiment_from_json
from aecore.steps import state
from aecore.steps.devices import Devices
from aecore.steps.step import pairs, train_step
from aecore.training import assembly, claim, feeds, metrics_log, resuming


def change(experiment, **fields):
    """The experiment with fields of its `training`, or of itself, replaced."""
    own = {name: fields.pop(name) for name in list(fields) if hasattr(experiment, name)}
    return dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, **fields), **own
    )


def newest(run):
    """Step and exact contents of a run's newest checkpoint."""
    run = Path(run)
    experiment = experiment_from_json(json.loads((run / "experiment.json").read_text()))
    devices = Devices()
    with checkpoints.Checkpoints(run / "checkpoints", keep=100) as saved:
        description = checkpoints._read_description(saved._manager, max(saved._manager.all_steps()))
        shape = (*description.image_size, description.channels)
        parts = assembly.assemble(experiment, shape, devices, last_step=8)
        restored, description = saved.restore(devices.abstract(parts.create))
    return restored, description


def signal_in_step(monkeypatch, number, sent=signal.SIGTERM, kind=feeds.Stream):
    """Makes a signal come while a step runs; feeds do one step a call."""
    launch = kind.launch

    def launch_one(self, state, step, most):
        if step == number - 1:
            os.kill(os.getpid(), sent)
        return launch(self, state, step, 1)

    monkeypatch.setattr(kind, "launch", launch_one)


def steps_kept(run):
    return sorted(int(path.name) for path in Path(run, "checkpoints").glob("[0-9]*"))


def assert_identical(run, other):
    (first, _), (second, _) = newest(run), newest(other)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("model", "channels"), [(NoiseReducer(), 1), (ResolutionEnhancer((8, 8, 8)), 3)]
)
def test_the_loss_falls_on_one_batch(model, channels):
    original = np.random.default_rng(0).random((8, 16, 16, channels), np.float32)
    degraded = np.asarray(GaussianNoise(0.1)(original, jax.random.key(0)))
    devices = Devices()
    optimizer = optax.adam(1e-2)
    step = devices.compile_train_step(
        functools.partial(
            train_step,
            apply=LinenNetwork(model).apply,
            prepare=pairs,
            optimizer=optimizer,
            seed=0,
        )
    )
    current = devices.compile_create(
        lambda: state.create(model, optimizer, original.shape[1:], 0)
    )()
    losses = []
    for _ in range(60):
        current, loss = step(current, devices.shard_batch((degraded, original)))
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(current.step) == 60


def test_a_run_leaves_all_its_files(tiny):
    summary = aecore.train(tiny, progress=False)
    run = Path(tiny.run_dir)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["steps"] == 8
    assert summary["epochs"] == 2
    assert summary["devices"] == 8
    assert summary["images_per_second"] > 0
    assert summary["evaluation"]["images"] == summary["baseline"]["images"] == 6
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "validation_psnr" in line] == [4, 8]
    for name in ("samples.png", "curves.png", "example.png", "experiment.json"):
        assert (run / name).stat().st_size > 0
    assert list(run.glob("events.out.tfevents.*"))


def test_scalars_are_written_without_importing_pytorch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('PyTorch is imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*sys.modules]:
        if name.split(".")[0] in ("torch", "tensorboardX"):
            monkeypatch.delitem(sys.modules, name)
    with metrics_log.MetricsLog(epath.Path(tmp_path), 0, [], 1, writes=True) as log:
        log.add_loss(1, 0.5, dict)
    assert "torch" not in sys.modules
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("limit", [200, 5000], ids=["lines", "events"])
def test_metrics_that_cannot_be_written_are_named(tmp_path, limit):
    """As on a full disk; events are written later, some thousand bytes at once."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    threads = threading.active_count()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with (
            pytest.raises(OSError) as raised,
            metrics_log.MetricsLog(epath.Path(tmp_path), 0, [], 1, writes=True) as log,
        ):
            for step in range(1, 1000):
                log.add_loss(step, 0.5, lambda: {"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    expected = {200: tmp_path / "metrics.jsonl", 5000: tmp_path}[limit]
    assert raised.value.filename == str(expected)
    assert threading.active_count() <= threads


def test_tensorboard_sees_the_scalars_and_from_which_step_on_they_are_new(tmp_path):
    with metrics_log.MetricsLog(epath.Path(tmp_path), 6, [], 1, writes=True) as log:
        log.add_loss(7, 0.5, lambda: {"goodput": 0.25})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    written = [event_pb2.Event.FromString(record) for record in records(file)]
    assert written[0].file_version == "brain.Event:2"
    assert written[1].session_log.status == event_pb2.SessionLog.START
    assert [event.step for event in written[1:]] == [7, 7, 7]
    scalars = [event.summary.value[0] for event in written[2:]]
    assert [(each.tag, each.simple_value) for each in scalars] == [("loss", 0.5), ("goodput", 0.25)]


def records(file):
    """What a file of TFRecords holds, without its checksums."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_damaged_side_files_keep_no_run_from_going_on(tiny):
    aecore.train(change(tiny, steps=6), progress=False)
    run = Path(tiny.run_dir)
    lines = (run / "metrics.jsonl").read_bytes()
    damaged = [b'{"step": 1, "lo\xffss": 1}', b'{"step": "a", "loss": 1}', b"[1]", b'{"loss": 1}']
    damaged += [b'{"step": 1, "loss": "b"}', b'{"step": 1, "lo']
    (run / "metrics.jsonl").write_bytes(b"\n".join([*damaged, lines]))
    (run / "summary.json").write_text('{"steps": 6, "seconds": "x", "time": 3}')
    (run / claim.FILE).write_text('{"seconds": "abc"}')
    assert aecore.train(tiny, progress=False)["steps"] == 8
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(lines)
    assert [json.loads(line)["step"] for line in after.splitlines()] == [2, 4, 4, 6, 6, 8, 8]


@pytest.mark.every_room
def test_stopping_and_going_on_changes_nothing(tiny, tmp_path):
    aecore.train(tiny, progress=False)
    for steps_so_far in (1, 4, 6, None):
        aecore.train(
            change(tiny, run_dir=str(tmp_path / "parts"), steps=steps_so_far), progress=False
        )
    assert_identical(tmp_path / "run", tmp_path / "parts")
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["step"] for line in lines if '"loss"' in line]
    # The first part ended before a line was due, and wrote what it had.
    assert losses == [1, 2, 4, 6, 8]


EVERYTHING = aecore.Optimizer(
    learning_rate=2e-3,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    clip_norm=0.05,
    ema=0.9,
)


@pytest.mark.parametrize("feed", ["stream", "resident"])
def test_averages_schedules_and_flips_go_on_exactly(tiny, tmp_path, monkeypatch, feed):
    chosen = change(
        tiny, optimizer=EVERYTHING, loss="ms_ssim_l1", flip=True, feed=feed, checkpoint_every=3
    )
    aecore.train(chosen, progress=False)
    parts = change(chosen, run_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 4, kind=feeds.Stream if feed == "stream" else feeds.Resident)
        with pytest.raises(Interrupted):
            aecore.train(parts, progress=False)
    aecore.train(parts, progress=False)
    assert_identical(tmp_path / "run", tmp_path / "parts")


def test_the_average_is_what_is_evaluated_and_restored_with(tiny):
    chosen = change(tiny, optimizer=aecore.Optimizer(learning_rate=1e-2, ema=0.9))
    summary = aecore.train(chosen, progress=False)
    current, description = newest(tiny.run_dir)
    restorer = aecore.Restorer.load(tiny.run_dir)
    assert restorer.description.step == description.step
    for average, last, restored in zip(
        *map(jax.tree.leaves, (current.ema, current.params, restorer.params)), strict=True
    ):
        np.testing.assert_array_equal(restored, average)
        assert np.abs(average - last).max() > 0
    assert aecore.evaluate(tiny.run_dir)["evaluation"] == summary["evaluation"]


def test_a_run_whose_rate_falls_until_its_end_keeps_that_end(tiny):
    cosine = change(tiny, optimizer=aecore.Optimizer(schedule="cosine"))
    aecore.train(change(cosine, epochs=1), progress=False)
    with pytest.raises(CheckpointError, match="was to end at step 4, now at 8.* learning rate"):
        aecore.train(cosine, progress=False)


def test_a_resumed_run_has_the_learning_rates_of_one_that_was_not_stopped(tiny):
    def warming(steps, epochs):
        optimizer = aecore.Optimizer(warmup_steps=steps)
        return change(tiny, optimizer=optimizer, epochs=epochs, run_dir=f"{tiny.run_dir}{steps}")

    # Two steps are less than half of either training, six are not.
    aecore.train(warming(2, epochs=1), progress=False)
    assert aecore.train(warming(2, epochs=2), progress=False)["steps"] == 8
    aecore.train(warming(6, epochs=1), progress=False)
    with pytest.raises(CheckpointError, match="learning rate of step 1 would have been"):
        aecore.train(warming(6, epochs=2), progress=False)


def test_a_model_that_keeps_nothing_for_its_gradient(tiny):
    class Shift(Autoencoder):
        channels: int = 1
        stride: int = 1

        @nn.compact
        def __call__(self, images):
            return images + self.param("shift", nn.initializers.zeros, (1,))

    assert assembly.activation_bytes(Shift(), (16, 16, 1)) == 0
    assert aecore.train(change(tiny, model=Shift(), steps=2), progress=False)["parameters"] == 1


def test_a_run_from_before_a_field_existed_goes_on(tiny):
    aecore.train(change(tiny, epochs=1), progress=False)
    path = Path(tiny.run_dir, "experiment.json")
    old = json.loads(path.read_text())
    del old["optimizer"]["ema"], old["training"]["loss"]
    path.write_text(json.dumps(old))
    assert aecore.train(tiny, progress=False)["steps"] == 8


@pytest.mark.parametrize("settings", [aecore.Optimizer(), EVERYTHING], ids=["plain", "everything"])
def test_the_optimizer_does_what_it_says(settings):
    """Against the published formulas, in NumPy."""
    last, params = 10, {"kernel": np.full((2, 2), 0.5), "bias": np.full(2, 0.5)}
    optimizer = assembly.optimizer(settings, last)
    current = {name: jax.numpy.asarray(value, "float32") for name, value in params.items()}
    opt_state = optimizer.init(current)
    moments = {name: [0.0, 0.0] for name in params}
    random = np.random.default_rng(0)
    for step in range(last):
        gradients = {name: random.normal(0, 0.1, v.shape) for name, v in params.items()}
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: g.astype("float32"), gradients), opt_state, current
        )
        current = optax.apply_updates(current, updates)

        rate = settings.learning_rate
        warmup = settings.warmup_steps
        if step < warmup:
            rate *= (step + 1) / (warmup + 1)
        elif settings.schedule == "cosine":
            rate *= (1 + np.cos(np.pi * (step - warmup) / (last - warmup))) / 2
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        if settings.clip_norm is not None:
            gradients = {n: g * min(1, settings.clip_norm / norm) for n, g in gradients.items()}
        for name, g in gradients.items():
            m = moments[name]
            m[0] = 0.9 * m[0] + 0.1 * g
            m[1] = 0.999 * m[1] + 0.001 * g**2
            change = (m[0] / (1 - 0.9 ** (step + 1))) / (
                np.sqrt(m[1] / (1 - 0.999 ** (step + 1))) + 1e-8
            )
            if name == "kernel":
                change = change + settings.weight_decay * params[name]
            params[name] = params[name] - rate * change
    for name, expected in params.items():
        np.testing.assert_allclose(current[name], expected, atol=1e-5)
        assert np.abs(expected - 0.5).max() > 1e-3


def test_a_finished_run_is_not_trained_again(tiny, caplog):
    first = aecore.train(tiny, progress=False)
    assert "nothing is trained now" not in caplog.text
    again = aecore.train(tiny, progress=False)
    assert f"{tiny.run_dir} was trained to its end before, --training.epochs 2, " in caplog.text
    assert "use more --training.epochs to go on" in caplog.text
    assert again["evaluation"] == first["evaluation"]
    assert again["steps"] == first["steps"]
    assert again["images_per_second"] == first["images_per_second"]


@pytest.mark.parametrize(
    ("changes", "end", "advice"),
    [
        ({"steps": 2}, "--training.steps 2", "use more --training.steps to go on"),
        (
            {"steps": 2, "optimizer": aecore.Optimizer(schedule="cosine")},
            "--training.steps 2",
            "another --run-dir, as from its network by --training.start-from {}",
        ),
        (
            {"epochs": 3, "patience": 1, "min_delta": 9.0},
            "--training.patience 1",
            "use more --training.patience to go on",
        ),
    ],
)
def test_a_finished_run_says_what_ended_it_and_how_to_go_on(tiny, caplog, changes, end, advice):
    experiment = change(tiny, **changes)
    for _ in range(2):
        aecore.train(experiment, progress=False)
    assert f"was trained to its end before, {end}, so nothing" in caplog.text
    assert advice.format(tiny.run_dir) in caplog.text


def test_interruption_saves_and_loses_no_step(tiny, tmp_path, monkeypatch):
    aecore.train(tiny, progress=False)
    stopped = change(tiny, run_dir=str(tmp_path / "stopped"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, expected in ((signal.SIGTERM, 4), (signal.SIGINT, 8)):
        signal_in_step(monkeypatch, expected, number)
        with pytest.raises(Interrupted, match=f"after step {expected}, which is saved"):
            aecore.train(stopped, progress=False)
        assert steps_kept(stopped.run_dir)[-1] == expected
    # The second one came at the last epoch's end, before its evaluation.
    assert newest(stopped.run_dir)[1].metrics is None
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.undo()
    summary = aecore.train(stopped, progress=False)
    assert summary["evaluation"]["step"] in (4, 8)
    assert_identical(tmp_path / "run", stopped.run_dir)


def test_metrics_after_a_stop_between_two_lines_are_those_of_an_unstopped_run(tiny, tmp_path):
    def lines(run):
        text = Path(run, "metrics.jsonl").read_text()
        return [
            (line["step"], line["loss"])
            for line in map(json.loads, text.splitlines())
            if "loss" in line
        ]

    logged = change(tiny, log_every=4, checkpoint_every=3)
    aecore.train(logged, progress=False)
    stopped = change(logged, run_dir=str(tmp_path / "stopped"))
    aecore.train(change(stopped, steps=7), progress=False)
    # As if the process had been killed in step 4 and 7: the newest checkpoint is that of step 3.
    for name in ("4", "6", "7"):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / name)
    aecore.train(stopped, progress=False)
    assert lines(stopped.run_dir) == lines(logged.run_dir)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
import tiny_experiment
tiny_experiment.main(tiny_experiment.experiment, sys.argv[1:])
"""


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    """As on a full disk: no file may grow beyond 40 kB."""
    run = tmp_path / "run"
    flags = ["--run-dir", run, "--training.steps", "20", "--model.features", "64", "64"]
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, flags)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    errors = [line for line in lines if line and "images/s" not in line]  # The bar's left out.
    assert errors == [
        f"error: {run}/checkpoints: a checkpoint can't be saved (File too large); "
        "earlier ones are kept; fix that and run the same command again"
    ]


def test_training_works_outside_the_main_thread(tiny):
    thread = threading.Thread(target=aecore.train, args=[tiny], kwargs={"progress": False})
    thread.start()
    thread.join()
    assert (Path(tiny.run_dir) / "summary.json").exists()


def damage_by_flipping_a_bit(folder):
    files = [path for path in (folder / "params").rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def damage_by_truncation(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def damage_description(folder):
    (folder / "description" / "metadata").write_text("{")


def damage_by_emptying(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_flipping_a_bit,
        damage_by_truncation,
        damage_description,
        damage_by_emptying,
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, tmp_path, caplog, damage):
    aecore.train(tiny, progress=False)
    broken = change(tiny, run_dir=str(tmp_path / "broken"), checkpoint_every=3, steps=6)
    aecore.train(broken, progress=False)
    assert steps_kept(broken.run_dir) == [3, 4, 6]
    folder = Path(broken.run_dir, "checkpoints", "6")
    damage(folder)

    restorer = aecore.Restorer.load(broken.run_dir)
    assert restorer.description.step in (3, 4)
    assert f"checkpoint {folder} is damaged" in caplog.text
    caplog.clear()

    aecore.train(change(broken, steps=None), progress=False)
    assert f"checkpoint {folder} is damaged" in caplog.text
    assert Path(broken.run_dir, "checkpoints", "6.damaged").is_dir()
    assert_identical(tmp_path / "run", broken.run_dir)


def test_checkpoints_that_are_all_damaged_are_left_as_they_are(tiny):
    aecore.train(tiny, progress=False)
    folders = list(Path(tiny.run_dir, "checkpoints").glob("[0-9]*"))
    for folder in folders:
        damage_by_truncation(folder)
    with pytest.raises(CheckpointError, match="none of the checkpoints .* can be restored"):
        aecore.train(tiny, progress=False)
    assert all(folder.is_dir() for folder in folders)


def test_of_a_checkpoint_of_the_same_step_only_the_description_is_written(tmp_path, monkeypatch):
    run = tmp_path / "run"
    arrays = run / "checkpoints" / "5" / "params"

    def save(saved, value, **said):
        saved.save(
            state.TrainState(jax.numpy.int32(5), {"a": np.full(3, value, np.float32)}, {}),
            Description(step=5, image_size=(8, 8), channels=1, **said),
        )

    def files():
        return {path: path.stat().st_mtime_ns for path in arrays.rglob("*") if path.is_file()}

    def description():
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {"a": jax.ShapeDtypeStruct((3,), np.float32, sharding=device)}
        return checkpoints.load(run, lambda _: abstract)[1]

    with checkpoints.Checkpoints(run / "checkpoints", keep=1) as saved:
        save(saved, 1)
    before, version = files(), weights.version(run)
    assert before
    with checkpoints.Checkpoints(run / "checkpoints", keep=1) as saved:
        save(saved, 1, seconds=7.0)
        assert description().seconds == 7
        # By which a restorer that is kept notices that another checkpoint may be the best now.
        assert weights.version(run) != version
        # Killed while it writes.
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", None)
            patch.setattr(type(epath.Path(tmp_path)), "replace", None)
            with pytest.raises(SavingError):
                save(saved, 1, seconds=8.0)
        with pytest.raises(SavingError, match="other arrays"):
            save(saved, 2, seconds=9.0)
    assert description().seconds == 7
    assert files() == before
    assert steps_kept(run) == [5]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        ValueError("Error opening file [source locations='os_error_code='24'']"),
        ValueError("UNAVAILABLE: the bucket doesn't answer"),
        MemoryError(),
    ],
)
def test_a_checkpoint_that_cant_be_read_for_the_moment_is_not_set_aside(tiny, monkeypatch, error):
    aecore.train(change(tiny, steps=6), progress=False)
    folder = Path(tiny.run_dir, "checkpoints")
    before = sorted(path.name for path in folder.iterdir())
    read = checkpoints.ocp.CheckpointManager.restore

    def restore(manager, step, *args, **kwargs):
        if step == 6:
            raise RuntimeError("orbax's own words") from error
        return read(manager, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, "restore", restore)
        for use in (aecore.Restorer.load, lambda _: aecore.train(tiny, progress=False)):
            with pytest.raises(CheckpointError, match="checkpoints/6 can't be read .*again"):
                use(tiny.run_dir)
    assert sorted(path.name for path in folder.iterdir()) == before
    aecore.train(tiny, progress=False)
    assert newest(tiny.run_dir)[1].step == 8


def test_a_run_goes_on_past_a_smaller_limit(tiny, monkeypatch):
    signal_in_step(monkeypatch, 3)
    with pytest.raises(Interrupted):
        aecore.train(tiny, progress=False)
    summary = aecore.train(change(tiny, steps=1), progress=False)
    assert summary["steps"] == summary["evaluation"]["step"] == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda tiny: {"experiment": None}, "None is not an experiment"),
        (lambda tiny: {"experiment": tiny, "callback": 5}, "callback 5 can't be called"),
    ],
    ids=["experiment", "callback"],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_done(build, message, tiny):
    with pytest.raises(ConfigError, match=message):
        aecore.train(**build(tiny))
    assert not Path(tiny.run_dir).exists()


def test_an_unregistered_degradation_is_refused_before_training(tiny):
    class Own(GaussianNoise):
        pass

    with pytest.raises(ConfigError, match="'Own' is not registered"):
        aecore.train(change(tiny, degradation=Own(0.1)), progress=False)
    assert not Path(tiny.run_dir).exists()


def test_a_half_written_checkpoint_is_not_picked_up(tiny):
    aecore.train(change(tiny, steps=4), progress=False)
    checkpoints = Path(tiny.run_dir, "checkpoints")
    # What a killed process leaves of a save in progress.
    half = checkpoints / "5.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert aecore.Restorer.load(tiny.run_dir).description.step == 4
    aecore.train(tiny, progress=False)
    assert newest(tiny.run_dir)[1].step == 8
    assert not half.exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {10: 0.5, 20: 0.1, 30: 0.4, 40: 0.3, 50: 0.2}
    run = tmp_path / "run"
    history = []
    with checkpoints.Checkpoints(run / "checkpoints", keep=2) as saved:
        for step in (10, 15, 20, 30, 35, 40, 50):
            if step in losses:
                history.append({"step": step, "mse": losses[step]})
            saved.save(
                state.TrainState(jax.numpy.int32(step), {"a": np.zeros(3, np.float32)}, {}),
                Description(step=step, history=tuple(history), image_size=(8, 8), channels=1),
            )
    assert steps_kept(run) == [20, 40, 50]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"a": jax.ShapeDtypeStruct((3,), np.float32, sharding=device)}
    assert checkpoints.load(run, lambda _: abstract)[1].step == 20


def test_a_different_experiment_is_refused(tiny):
    aecore.train(change(tiny, steps=2), progress=False)
    different = change(
        tiny, degradation=GaussianNoise(0.3), optimizer=aecore.Optimizer(learning_rate=0.1)
    )
    with pytest.raises(CheckpointError) as raised:
        aecore.train(different, progress=False)
    assert "degradation.sigma: 0.2 -> 0.3" in str(raised.value)
    assert "optimizer.learning_rate: 0.001 -> 0.1" in str(raised.value)
    with pytest.raises(CheckpointError, match="training.seed: 0 -> 1"):
        aecore.train(change(tiny, seed=1), progress=False)
    # The checkpoint describes itself.
    (Path(tiny.run_dir) / "experiment.json").unlink()
    with pytest.raises(CheckpointError, match="training.seed: 0 -> 1"):
        aecore.train(change(tiny, seed=1), progress=False)
    (Path(tiny.run_dir) / "experiment.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not describe an experiment"):
        aecore.train(tiny, progress=False)


def test_other_images_are_refused_before_they_are_put_on_devices(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "others"
    save_pictures(folder, 40, seed=1)
    aecore.train(change(tiny, steps=2), progress=False)
    moved = dataclasses.replace(tiny.data, data_dir=str(folder))
    monkeypatch.delattr(feeds, "create")
    with pytest.raises(CheckpointError, match="was trained on other images"):
        aecore.train(change(tiny, data=moved), progress=False)


def test_early_stopping(tiny):
    # No epoch improves by as much as this, so that patience ends after the second and third.
    summary = aecore.train(change(tiny, epochs=9, patience=2, min_delta=0.9), progress=False)
    assert summary["epochs"] == 3


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tiny, monkeypatch):
    aecore.train(change(tiny, steps=4), progress=False)
    real_batches = training_batches

    def poisoned(*args, **options):
        for count, batch in enumerate(real_batches(*args, **options)):
            yield batch._replace(degraded=batch.degraded * np.nan) if count == 2 else batch

    monkeypatch.setattr(feeds, "training_batches", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"loss became nan at step 7; .*of step 4 is kept"):
        aecore.train(tiny, progress=False)
    assert steps_kept(tiny.run_dir) == [4]


def test_batches_that_cannot_be_divided_or_filled_are_refused(tiny):
    with pytest.raises(ConfigError, match="30 is not divisible by 8 devices; use 24 or 32"):
        aecore.train(change(tiny, batch_size=30))
    with pytest.raises(ConfigError, match="batch_size 64 is more than the 34 training images"):
        aecore.train(change(tiny, batch_size=64))
    assert not Path(tiny.run_dir).exists()


def test_channels_and_sizes_that_the_model_does_not_take_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="1 channel, the model NoiseReducer takes 3"):
        aecore.train(change(tiny, model=NoiseReducer(channels=3)))
    save_pictures(tmp_path / "odd", 4, (17, 16))
    odd = dataclasses.replace(tiny.data, data_dir=str(tmp_path / "odd"))
    with pytest.raises(ConfigError, match="17x16 is not a multiple of 2"):
        aecore.train(change(tiny, data=odd))


# ---- Processes of their own


def start(run_dir, *args):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | ONE_DEVICE
    command = [sys.executable, Path(__file__).with_name("tiny_experiment.py")]
    return subprocess.Popen(
        [*command, "--run-dir", run_dir, *args], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process, run_dir, step):
    """Returns once the log shows that a step is done."""
    path = Path(run_dir, "metrics.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def test_killed_and_terminated_runs_end_bit_for_bit_as_one_that_was_not(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed = start(whole)
    process = start(parts)
    wait_for_step(process, parts, 30)
    process.kill()
    process.communicate()
    process = start(parts)
    wait_for_step(process, parts, 110)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in errors
    stopped = int(errors.split("stopped after step ")[1].split(",")[0])
    assert steps_kept(parts)[-1] == stopped >= 110
    for process in (undisturbed, start(parts)):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert_identical(whole, parts)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, parts)]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]


@pytest.mark.parametrize("name", [*resuming._WRITTEN])
def test_files_that_are_not_of_a_run_are_not_replaced(name, tiny, monkeypatch):
    monkeypatch.delattr(sources, "load")
    folder = Path(tiny.run_dir)
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{folder} holds {name}, which is not of a run; use"):
        aecore.train(tiny, progress=False)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "mine"


def test_a_run_may_begin_beside_other_files_and_begins_again_without_its_checkpoints(tiny):
    folder = Path(tiny.run_dir)
    folder.mkdir()
    (folder / "output.log").write_text("mine")
    begun = change(tiny, steps=2)
    aecore.train(begun, progress=False)
    assert {path.name for path in folder.iterdir()} >= {*resuming._WRITTEN} - {claim.FILE}
    for path in (folder / "checkpoints").iterdir():
        shutil.rmtree(path)
    # As a process leaves the folder that is killed before its first checkpoint.
    resuming.check_directory(begun, epath.Path(folder))
    (folder / "checkpoints").rmdir()
    # As if somebody had removed the checkpoints to begin anew.
    resuming.check_directory(begun, epath.Path(folder))
    (folder / "experiment.json").unlink()
    (folder / claim.FILE).write_text('{"token": "0"}')
    # As a process leaves a bucket.
    resuming.check_directory(begun, epath.Path(folder))
    assert (folder / "output.log").read_text() == "mine"
