"""Two processes train together, each on one CPU device, over a loopback connection."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE
from test_photographs import save
from test_training import newest

from aecore import Training
from aecore.errors import ConfigError, ProcessError, SavingError
from aecore.training import group, meeting
from aecore.training import processes as processes_module

EXPERIMENT = Path(__file__).with_name("tiny_experiment.py")
RESIDENT = ["--training.feed", "resident"]
"""Where the feed doesn't matter: processes with this one start sooner, without TensorFlow."""
TOGETHER = ["--training.steps", "60", *RESIDENT]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(run, *flags, processes=1, second=(), output=None, pause=0):
    """Processes that train the tiny experiment together.

    Args:
      run: the run directory.
      flags: of all processes.
      processes: how many there are.
      second: further flags of the second one.
      output: a file for what they print, if it is to be read while they run.
      pause: seconds between the starts of the first and the second one.
    """
    port = free_port()
    environment = os.environ | ONE_DEVICE
    commands = [[sys.executable, str(EXPERIMENT), "--run-dir", str(run), *flags]] * processes
    if processes > 1:
        commands = [
            [*command, "--training.distributed", f"127.0.0.1:{port},{processes},{index}"]
            for index, command in enumerate(commands)
        ]
        commands[1] += second
    started = []
    for command in commands:
        time.sleep(pause if started else 0)
        target = subprocess.PIPE if output is None else output.open("a")
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=target, stderr=subprocess.STDOUT, text=True
            )
        )
    return started


def due(run, moment, output):
    """Whether a training is where a test wants it."""
    if moment == "evaluation":
        return "evaluating" in output.read_text()
    if moment == "checkpoint":
        return any(run.glob("checkpoints/*tmp*"))
    return (run / "metrics.jsonl").exists() and "loss" in (run / "metrics.jsonl").read_text()


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


