"""Experiments by name, and new experiment files."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from test_cli import run

from aecore import Experiment, cli
from aecore.errors import ConfigError
from aecore.experiments import catalogue

ROOT = Path(__file__).parent.parent
SHORT = ("--training.steps", "2", "--training.batch-size", "8")


def test_the_wheel_holds_the_experiments_that_have_names():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = wheel["targets"]["wheel"]["force-include"]
    files = {Path(entry.path).name for entry in catalogue.entries()}
    assert included == {f"experiments/{f}": f"aecore/experiments/files/{f}" for f in files}


def test_every_experiment_loads_by_its_name_and_says_what_it_is():
    names = [entry.name for entry in catalogue.entries()]
    assert {"denoise", "dejpeg", "upscale", "quickstart", "lfw-enhance", "pairs"} <= set(names)
    assert len(names) == len(set(names))
    for entry in catalogue.entries():
        assert isinstance(catalogue.load(entry.name).experiment, Experiment)
        assert entry.about.endswith(".")
    for other in ("photo-denoise", "photo_denoise"):
        assert catalogue.find(other) == catalogue.find("denoise")
    assert catalogue.load("fashion-mnist-blind").then is not None


def test_a_file_may_import_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    text = catalogue.find("quickstart").read_text()
    (tmp_path / "mine.py").write_text(f"{text}\nfrom a_neighbour import then\n")
    (tmp_path / "a_neighbour.py").write_text("def then(experiment):\n    import another\n")
    (tmp_path / "another.py").touch()
    definition = catalogue.load(str(tmp_path / "mine.py"))
    definition.then(definition.experiment)


def test_installed_files_come_before_a_folder_that_happens_to_be_called_experiments(
    tmp_path, monkeypatch
):
    text = catalogue.find("quickstart").read_text()
    (tmp_path / "only.py").write_text(text)
    monkeypatch.setattr(catalogue, "_INSTALLED", catalogue.epath.Path(tmp_path))
    assert [entry.name for entry in catalogue.entries()] == ["only"]


def test_train_lists_the_experiments_and_then_their_flags(capsys):
    status, output, _ = run(capsys, cli.run, "train", "--help")
    assert status == 0
    for entry in catalogue.entries():
        assert f"  {entry.name} " in output
        assert entry.about in output
    status, output, _ = run(capsys, cli.run, "train", "denoise", "--help")
    assert status == 0
    assert "usage: aecore train denoise" in output
    assert "--data" in output
    assert "--degradation.sigma" in output


@pytest.mark.every_room
def test_train_trains_an_experiment_on_the_data_that_are_named(pictures, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["fashion-mnist-denoise", "--data.dataset", "folder", "--data", str(pictures)]
    status, output, _ = run(capsys, cli.run, "train", *words, *SHORT, "--run-dir", str(run_dir))
    assert status == 0
    assert "2 steps" in output
    described = json.loads((run_dir / "experiment.json").read_text())
    assert described["data"]["data_dir"] == str(pictures)


def test_a_file_that_init_wrote_is_trained_and_then_calls_what_it_defines(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, cli.run, "init", "mine.py", "--experiment", "quickstart")[0] == 0
    text = Path("mine.py").read_text()
    assert 'name="mine"' in text
    compile(text, "mine.py", "exec")
    text += "\ndef then(experiment):\n    print('afterwards', experiment.name)\n"
    Path("mine.py").write_text(text)
    status, output, _ = run(capsys, cli.run, "train", "mine.py", *SHORT)
    assert status == 0
    assert output.endswith("afterwards mine\n")
    assert Path("runs/mine/summary.json").exists()


def test_a_new_file_keeps_all_but_the_docstring(tmp_path):
    without = tmp_path / "without.py"
    without.write_text("from aecore import Experiment\n")
    assert catalogue.template(str(without), tmp_path / "new.py").endswith(without.read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nonsense"], "nonsense is neither an experiment file that ends in .py nor one"),
        (["bench", "nonsense"], "nor one of bsrgan, dejpeg, denoise"),
        (["train", "{tmp}/empty.py"], "doesn't define `experiment`; `aecore init FILE` writes"),
        (["train", "quickstart", "--training.epochs", "0"], "training.epochs 0 is out of bounds"),
        (["train", "quickstart", "--data", "{tmp}"], "is not read by dataset sample; use"),
        (["init", "{tmp}/empty.py"], "exists; name another file"),
        (["init", "{tmp}/mine"], "doesn't end in .py"),
        (["init", "{tmp}/mine.py", "--experiment", "no"], "no is neither an experiment file"),
    ],
)
def test_wrong_names_get_one_line(words, message, tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    status, _, errors = run(capsys, cli.run, *(word.format(tmp=tmp_path) for word in words))
    assert status == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="missing.py does not exist"):
        catalogue.load(str(tmp_path / "missing.py"))
