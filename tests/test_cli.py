import errno
import importlib.util
import json
import logging
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aecore import cli, interrupts, storage
from aecore.storage import explained, write_json


def run(capsys, function, *args):
    """Exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as exited:
        function(list(args))
    output = capsys.readouterr()
    return exited.value.code or 0, output.out, output.err


def test_restore_a_picture(trained, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "out.png"
    status, _, errors = run(
        capsys, cli.run, "restore", str(pictures / "0.png"), "-o", str(out), "-m", str(trained)
    )
    assert (status, errors) == (0, "")
    with Image.open(out) as restored, Image.open(pictures / "0.png") as original:
        assert (restored.size, restored.mode) == (original.size, original.mode)
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]


def test_evaluate_prints_the_scores(trained, capsys):
    status, output, _ = run(capsys, cli.run, "evaluate", str(trained))
    assert status == 0
    assert "degraded" in output
    assert "restored" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["restore", "{pictures}", "-o", "{tmp}/o", "-m", "{tmp}"], "has no checkpoints"),
        (["restore", "{pictures}", "-o", "{tmp}/o", "-m", "{tmp}/no"], "name a run directory"),
        (["restore", "-o", "{tmp}/o", "-m", "{trained}"], "no input"),
        (
            ["restore", "{pictures}", "-o", "{pictures}", "-m", "{trained}"],
            "would be overwritten",
        ),
        (["restore", "{pictures}/0.png", "-o", "", "-m", "{trained}"], "no output"),
        (
            ["restore", "{pictures}", "-o", "{tmp}/o", "-m", "{trained}", "--suffix", "/../x"],
            "contains a slash",
        ),
        (
            ["restore", "{pictures}/0.png", "-o", "{tmp}/o.xyz", "-m", "{trained}"],
            "can't be written with the ending '.xyz'; use .png",
        ),
        (
            ["restore", "{pictures}", "-o", "{tmp}/o.png", "-m", "{trained}"],
            "o.png would be one file, but the input may be several; name a folder instead",
        ),
        (
            ["restore", "{pictures}", "-o", "/dev/null/x", "-m", "{trained}"],
            "/dev/null is not a fold",
        ),
        (
            [
                "restore",
                "{pictures}/0.png",
                "-o",
                "{tmp}/o.png",
                "-m",
                "{trained}",
                "--report",
                "{pictures}/0.png",
            ],
            "is an input or an output; choose another report file",
        ),
        (
            [
                "restore",
                "{pictures}/0.png",
                "-o",
                "{tmp}/o.png",
                "-m",
                "{trained}",
                "--report",
                "{tmp}/none/report.json",
            ],
            "its folder is missing",
        ),
        (
            ["restore", "{pictures}/0.png", "-o", "{pictures}/1.png", "-m", "{trained}"],
            "1.png exists; use --if-exists skip or --if-exists overwrite",
        ),
        (
            ["restore", "{pictures}", "-o", "{tmp}/o", "-m", "{trained}", "--device", "tpu"],
            "there is no device 'tpu' here; use cpu, or leave it out",
        ),
        *(
            (
                ["restore", "{pictures}/0.png", "-o", "{tmp}/b.png", "-m", "{trained}", *words],
                "b.png is the whole name of the one output; leave out --suffix and --ext",
            )
            for words in (["--suffix", "_x"], ["--ext", "jpg"])
        ),
        (["export", "{trained}", "-o", "{tmp}"], "is a folder; name a file"),
        (
            ["export", "{trained}", "-o", "{tmp}/a.aecore", "--runtime", "{tmp}/a.tgz"],
            "--runtime is for --format web alone; leave it out",
        ),
        *(
            (
                ["export", "{trained}", "-o", "{tmp}/a.onnx", "--parameters", "bfloat16", *words],
                f"--parameters bfloat16 can't be had with --format {format}; leave it out",
            )
            for format, words in (
                ("onnx", []),
                ("safetensors", ["--format", "safetensors"]),
                ("web", ["--format", "web"]),
            )
        ),
        (["summary", "{tmp}"], "has no checkpoints"),
        (["evaluate", "{tmp}"], "has no checkpoints"),
        *(
            ([*words, "--json", "{tmp}/none/scores.json"], "scores.json can't be written: it is")
            for words in (
                ["evaluate", "{trained}"],
                ["bench", "quickstart"],
                ["plan", "quickstart", "--topology", "cpu"],
            )
        ),
        (
            ["evaluate", "{trained}", "--batch-size", "0"],
            "batch_size 0 is not possible; use 1 or more",
        ),
        (
            ["evaluate", "{trained}", "--degradation", "Downscale(2)"],
            "makes images 2 times smaller, the degradation of the training 1 times",
        ),
        (["evaluate", "{trained}", "--data", ""], "the name of a file or folder is empty"),
        (["evaluate", "{trained}", "--json", ""], "the name of a file or folder is empty"),
        (["evaluate", "{trained}", "--no-classical", "--methods", "median"], "contradict"),
        (
            ["evaluate", "{trained}", "--data", "{pictures}", "--pictures", "a.jpg"],
            "--pictures a.jpg is not named .png",
        ),
    ],
)
def test_wrong_usage_gets_one_line_and_status_2(trained, pictures, tmp_path, capsys, args, message):
    words = [a.format(tmp=tmp_path, trained=trained, pictures=pictures) for a in args]
    status, _, errors = run(capsys, cli.run, *words)
    assert status == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--degradation.sigma=-1"], "sigma -1.0 is out of bounds; use 0 <= sigma"),
        (["--training.epochs", "0"], "training.epochs 0 is out of bounds"),
        (["--model.features", "1000000000"], "NoiseReducer with features (1000000000,) needs"),
        (["--training.batch-size", "30"], "30 is not divisible by 8 devices; use 24 or 32"),
        (["--data.dataset", "nonsense"], "unknown dataset 'nonsense'"),
        (["--model.channels", "3"], "1 channel, the model NoiseReducer takes 3"),
        (["--data.data-dir", "{tmp}/none"], "is not a folder"),
        (["--data.data-dir", ""], "data.data_dir is empty"),
        (["--run-dir", ""], "run_dir is empty"),
        (["--model.features", "0"], "whole numbers of at least 1"),
        (["--run-dir", __file__], "can't be made"),
    ],
)
def test_experiments_refuse_wrong_settings_in_one_line(tiny, tmp_path, capsys, args, message):
    words = [word.format(tmp=tmp_path) for word in args]
    status, _, errors = run(capsys, lambda words: cli.main(tiny, words), *words)
    assert status == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_an_experiment_ends_with_the_command_to_try_next(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(tiny, ["--run-dir", "my run"])
    output, errors = capsys.readouterr()
    # Without a terminal, the progress bar is one of lines.
    assert "\nepoch 1/" in f"\n{errors}"
    assert "\r" not in errors
    assert "degraded" in output
    words = shlex.split(output.split("Next: aecore ")[1])
    status, _, _ = run(capsys, cli.run, *words)
    assert status == 0
    assert np.asarray(Image.open(tmp_path / "restored.png")).shape == (16, 16)


def test_a_file_whose_name_begins_with_a_dash(trained, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["-o", "out.png", "-m", str(trained)]
    _, _, errors = run(capsys, cli.run, "restore", "-dash.png", *words)
    assert "-dash.png is not an option of this command; see --help" in errors
    shutil.copy(pictures / "0.png", "-dash.png")
    status, _, errors = run(capsys, cli.run, "restore", "-dash.png", *words)
    assert status == 2
    assert "-dash.png is not an option of this command; for the file, write ./-dash.png" in errors
    assert run(capsys, cli.run, "restore", "./-dash.png", *words)[0] == 0


@pytest.mark.parametrize(
    ("name", "format", "ending"),
    [
        ("victim.png", "auto", ".aecore"),
        ("victim", "weights", ".aecore"),
        ("victim.aecore", "onnx", ".onnx"),
        ("victim.onnx", "stablehlo", ".aecore"),
    ],
)
def test_an_export_replaces_no_file_of_another_kind(
    trained, tmp_path, capsys, name, format, ending
):
    path = tmp_path / name
    path.write_text("mine")
    words = ["export", str(trained), "-o", str(path), "--format", format]
    status, _, errors = run(capsys, cli.run, *words)
    assert (status, path.read_text()) == (2, "mine")
    assert f"{path} exists and doesn't end in {ending}; name another file" in errors


def test_an_export_replaces_its_like_and_may_have_any_new_name(trained, tmp_path, capsys):
    (tmp_path / "old.aecore").write_text("old")
    for name in ("old.aecore", "new.txt"):
        words = ["export", str(trained), "-o", str(tmp_path / name), "--format", "weights"]
        assert run(capsys, cli.run, *words)[0] == 0
        assert (tmp_path / name).stat().st_size > 100


def seconds(statement):
    best = np.inf
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        best = min(best, time.perf_counter() - start)
    return best


def test_importing_aecore_is_light():
    heavy = "{'tensorflow', 'tensorflow_datasets', 'matplotlib', 'orbax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, aecore; assert not {heavy}"], check=True)
    assert seconds("import aecore") < 1.5 * seconds("import jax, flax")


def test_restoring_does_not_need_tensorflow(trained, pictures, tmp_path):
    hidden = "import sys; sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None; "
    out = tmp_path / "out.png"
    words = ["restore", str(pictures / "0.png"), "-o", str(out), "-m", str(trained)]
    subprocess.run(
        [sys.executable, "-c", f"{hidden}from aecore import cli; cli.run({words})"], check=True
    )
    assert out.exists()
    evaluation = f"import aecore; aecore.evaluate({str(trained)!r})"
    subprocess.run([sys.executable, "-c", hidden + evaluation], check=True)


def test_crops_of_photographs_on_the_device_do_not_need_tensorflow(tmp_path):
    random = np.random.default_rng(0)
    for index in range(6):
        pixels = random.integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    code = f"""
