"""`aecore bench`, `aecore plan`, and what they would notice: overhead and compiling again."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.experimental import topologies

import aecore
from aecore import cli
from aecore.degradations import GaussianNoise, Pixelate
from aecore.errors import ConfigError
from aecore.measuring import planning
from aecore.models import NoiseReducer, ResolutionEnhancer
from aecore.steps.devices import COMPILED_BY
from aecore.training import assembly

EXPERIMENT = str(Path(__file__).with_name("tiny_experiment.py"))


def aecore_command(*args):
    """The exit status of the `aecore` command."""
    with pytest.raises(SystemExit) as exit:
        cli.run([str(arg) for arg in args])
    return exit.value.code


def test_bench(tmp_path, capsys):
    file = tmp_path / "bench.json"
    flags = ["--training.batch-size", "16", "--training.devices", "2", "--model.features", "2"]
    options = ["--json", file, "--seconds", "0.05", "--repeats", "2"]
    assert aecore_command("bench", EXPERIMENT, *options, *flags) == 0
    report = json.loads(file.read_text())
    assert report["devices"] == 2
    assert report["batch_size"] == 16
    assert set(report["step"]) == {
        f"{form} {precision}" for form in ("jit", "pmap") for precision in ("float32", "bfloat16")
    }
    for step in report["step"].values():
        assert step["compile_seconds"] > 0
        assert step["share_of_matrix_rate"] > 0
        # Forwards alone, the two large layers make 9 * 196 * 2 * (2 + 4) products, and sums.
        assert step["flops_per_image"] > 2 * 9 * 196 * 2 * 6
    rates = [
        *report["pipeline"].values(),
        *report["restore"].values(),
        *(
            entry["images_per_second"]
            for entry in (*report["step"].values(), *report["loop"].values())
        ),
    ]
    assert all(0 < rate["lowest"] <= rate["median"] <= rate["highest"] for rate in rates)
    assert report["loop"]["resident"]["share_of_time_waiting_for_input"] == 0
    out = capsys.readouterr().out
    for title in ("pipeline alone", "step alone", "whole loop", "restore"):
        assert title in out


def test_plan_for_this_machine(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert aecore_command("plan", EXPERIMENT, "--topology", "cpu", "--json", file) == 0
    plan = json.loads(file.read_text())
    assert plan["devices"] == 8
    assert plan["images_per_device"] == 8
    for form in plan["forms"].values():
        # 3,217 parameters, two moments of each, and a loss, are averaged or held.
        assert form["memory"]["arguments"] > 3 * 4 * 3217
        reduced = form["collectives"]["all-reduce"]["bytes"]
        assert 4 * 3217 <= reduced <= 4 * 3217 + 64
    assert plan["largest_images_per_device"] > 1000
    assert "all-reduce" in capsys.readouterr().out


def test_a_plan_rounds_the_batch_up():
    experiment = aecore.Experiment(
        name="odd",
        model=NoiseReducer((2,)),
        degradation=GaussianNoise(0.4),
        training=aecore.Training(batch_size=30),
    )
    assert planning.plan(experiment, (12, 12, 1), "cpu")["batch_size"] == 32


def test_largest_batch_is_found_by_search():
    experiment = aecore.Experiment(
        name="limit", model=NoiseReducer((2,)), degradation=GaussianNoise(0.4)
    )
    device = planning.devices_of("cpu")[:1]
    assembled = assembly.assemble(
        experiment, (12, 12, 1), COMPILED_BY["jit"](device), 1, batch_size=100, parts=1
    )
    memory = planning._memory(planning.compile_step(assembled))["total"]
    largest = planning._largest(experiment, (12, 12, 1), device, memory)
    assert 87 <= largest <= 113


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("form", ["jit", "pmap"])
@pytest.mark.parametrize(
    ("model", "degradation", "shape", "topology"),
    [
        (NoiseReducer(), GaussianNoise(0.4), (28, 28, 1), "v5e:2x2"),
        (ResolutionEnhancer(), Pixelate(0.4), (80, 80, 3), "v5e:2x2"),
        # Of four hosts, for which pmap makes another function.
        (NoiseReducer((4,)), GaussianNoise(0.4), (28, 28, 1), "v5e:4x4"),
    ],
    ids=["denoise", "enhance", "hosts"],
)
def test_the_step_compiles_for_tpus(model, degradation, shape, topology, form):
    experiment = aecore.Experiment(
        name="tpu",
        model=model,
        degradation=degradation,
        training=aecore.Training(batch_size=16, parallel=form, degrade_on="device"),
    )
    devices = planning.devices_of(topology)
    assembled = assembly.assemble(experiment, shape, COMPILED_BY[form](devices), last_step=1)
    compiled = planning.compile_step(assembled)
    assert "all-reduce" in planning._collectives(compiled.as_text(), len(devices))
    assert planning._memory(compiled)["total"] < 2**30


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", EXPERIMENT, "--topology", "v99:2x2"], "v99:2x2"),
        (["bench", EXPERIMENT, "--repeats", "0"], "repeats 0 is not possible"),
        (["bench", EXPERIMENT, "--seconds", "nan"], "seconds nan is not possible"),
        (["plan", "nowhere.py", "--topology", "cpu"], "nowhere.py is not a file"),
        (["bench", cli.__file__], "doesn't define `experiment`"),
        (["evaluate", "runs/none", "--training.seed", "1"], "--training.seed is not an option of this command"),
    ],
)
def test_wrong_usage_is_one_line(args, message, capsys):
    assert aecore_command(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_topology_without_its_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("libtpu is not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match="aecore\\[tpu\\]"):
        planning.devices_of("v5e:2x2")


def test_a_step_costs_the_host_less_than_a_millisecond(tmp_path, capfd):
    rates = []
    for attempt in range(3):  # This machine may be doing other things.
        experiment = aecore.Experiment(
            name="overhead",
            model=NoiseReducer((1,)),
            degradation=Pixelate(0.5),
            data=aecore.Data(dataset="sample"),
            training=aecore.Training(batch_size=1, steps=4000, checkpoint_every=4000, devices=1),
            run_dir=str(tmp_path / f"run{attempt}"),
        )
        rates.append(aecore.train(experiment)["images_per_second"])
        if rates[-1] >= 1000:
            break
    assert "images/s" in capfd.readouterr().err
    assert max(rates) >= 1000


def test_a_restart_compiles_nothing_anew(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    kept = []
    for steps in ("3", "6"):
        flags = ["--run-dir", str(tmp_path / "run"), "--training.steps", steps]
        flags += ["--training.feed", "resident"]  # Which starts sooner.
        command = [sys.executable, EXPERIMENT, *flags]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        files = (tmp_path / "cache" / "aecore" / "jax").iterdir()
        kept.append({file.name for file in files if file.name.endswith("-cache")})
    assert kept[0]
    assert kept[1] == kept[0]
