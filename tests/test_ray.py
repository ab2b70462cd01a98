"""Restoring on a cluster of Ray, which here is a few processes of this machine."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_DEVICE, save_pictures
from PIL import Image
from test_bulk import names, run, save_unchanged, save_video

import aecore
from aecore.errors import CheckpointError, ConfigError
from aecore.media import images
from aecore.ray import _Options, _Worker
from aecore.restoring.bulk import WriteOptions

ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("ray.data")


@pytest.fixture(scope="module")
def cluster():
    # Two CPUs for workers, each of which has one device, and one CPU for what reads.
    options = dict(num_cpus=3, object_store_memory=2**28, log_to_driver=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_DEVICE.items():
            patch.setenv(name, value)
        ray.init(include_dashboard=False, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return save_unchanged(tmp_path_factory.mktemp("model") / "unchanged.aecore", 1)


def workers():
    """Processes of this cluster that hold a network."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
            command = (status.parent / "cmdline").read_text()
        except OSError:  # It has ended meanwhile.
            continue
        children.setdefault(int(lines["PPid"]), []).append((int(status.parent.name), command))
    found, parents = [], [os.getpid()]
    while parents:
        for pid, command in children.get(parents.pop(), []):
            parents.append(pid)
            if command.startswith("ray::MapWorker(MapBatches(_Worker"):
                found.append(pid)
    return found


def worker(model, output):
    """What a worker does, in this process."""
    naming = {"suffix": "", "extension": "auto"}
    return _Worker(_Options(model, {"device": "cpu"}, str(output), naming, False, WriteOptions()))


def summary(dataset):
    rows = dataset.take_all()
    return rows, [row["status"] for row in rows]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")  # noqa: PTH110