import sys
sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None
import aecore
from aecore.degradations import JPEG
from aecore.models import UNet
aecore.train(aecore.Experiment(
    "jpeg", UNet((4,), channels=3), JPEG(50), aecore.Data("folder", {str(tmp_path)!r}, crop=16),
    training=aecore.Training(batch_size=2, epochs=1, feed="resident", devices=1),
    run_dir={str(tmp_path)!r},
), progress=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "summary.json").exists()


def test_experiments_are_importable_and_valid():
    folder = Path(__file__).parent.parent / "experiments"
    for path in folder.glob("*.py"):
        runpy.run_path(str(path), run_name=path.stem)


def test_a_report_may_go_to_a_device(capfd):
    write_json("/dev/stderr", {"a": 1})
    assert json.loads(capfd.readouterr().err) == {"a": 1}


@pytest.mark.parametrize("device", ["/dev/stdout", "/dev/fd/1"])
def test_a_report_follows_what_was_printed_into_the_file_that_stdout_is(device, tmp_path):
    text = f"from aecore import storage; print(1); storage.write_json({device!r}, 2); print(3)"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", text], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "1\n2\n3\n"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_a_report_on_a_disk_in_memory_is_replaced():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "report.json"
        for value in (1, 2):
            write_json(path, value)
        assert json.loads(path.read_text()) == 2


