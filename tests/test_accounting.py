"""Which process trains in a run directory, and where a run's time goes."""

import gzip
import json
import os
import queue
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from conftest import ONE_DEVICE
from etils import epath
from test_training import change

import aecore
from aecore import storage
from aecore.errors import ConfigError
from aecore.scoring import evaluation
from aecore.training import claim


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def left(folder, **fields):
    """A claim that another process has left."""
    said = {"token": "other", "host": socket.gethostname(), "process": os.getpid(), "started": 1}
    storage.write_whole(folder / claim.FILE, json.dumps(said | fields).encode())


def take(folder):
    """Claims the folder for another process, again if a sign of life of this one came between."""
    for _ in range(10):
        left(folder)
        time.sleep(0.1)


class Clock:
    """Time as claims see it: it passes only while they sleep, and `then` is called with each."""

    def __init__(self, then):
        self.now, self.then = 0.0, then

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.then(self.now)


def test_a_second_training_in_a_run_directory_is_refused(folder):
    with (
        claim.claimed(folder),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}"),
        claim.claimed(folder),
    ):
        pass
    assert not (folder / claim.FILE).exists()


def test_two_trainings_that_start_at_once(tiny):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ONE_DEVICE
    script = Path(__file__).with_name("tiny_experiment.py")
    command = [sys.executable, script, "--run-dir", tiny.run_dir, "--training.steps", "40"]
    started = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    statuses = [process.returncode for process in started]
    assert sorted(statuses) == [0, 2]
    first, second = statuses.index(0), statuses.index(2)
    assert f"process {started[first].pid} on" in errors[second]


def test_a_claim_of_a_process_that_is_gone_does_not_count(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left(folder, process=ended.pid)
    with claim.claimed(folder):
        pass
    left(folder)  # The number is another process's now.
    with claim.claimed(folder):
        pass


@pytest.mark.parametrize(
    "damaged",
    [
        {"seconds": "abc"},
        {"seconds": None, "process": None},
        {"seconds": float("inf"), "process": None},
        {"seconds": 10**400, "process": None},
        {"process": 10**30},
    ],
    ids=str,
)
def test_of_a_damaged_claim_what_cannot_be_used_is_left_out(damaged, folder):
    left(folder, **damaged)
    with claim.claimed(folder) as seconds:
        assert seconds == 0


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere"},
        # A container shares the host's name, and its processes have numbers that are nobody's here.
        {"process": 2**22 + 1, "namespace": "pid:[1]"},
    ],
    ids=["another host", "another container"],
)
def test_a_claim_of_elsewhere_counts_while_it_shows_signs_of_life(other, folder, monkeypatch):
    clock = Clock(lambda now: None)
    monkeypatch.setattr(claim, "time", clock)
    left(folder, **other)
    with claim.claimed(folder):
        assert 6 <= clock.now < 8

    def shows_a_sign(now):
        if now > 5:
            left(folder, **other, beats=1)

    left(folder, **other, beats=0)
    monkeypatch.setattr(claim, "time", Clock(shows_a_sign))
    with pytest.raises(ConfigError, match="is training"), claim.claimed(folder):
        pass


def test_a_claim_that_cannot_be_read_for_a_moment_still_counts(folder, monkeypatch):
    def is_damaged_then_shows_a_sign(now):
        if now < 3:
            (folder / claim.FILE).write_text("")
        else:
            left(folder, host="elsewhere", beats=1)

    left(folder, host="elsewhere", beats=0)
    monkeypatch.setattr(claim, "time", Clock(is_damaged_then_shows_a_sign))
    with pytest.raises(ConfigError, match="on elsewhere is training"), claim.claimed(folder):
        pass


def test_a_claim_of_another_host_that_is_given_up_is_not_waited_for(folder, monkeypatch):
    def gives_up(now):
        if now == 1:
            (folder / claim.FILE).unlink()

    clock = Clock(gives_up)
    monkeypatch.setattr(claim, "time", clock)
    left(folder, host="elsewhere")
    with claim.claimed(folder):
        assert clock.now < 2


def test_of_two_claims_at_one_moment_the_earlier_gives_way(folder, monkeypatch):
    monkeypatch.setattr(claim, "_BEAT", 0.05)
    told = queue.SimpleQueue()
    with claim.claimed(folder, stop=told.put):
        take(folder)
        assert "is training in" in told.get(timeout=10)
    assert claim.read(folder)["token"] == "other"


