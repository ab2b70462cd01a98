"""Two processes train together, each on one CPU device, over a loopback connection."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_photographs import save
from test_training import newest

EXPERIMENT = Path(__file__).with_name("tiny_experiment.py")


def start(run, *flags, processes=1):
    """Processes that train the tiny experiment together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": ""}
    commands = [[sys.executable, str(EXPERIMENT), "--run-dir", str(run), *flags]] * processes
    if processes > 1:
        commands = [
            [*command, "--training.distributed", f"127.0.0.1:{port},{processes},{index}"]
            for index, command in enumerate(commands)
        ]
    return [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]


def finish(processes, status=0):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The state that one process reaches, by feed."""
    runs = {feed: tmp_path_factory.mktemp("alone") / feed for feed in ("stream", "resident")}
    flags = ["--training.steps", "20", "--training.feed"]
    finish([start(run, *flags, feed)[0] for feed, run in runs.items()])
    return {feed: newest(run)[0] for feed, run in runs.items()}


@pytest.mark.parametrize("feed", ["stream", "resident"])
@pytest.mark.parametrize("form", ["jit", "pmap"])
def test_two_processes_do_what_one_does(form, feed, alone, tmp_path):
    flags = ["--training.steps", "20", "--training.feed", feed, "--training.parallel", form]
    first, second = finish(start(tmp_path / "run", *flags, processes=2))
    assert "2 x cpu" in first
    assert "validation images" not in second
    state, description = newest(tmp_path / "run")
    assert description.step == 20
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[feed]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_two_processes_stop_together_and_one_goes_on(alone, tmp_path):
    run = tmp_path / "run"
    processes = start(run, "--training.steps", "150", processes=2)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    for output in finish(processes, status=130):
        assert "is saved in" in output
    _, description = newest(run)
    assert 10 <= description.step < 150
    finish(start(run, "--training.steps", "150"))
    assert newest(run)[1].step == 150


@pytest.mark.parametrize("feed", ["stream", "resident"])
def test_two_processes_train_on_crops_as_one_does(feed, tmp_path):
    save(tmp_path / "photos", [(40, 56), (56, 40), (48, 48), (33, 70)] * 3)
    flags = ["--training.steps", "6", "--training.feed", feed, "--training.batch-size", "8"]
    flags += ["--data.dataset", "folder", "--data.data-dir", str(tmp_path / "photos")]
    flags += ["--data.crop", "16", "--data.turn", "--data.channels", "1"]
    flags += ["--data.crops-per-image", "4"]
    finish([*start(tmp_path / "one", *flags), *start(tmp_path / "two", *flags, processes=2)])
    (one, description), (two, other) = (newest(tmp_path / name) for name in ("one", "two"))
    assert description.step == other.step == 6
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert other.metrics["images"] == description.metrics["images"] == 2
    assert other.metrics["mse"] == pytest.approx(description.metrics["mse"], rel=1e-4)