def test_a_report_may_hold_names_that_are_no_text(tmp_path):
    storage.write_report(tmp_path / "scores.csv", os.fsdecode(b"\xff.png,1"))
    assert (tmp_path / "scores.csv").read_bytes() == b"\xff.png,1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_scores_are_in_their_file_before_they_are_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: PTH123, SIM115
    path = tmp_path / "scores.json"
    with pytest.raises(OSError, match="standard output"):
        cli._show({"mse": 1.0}, str, path)
    assert json.loads(path.read_text()) == {"mse": 1.0}


@pytest.mark.parametrize("words", [["summary", "lfw-enhance"], ["train", "--help"]])
def test_commands_do_their_work_where_stdout_is_closed(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    status = None
    try:
        cli.run(words)
    except SystemExit as ended:
        status = ended.code
    assert not status
    assert capsys.readouterr().err == ""


def test_a_process_that_failed_among_others_ends_at_once(monkeypatch, capsys):
    # JAX would wait for the others.
    ended = []

    def end(status):
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(interrupts, "end_at_once", end)
    for error in (OSError(errno.EROFS, "Read-only", "run"), ZeroDivisionError("by zero")):
        with pytest.raises(SystemExit), cli._exit_status():
            raise error
    assert ended == [1, 1]
    errors = capsys.readouterr().err
    assert errors.startswith("error: run: Read-only\nTraceback")
    assert errors.rstrip().endswith("ZeroDivisionError: by zero")


def test_commands_to_copy_are_quoted(tiny, tmp_path, capsys):
    path = tmp_path / "my own.py"
    status, output, _ = run(capsys, cli.run, "init", str(path))
    assert status == 0
    assert output.endswith(f"aecore train '{path}'\n")


@pytest.mark.parametrize(("module", "is_remote"), [("gcsfs.core", True), ("requests", False)])
def test_an_error_is_blamed_on_a_bucket_only_if_it_comes_from_there(module, is_remote):
    raising = {"__name__": module}
    exec("def ask(): raise OSError('Forbidden')", raising)
    try:
        raising["ask"]()
    except OSError as error:
        found = explained(error)
    assert (found or "").startswith("the address can't be reached") == is_remote


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("gs", "gcsfs: pip install 'aecore[gcs]'"), ("s3", "s3fs: pip install s3fs")],
)
def test_an_address_without_the_package_that_reads_it_names_the_package(
    scheme, package, tmp_path, capsys, monkeypatch
):
    storage._prepare.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source, target = f"{scheme}://bucket/a.png", str(tmp_path / "out.png")
    status, _, errors = run(capsys, cli.run, "restore", source, "-o", target, "-m", "photo-denoise")
    assert (status, errors) == (2, f"error: {scheme}:// addresses need {package}\n")


def test_a_warning_that_nobody_can_read_ends_nothing(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger = logging.Logger("gone")
    logger.addHandler(cli._AboveBars())
    logger.warning("%d pictures", 3)