def test_two_processes_under_slurm_do_what_one_does(alone, tmp_path):
    # As `srun` sets it for the processes that it starts, here both on this machine.
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    command = [sys.executable, str(EXPERIMENT), "--run-dir", str(tmp_path / "run")]
    command += ["--training.steps", "20", "--training.distributed", "auto", *RESIDENT]
    started = []
    for index in ("0", "1"):
        own = {"SLURM_NTASKS": "2", "SLURM_PROCID": index, "SLURM_LOCALID": index}
        environment = os.environ | job | own | ONE_DEVICE
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    first, _ = finish(started)
    assert "2 x cpu" in first
    state, _ = newest(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone["resident"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_two_processes_stop_together_and_one_goes_on(alone, tmp_path):
    run = tmp_path / "run"
    processes = start(run, "--training.steps", "150", *RESIDENT, processes=2)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    for output in finish(processes, status=130):
        assert "is saved in" in output
    _, description = newest(run)
    assert 10 <= description.step < 150
    finish(start(run, "--training.steps", "150", *RESIDENT))
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


@pytest.mark.parametrize("moment", ["step", "evaluation", "checkpoint"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on_exactly(
    victim, moment, together, tmp_path
):
    run, output = tmp_path / "run", tmp_path / "output"
    output.touch()
    processes = start(run, *TOGETHER, processes=2, output=output)
    while not due(run, moment, output):
        assert processes[0].poll() is None, output.read_text()
        time.sleep(0.002)
    processes[victim].kill()
    begin = time.monotonic()
    assert processes[1 - victim].wait(timeout=60) == 1
    assert time.monotonic() - begin < 20
    processes[victim].wait()
    said = output.read_text()
    assert said.count("error: ") == 1
    assert re.search(rf"error: process {victim} \(on .*\) is gone", said)
    assert "Check failure" not in said
    finish(start(run, *TOGETHER, processes=2))
    state, description = newest(run)
    assert description.step == 60
    jax.tree.map(np.testing.assert_array_equal, state, together)
    summary = json.loads((run / "summary.json").read_text())
    if victim == 1:  # Else what is known of it is some seconds old.
        assert summary["time"]["lost"] > 0
    assert sum(summary["time"].values()) == pytest.approx(summary["seconds"])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The state that two undisturbed processes reach."""
    run = tmp_path_factory.mktemp("together") / "run"
    finish(start(run, *TOGETHER, processes=2))
    return newest(run)[0]


def test_a_process_without_a_sign_of_life(tmp_path):
    output = tmp_path / "output"
    output.touch()
    flags = ["--training.loss-timeout", "3", *RESIDENT]
    processes = start(tmp_path / "run", *flags, processes=2, output=output)
    while not due(tmp_path / "run", "step", output):
        assert processes[0].poll() is None, output.read_text()
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGSTOP)
    assert processes[1].wait(timeout=60) == 1
    processes[0].kill()
    processes[0].wait()
    assert "process 0 (on 127.0.0.1) has given no sign of life for 3 s" in output.read_text()


@pytest.mark.parametrize(
    "different, message",
    [
        (["--training.seed", "1"], "process 1 has another experiment: training.seed 1 (process 0"),
        (["--run-dir", "elsewhere"], "process 1 has another experiment: run_dir elsewhere"),
        (["--data.dataset", "folder"], "process 1 has another experiment: data.dataset folder"),
    ],
)
def test_processes_with_different_experiments(different, message, tmp_path):
    for output in finish(start(tmp_path / "run", processes=2, second=different), status=2):
        assert message in output
    assert not (tmp_path / "run").exists()


def test_processes_with_different_images(tmp_path):
    for name in "ab":
        save(tmp_path / name, [(16, 16)] * (80 if name == "a" else 81))
    data = ["--data.dataset", "folder", "--data.channels", "1", "--data.data-dir"]
    processes = start(
        tmp_path / "run",
        *data,
        str(tmp_path / "a"),
        processes=2,
        second=["--data.data-dir", str(tmp_path / "b")],
    )
    for output in finish(processes, status=2):
        assert "process 1 has other images than process 0" in output


def test_a_process_that_comes_late(tmp_path):
    flags = ["--training.steps", "10", *RESIDENT]
    processes = start(tmp_path / "run", *flags, processes=2, pause=3)
    assert "2 x cpu" in finish(processes)[0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_never_comes(index, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "_REPORT_EVERY", 0.1)
    address = f"127.0.0.1:{free_port()}"
    training = Training(distributed=f"{address},2,{index}", join_timeout=1)
    begin = time.monotonic()
    with pytest.raises(ProcessError) as raised:
        processes_module.join(training)
    assert 1 <= time.monotonic() - begin < 5
    missing = "of 2 processes, 1 did not come" if index == 0 else "process 1 could not reach"
    assert missing in str(raised.value)
    assert address in str(raised.value)
    assert "firewall" in str(raised.value)
    waiting = "1 of 2 processes have come" if index == 0 else "process 1 can't reach process 0"
    assert waiting in caplog.text
    assert not jax.distributed.is_initialized()


def test_strangers_at_the_port_are_ignored(monkeypatch):
    port = free_port()
    training = Training(distributed=f"127.0.0.1:{port},2,0", join_timeout=3)

    def knock():
        with contextlib.suppress(OSError):
            while True:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                time.sleep(0.2)

    threading.Timer(0.5, knock).start()
    with pytest.raises(ProcessError, match="1 did not come"):
        processes_module.join(training)


RESUMES = "; the same command on all hosts resumes from the last checkpoint"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), f"was interrupted{RESUMES}"),
        (OSError(30, "read only", "/run"), f"failed: /run: read only{RESUMES}"),
        (RuntimeError("one\ntwo"), f"failed: one two{RESUMES}"),
        (SavingError("the disk is full; try again"), "failed: the disk is full; try again"),
        (ConfigError("seed 1.5; use 1"), "failed: seed 1.5; use 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_others_are_told_once_what_happened_and_what_to_do(error, said, monkeypatch):
    monkeypatch.setattr(processes_module, "GRACE", 0.1)
    monkeypatch.setattr(group.interrupts, "end_at_once", lambda status: None)
    ends = socket.socketpair()
    first, second = (
        group.Group(index, 2, {1 - index: group.Link(end, "host")}, timeout=60)
        for index, end in enumerate(ends)
    )
    try:
        with pytest.raises(type(error)), processes_module._ending_together(second):
            raise error
        assert first.wait_for_loss(60) == f"process 1 {said}"
    finally:
        first.leave(None)


def test_a_port_that_is_in_use_is_named_with_the_reason_alone():
    with meeting._server(0) as taken:
        port = taken.getsockname()[1]
        message = rf"^port {port} can't be used \(Address already in use\); if another training"
        with pytest.raises(ConfigError, match=message):
            meeting._server(port)


def test_why_the_coordination_service_does_not_start_is_told():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = meeting.Place("127.0.0.1", port, 2, 0, timeout=1.0)
        with pytest.raises(ConfigError, match=rf"at port {port} \(.*[Ff]ailed.*\); if"):
            meeting.start_coordinator(place, Training())
