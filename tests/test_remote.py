"""Runs, pictures and data in a bucket, of an emulator on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_DEVICE, save_pictures
from etils import epath
from PIL import Image
from test_photographs import save as save_photographs
from test_processes import free_port

from aecore.training import claim

pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("gcsfs")
import emulator

EXPERIMENT = str(Path(__file__).with_name("tiny_experiment.py"))
AECORE = ["-m", "aecore"]


@pytest.fixture
def cloud():
    server = emulator.Emulator()
    yield server
    server.close()


@pytest.fixture
def python(cloud):
    """Runs a Python program that uses the bucket; returns what it printed."""
    environment = os.environ | emulator.environment(cloud.listen()) | ONE_DEVICE

    def run(*words, status=0):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, done.stderr
        return done

    return run


COPY = "import sys; from aecore.storage import to_path, walk, write_whole\n"
UPLOAD = COPY + "for p in walk(to_path(sys.argv[1])): write_whole("
UPLOAD += "to_path(sys.argv[2]) / p.relative_to(sys.argv[1]), p.read_bytes())"
DOWNLOAD = COPY + "for p in walk(to_path(sys.argv[1])):\n"
DOWNLOAD += " t = to_path(sys.argv[2]) / p.relative_to(sys.argv[1])\n"
DOWNLOAD += " t.parent.mkdir(parents=True, exist_ok=True); write_whole(t, p.read_bytes())"


def test_a_run_in_a_bucket(python, cloud, tmp_path):
    run = "gs://bucket/runs/tiny"
    flags = ["--run-dir", run, "--training.steps"]
    python(EXPERIMENT, *flags, 30)
    python(EXPERIMENT, *flags, 50)
    assert "NoiseReducer" in python(*AECORE, "summary", run).stdout
    python(*AECORE, "restore", f"{run}/example.png", "-o", "gs://bucket/out.png", "-m", run)
    python(*AECORE, "export", run, "-o", "gs://bucket/exported.aecore", "--format", "weights")
    python("-c", DOWNLOAD, "gs://bucket", tmp_path)
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 50
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, lines) if "loss" in e] == [10, 20, 30, 40, 50]
    assert list((tmp_path / "runs" / "tiny").glob("events*"))
    assert Image.open(tmp_path / "out.png").size == (28, 28)
    assert (tmp_path / "exported.aecore").exists()


def test_a_run_in_a_bucket_is_one_process_alone(python, tmp_path):
    folder = epath.Path(tmp_path)
    train = [EXPERIMENT, "--run-dir", "gs://bucket/run", "--training.steps", 10]
    with claim.claimed(folder):
        python("-c", UPLOAD, folder, "gs://bucket/run")
        errors = python(*train, status=2).stderr
        alive = claim.read(folder)
    assert f"process {os.getpid()} on {socket.gethostname()} is training in gs:" in errors
    # As a process leaves it that was killed.
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (folder / claim.FILE).write_text(json.dumps({**alive, "process": killed.pid}))
    python("-c", UPLOAD, folder, "gs://bucket/run")
    assert "10 steps" in python(*train).stdout


@pytest.mark.parametrize("drop_every", [None, 20])
def test_pictures_in_a_bucket(python, cloud, tmp_path, drop_every):
    save_pictures(tmp_path / "in" / "deep", 12)
    save_pictures(tmp_path / "in" / ".hidden", 1)
    python("-c", UPLOAD, tmp_path / "in", "gs://bucket/in")
    cloud.drop_every = drop_every
    args = [*AECORE, "restore", "gs://bucket/in", "-m", "fashion-mnist-denoise", "--recursive"]
    remote = [*args, "-o", "gs://bucket/out"]
    assert "12 restored" in python(*remote, "--report", "gs://bucket/report.json").stdout
    assert python(*remote, status=2).stderr.count("\n") == 1
    assert "12 skipped" in python(*remote, "--if-exists", "skip").stdout
    python(*args, "-o", tmp_path / "local")
    cloud.drop_every = None
    python("-c", DOWNLOAD, "gs://bucket/out", tmp_path / "out")
    for index in range(12):
        name = f"deep/{index}.png"
        found, expected = (Image.open(tmp_path / where / name) for where in ("out", "local"))
        np.testing.assert_array_equal(found, expected)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 12
    assert (cloud.dropped > 0) == (drop_every is not None)


def test_a_bucket_that_lets_nobody_in(python, cloud, tmp_path):
    cloud.refuses = True
    args = ["-o", tmp_path / "out.png", "-m", "photo-denoise"]
    for words in (["restore", "gs://bucket/a.png", *args], ["summary", "gs://bucket/run"]):
        errors = python(*AECORE, *words, status=1).stderr
        assert errors.count("\n") == 1
        assert "check the network and your credentials" in errors


def test_processes_that_train_on_photographs_in_a_bucket_each_read_their_share(
    python, cloud, tmp_path
):
    save_photographs(tmp_path / "photos", [(24, 32), (32, 24)] * 80)
    python("-c", UPLOAD, tmp_path / "photos", "gs://bucket/photos")
    flags = ["--data.dataset", "folder", "--data.data-dir", "gs://bucket/photos"]
    flags += ["--data.crop", "16", "--data.channels", "1", "--training.batch-size", "8"]
    flags += ["--training.steps", "4", "--run-dir", "gs://bucket/run"]
    flags += ["--training.distributed", f"127.0.0.1:{free_port()},2,"]
    addresses = [cloud.listen() for _ in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, EXPERIMENT, *flags[:-1], f"{flags[-1]}{index}"],
            env=os.environ | emulator.environment(address) | ONE_DEVICE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, address in enumerate(addresses)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    read = []
    for address in addresses:
        requests = cloud.requests[int(address.rpartition(":")[2])]
        whole = [path for method, path in requests if method == "GET" and "alt=media" in path]
        read.append({name.group() for path in whole if (name := re.search(r"photos/\w+", path))})
    validation = 16
    # Batches are made ahead, but the first epoch's are all for one process or the other.
    assert len(read[0] & read[1]) == validation
    for names in read:
        assert validation < len(names) <= validation + (160 - validation) // 2