def test_a_worker_that_dies_loses_nothing(cluster, trained, tmp_path, capfd):
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(10):
        save_pictures(source / str(number), 100, (28, 28), seed=number)
        for index in range(6):
            content = (source / str(number) / f"{index}.png").read_bytes()
            (source / str(number) / f"{index}.png").write_bytes(content[: 20 * index])
    killed = []

    def kill_one():
        while len(list(out.glob("*/*.png"))) < 300:
            time.sleep(0.05)
        killed.append(workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    dataset = aecore.ray.restore(source, trained, out, recursive=True, workers=2, at_a_time=50)
    killer.join()
    assert killed
    rows, status = summary(dataset)
    assert len(rows) == 1000
    assert status.count("failed") == 60
    assert all(row["reason"] for row in rows if row["status"] == "failed")
    # What the worker had finished before it died is skipped when its pictures are done again.
    assert status.count("restored") > 870
    assert status.count("restored") + status.count("skipped") == 940
    alone = tmp_path / "alone"
    args = [source, "-o", alone, "-m", trained, "--recursive", "--report", tmp_path / "r.json"]
    assert run(capfd, *args)[0] == 1
    # What the worker was writing when it was killed stays, under hidden names.
    unfinished = [name for name in names(out) if name.endswith(".tmp")]
    assert all(Path(name).name.startswith(".") for name in unfinished)
    assert [name for name in names(out) if name not in unfinished] == names(alone)
    for name in names(alone):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    entries = json.loads((tmp_path / "r.json").read_text())["files"]
    reasons = {entry["source"]: entry["reason"] for entry in entries if "reason" in entry}
    assert reasons == {row["source"]: row["reason"] for row in rows if row["reason"]}
    _, status = summary(aecore.ray.restore(source, trained, out, recursive=True))
    assert status.count("skipped") == 940


def test_sizes_kinds_and_what_is_missing(cluster, trained, tmp_path):
    av = pytest.importorskip("av")
    random = np.random.default_rng(0)
    for index in range(12):
        save_pictures(tmp_path / "in" / str(index), 1, tuple(random.integers(4, 100, 2)))
    save_video(av, tmp_path / "in" / "video.mkv")
    inputs = [str(tmp_path / "in"), str(tmp_path / "missing.png"), str(tmp_path / "no*.png")]
    options = {"recursive": True, "suffix": "_new", "extension": "tiff", "strength": 0.5}
    dataset = aecore.ray.restore(
        inputs, trained, tmp_path / "out", **options, workers=2, at_a_time=4
    )
    rows, status = summary(dataset)
    assert status.count("restored") == 13
    failed = {row["source"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed[str(tmp_path / "no*.png")] == "matches no file"
    assert "No such file" in failed[str(tmp_path / "missing.png")]
    restorer = aecore.Restorer.load(trained, strength=0.5)
    for index in range(12):
        expected = restorer(tmp_path / "in" / str(index) / "0.png")
        found = images.read_picture(tmp_path / "out" / str(index) / "0_new.tiff").frames[0].values
        np.testing.assert_array_equal(found, expected)
    assert (tmp_path / "out" / "video_new.mkv").exists()


def test_parquet(cluster, trained, tmp_path):
    save_pictures(tmp_path / "in", 20)
    paths = sorted((tmp_path / "in").iterdir())
    items = [{"bytes": path.read_bytes(), "label": path.name} for path in paths]
    items += [{"bytes": b"text", "label": "text"}, {"bytes": None, "label": "nothing"}]
    ray.data.from_items(items).write_parquet(str(tmp_path / "parquet"))
    dataset = ray.data.read_parquet(str(tmp_path / "parquet"))
    restored = aecore.ray.restore(dataset, trained, workers=1, at_a_time=8)
    restored.write_parquet(str(tmp_path / "restored"))
    rows = ray.data.read_parquet(str(tmp_path / "restored")).take_all()
    assert len(rows) == 22
    restorer = aecore.Restorer.load(trained)
    for row in rows:
        if row["status"] == "failed":
            assert row["label"] in ("text", "nothing")
            assert row["bytes"] is None
            assert "not a picture" in row["reason"]
            continue
        (tmp_path / "picture.png").write_bytes(row["bytes"])
        expected = restorer(tmp_path / "in" / row["label"])
        np.testing.assert_array_equal(Image.open(tmp_path / "picture.png"), expected)


def test_files_named_by_a_dataset(cluster, trained, tmp_path):
    save_pictures(tmp_path / "in", 2)
    content = (tmp_path / "in" / "0.png").read_bytes()
    items = [{"bytes": content, "path": name} for name in ("a/b.bmp", "c.jpg", "../../d.png")]
    for expected in ("restored", "skipped"):
        dataset = aecore.ray.restore(ray.data.from_items(items), trained, tmp_path / "out")
        rows, status = summary(dataset)
        assert sorted(status) == sorted(["failed", expected, expected])
        assert all(set(row) >= {"path", "target"} and "bytes" not in row for row in rows)
        assert names(tmp_path / "out") == ["a/b.bmp", "c.jpg"]
    assert Image.open(tmp_path / "out" / "c.jpg").format == "JPEG"


def test_addresses_in_a_dataset_are_names_within_the_output_folder(unchanged, tmp_path):
    save_pictures(tmp_path / "in", 1)
    picture = tmp_path / "in" / "0.png"
    before = picture.read_bytes()
    addresses = ["gs://bucket/a.png", "s3://bucket/b/c.png", picture.as_uri(), "gs://", ""]
    addresses += ["gs://../d.png"]
    contents = {"bytes": [before] * len(addresses), "path": addresses}
    # The folder's own name may lead upwards.
    out = tmp_path / "in" / ".." / "out"
    rows = worker(unchanged, out)(pyarrow.table(contents)).to_pylist()
    assert [row["status"] for row in rows] == ["restored"] * 3 + ["failed"] * 3
    assert all("leads out" in row["reason"] for row in rows[3:])
    expected = ["bucket/a.png", "bucket/b/c.png", str(picture).lstrip("/")]
    assert names(tmp_path / "out") == sorted(expected)
    assert names(tmp_path) == sorted(["in/0.png", *(f"out/{name}" for name in expected)])
    assert picture.read_bytes() == before


def test_a_picture_that_is_named_twice_is_restored_into_both_places(unchanged, tmp_path):
    save_pictures(tmp_path / "in" / "sub", 1)
    source, out = tmp_path / "in" / "sub" / "0.png", tmp_path / "out"
    out.mkdir()
    (out / "0.png").write_bytes(source.read_bytes())
    targets = [out / "0.png", out / "sub" / "0.png", out / "0.png" / "0.png"]
    table = {"source": [str(source)] * 3, "target": list(map(str, targets))}
    rows = worker(unchanged, out)(pyarrow.table(table)).to_pylist()
    assert [row["status"] for row in rows] == ["skipped", "restored", "failed"]
    assert names(out) == ["0.png", "sub/0.png"]


def test_what_cannot_work_is_said_at_once(cluster, tmp_path, trained, monkeypatch):
    save_pictures(tmp_path / "in", 2)
    with pytest.raises(CheckpointError, match="does not exist"):
        aecore.ray.restore(tmp_path / "in", tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match="no output"):
        aecore.ray.restore(tmp_path / "in", trained)
    with pytest.raises(ConfigError, match="the dataset has no column bytes, but id"):
        aecore.ray.restore(ray.data.range(3), trained)
    pictures = ray.data.from_items([{"bytes": b"", "path": "a.png"}])
    for data in (tmp_path / "in", pictures):
        for wrong in ({"extension": ".jpg"}, {"suffix": "/x"}, {"quality": 0}):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                aecore.ray.restore(data, trained, tmp_path / "out", **wrong)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'aecore\[ray\]'"):
        aecore.ray.restore(tmp_path / "in", trained, tmp_path / "out")