def test_signs_of_life_go_on_after_an_error_of_a_bucket(folder, monkeypatch):
    class HttpError(Exception):
        pass

    def fail(path):
        raise HttpError("503")

    monkeypatch.setattr(claim, "_BEAT", 0.05)
    told = queue.SimpleQueue()
    with claim.claimed(folder, stop=told.put):
        with monkeypatch.context() as patch:
            patch.setattr(claim, "is_remote", lambda path: True)
            patch.setattr(storage, "is_remote", lambda path: True)
            patch.setattr(claim, "read", fail)
            time.sleep(0.3)
        take(folder)
        assert "is training in" in told.get(timeout=10)


def test_a_run_that_another_process_has_taken_saves_nothing_more(tiny, monkeypatch):
    monkeypatch.setattr(claim, "_BEAT", 0.05)
    run = epath.Path(tiny.run_dir)

    def taken_at_the_fourth(step, scores):
        if step == 4 and "loss" in scores:
            take(run)

    with pytest.raises(ConfigError, match="is training in"):
        aecore.train(change(tiny, steps=6), progress=False, callback=taken_at_the_fourth)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name == "6"]


def test_a_start_that_fails_forgets_nothing_of_the_time_of_one_that_was_killed(folder):
    left(folder, process=2**22 + 1, seconds=100.0)
    with pytest.raises(ValueError), claim.claimed(folder, lambda: 3.0):
        raise ValueError
    with claim.claimed(folder) as seconds:
        assert seconds == 100


def test_the_time_of_a_run_adds_up(tiny):
    begin = time.perf_counter()
    summary = aecore.train(tiny, progress=False)
    wall = time.perf_counter() - begin
    spent = summary["time"]
    assert sum(spent.values()) == pytest.approx(summary["seconds"])
    assert sum(spent.values()) == pytest.approx(wall, rel=0.02, abs=0.05)
    for name in ("training", "compiling", "evaluating", "saving", "starting"):
        assert spent[name] > 0
    again = aecore.train(change(tiny, steps=12), progress=False)
    assert again["seconds"] > summary["seconds"]
    assert again["time"]["lost"] < 0.1


def test_the_time_of_a_killed_process_after_its_last_checkpoint_is_lost(tiny):
    before = aecore.train(tiny, progress=False)
    run = epath.Path(tiny.run_dir)
    left(run, process=2**22 + 1, seconds=before["seconds"] + 100)
    after = aecore.train(change(tiny, steps=12), progress=False)
    assert after["time"]["lost"] == pytest.approx(100, abs=before["seconds"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "goodput" in line][-1]["goodput"] < 0.1


def test_lines_of_the_metrics_say_where_the_time_went(tiny):
    aecore.train(tiny, progress=False)
    text = (Path(tiny.run_dir) / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    for line in lines:
        shares = [line[name] for name in line if name.startswith("share_") and "matrix" not in name]
        assert len(shares) == 4
        assert 0 <= sum(shares) <= 1.001
        assert 0 < line["goodput"] <= 1
        assert 0 < line["share_of_matrix_rate"] < 1


def test_a_trace_of_some_steps(tiny):
    aecore.train(change(tiny, profile="3,2"), progress=False)
    folder = Path(tiny.run_dir) / "profile"
    assert list(folder.rglob("*.xplane.pb"))
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("train_steps" in name for name in names)


def test_a_run_that_is_stopped_writes_what_was_traced(tiny):
    def stop(step, scores):
        if step == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        aecore.train(change(tiny, profile="3,100"), progress=False, callback=stop)
    assert list((Path(tiny.run_dir) / "profile").rglob("*.xplane.pb"))
    aecore.train(change(tiny, profile="7,1"), progress=False)  # Another trace can begin.


def test_a_training_that_fails_leaves_no_listener_behind(tiny, monkeypatch):
    told = []
    on, off = "register_event_duration_secs_listener", "unregister_event_duration_listener"
    monkeypatch.setattr(jax.monitoring, on, told.append)
    monkeypatch.setattr(jax.monitoring, off, told.remove)
    with pytest.raises(ConfigError):
        aecore.train(change(tiny, devices=9), progress=False)
    assert not told


def test_scoring_the_input_counts_as_evaluating(tiny, monkeypatch):
    real = evaluation.baseline

    def slow(*args):
        time.sleep(1)
        return real(*args)

    monkeypatch.setattr(evaluation, "baseline", slow)
    assert aecore.train(change(tiny, steps=8), progress=False)["time"]["training"] < 1
