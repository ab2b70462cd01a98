"""Folders for model hubs: bit-equal, described, and harmless."""

import hashlib
import json
import sys

import jax
import numpy as np
import pytest
import yaml
from conftest import random_params
from etils import epath
from test_cli import run

import aecore
from aecore import cli
from aecore.errors import CheckpointError, ConfigError
from aecore.models import NoiseReducer
from aecore.saved import hub, weights
from aecore.saved.trained import TrainedNetwork

pytest.importorskip("safetensors")
RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(trained, tmp_path):
    path = epath.Path(tmp_path / "denoiser")
    hub.save(path, weights.load(trained))
    return path


@pytest.mark.every_room
def test_a_folder_gives_bit_for_bit_what_the_run_gives(trained, folder, tmp_path):
    restorer, shared = aecore.Restorer.load(trained), aecore.Restorer.load(folder)
    image = RANDOM.random((21, 34), np.float32)
    np.testing.assert_array_equal(shared(image), restorer(image))
    np.testing.assert_array_equal(aecore.restore(image, folder), restorer(image))
    assert shared.description.metrics == restorer.description.metrics
    for path in folder.iterdir():
        assert str(trained.parent).encode() not in path.read_bytes()
    again = epath.Path(tmp_path / "again" / "denoiser")
    hub.save(again, shared.trained)
    for name in (hub.CONFIG, hub.WEIGHTS, hub.CARD):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_snapshot_of_links_is_loaded(folder, tmp_path):
    snapshot = epath.Path(tmp_path / "snapshot")
    snapshot.mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    jax.tree.map(
        np.testing.assert_array_equal, weights.load(snapshot).params, weights.load(folder).params
    )


def test_the_card_is_what_hubs_read():
    folder = hub._card("photo-denoise", weights.load("photo-denoise"), {"a": np.zeros(3)})
    _, head, body = folder.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "aecore"
    assert metadata["pipeline_tag"] == "image-to-image"
    for words in weights.CARDS["photo-denoise"].limits, "GaussianNoise", "Restorer.load":
        assert words in body


def test_export_and_restore_on_the_command_line(trained, pictures, tmp_path, capsys):
    out = str(tmp_path / "shared")
    words = ["export", str(trained), "-o", out, "--format", "safetensors"]
    assert run(capsys, cli.run, *words)[0] == 0
    status, _, errors = run(capsys, cli.run, *words)
    assert (status, errors.count("is not an empty folder; name a new one")) == (2, 1)
    picture = str(pictures / "0.png")
    for source, name in ((out, "a.png"), (str(trained), "b.png")):
        target = str(tmp_path / name)
        assert run(capsys, cli.run, "restore", picture, "-o", target, "-m", source)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def changed(folder, change):
    config = json.loads((folder / hub.CONFIG).read_text())
    change(config)
    (folder / hub.CONFIG).write_text(json.dumps(config))


def with_weights(folder, data):
    (folder / hub.WEIGHTS).write_bytes(data)
    changed(folder, lambda config: config.update(sha256=hashlib.sha256(data).hexdigest()))


def header(folder, shape):
    data = (folder / hub.WEIGHTS).read_bytes()
    return data.replace(b'"shape":[1]', b'"shape":[' + shape + b"]", 1)


DAMAGES = {
    "truncated": lambda f: (f / hub.WEIGHTS).write_bytes((f / hub.WEIGHTS).read_bytes()[:99]),
    "truncated with checksum": lambda f: with_weights(f, (f / hub.WEIGHTS).read_bytes()[:-4]),
    "no weights in it": lambda f: with_weights(f, b""),
    "pickled": lambda f: with_weights(f, b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "other shape": lambda f: with_weights(f, header(f, b"9")),
    "no JSON": lambda f: (f / hub.CONFIG).write_text("{"),
    "a list": lambda f: (f / hub.CONFIG).write_text("[1]"),
    "of others": lambda f: (f / hub.CONFIG).write_text('{"architectures": ["Bert"]}'),
    "a model to run": lambda f: changed(
        f, lambda c: c["description"].update(model={"type": "os.system", "command": "true"})
    ),
    "another model": lambda f: changed(f, lambda c: c["description"]["model"].update(channels=3)),
    "words for numbers": lambda f: changed(f, lambda c: c["description"].update(step="x")),
    "about is text": lambda f: changed(f, lambda c: c.update(about=5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_folders_get_one_line(damage, folder):
    assert aecore.Restorer.load(folder)
    DAMAGES[damage](folder)
    with pytest.raises(CheckpointError) as raised:
        aecore.Restorer.load(folder)
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r'pip install "aecore\[safetensors\]"'):
        aecore.Restorer.load(folder)


def test_folders_that_hold_something_are_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        network = TrainedNetwork.of(NoiseReducer(), random_params(NoiseReducer()))
        hub.save(epath.Path(tmp_path), network)
