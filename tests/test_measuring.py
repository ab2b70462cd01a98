"""`aecore bench`, `aecore plan`, and what they would show: overhead and repeated compiling."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

import aecore
from aecore import cli
from aecore.degradations import GaussianNoise, Pixelate
from aecore.errors import ConfigError
from aecore.measuring import benchmarking, estimates, planning
from aecore.models import NoiseReducer, ResolutionEnhancer
from aecore.steps import hardware, memory
from aecore.steps.devices import COMPILED_BY
from aecore.training import assembly

EXPERIMENT = str(Path(__file__).with_name("tiny_experiment.py"))

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


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
        # 225 parameters and two moments of each, and a batch with what is made of it.
        assert 3 * 4 * 225 < step["peak_memory"] < 2**24
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


def test_bench_goes_on_where_the_devices_cannot_hold_the_images(tiny, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda device: 1000)
    examples = np.zeros((34, 16, 16, 1), np.uint8)
    loops = benchmarking._loops(tiny, (16, 16, 1), examples, seconds=0.02, repeats=1)
    assert loops["stream"]["images_per_second"]["median"] > 0
    assert "use --training.feed stream" in loops["resident"]["not_possible"]


def test_bench_refuses_a_batch_that_the_images_cannot_fill(tiny):
    training = dataclasses.replace(tiny.training, batch_size=64)
    with pytest.raises(ConfigError, match="batch_size 64 is more than the 34 training images"):
        benchmarking.bench(dataclasses.replace(tiny, training=training))


def test_plan_for_this_machine(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert aecore_command("plan", EXPERIMENT, "--topology", "cpu", "--json", file) == 0
    plan = json.loads(file.read_text())
    assert plan["devices"] == 8
    assert plan["images_per_device"] == 8
    for form in plan["forms"].values():
        # 225 parameters, two moments of each, and a loss, are averaged or held.
        assert form["memory"]["arguments"] > 3 * 4 * 225
        reduced = form["collectives"]["all-reduce"]["bytes"]
        assert 4 * 225 <= reduced <= 4 * 225 + 64
    assert plan["largest_images_per_device"] > 1000
    assert "all-reduce" in capsys.readouterr().out


@pytest.mark.every_room
def test_a_plan_rounds_the_batch_up():
    experiment = aecore.Experiment(
        name="odd",
        model=NoiseReducer((2,)),
        degradation=GaussianNoise(0.4),
        training=aecore.Training(batch_size=30),
    )
    assert planning.plan(experiment, "cpu").batch_size == 32


def test_a_plan_shows_the_first_figures_before_it_goes_on():
    experiment = aecore.Experiment(
        name="first",
        model=NoiseReducer((2,)),
        degradation=GaussianNoise(0.4),
        training=aecore.Training(parallel="pmap"),
    )
    said = []
    planning.plan(experiment, "cpu", show=said.append, progress=said.append)
    assert said[1] == "compiling the training step with pmap"
    assert "memory, total" in said[2]
    assert said[3] == "compiling the training step with jit"
    assert "memory, total" in said[4]
    assert said[5].startswith("searching the largest batch")
    assert "largest batch that fits" in said[-1]


def test_largest_batch_is_found_by_search():
    experiment = aecore.Experiment(
        name="limit", model=NoiseReducer((2,)), degradation=GaussianNoise(0.4)
    )
    device = planning.devices_of("cpu")[:1]
    assembled = assembly.assemble(
        experiment, (12, 12, 1), COMPILED_BY["jit"](device), 1, batch_size=100, parts=1
    )
    memory = planning.memory_of(planning.compile_step(assembled)).total
    largest = planning.largest_batch(experiment, (12, 12, 1), device, memory)
    assert 87 <= largest <= 113


@pytest.mark.parametrize("most", [0, 3, 8, 16, 100, 5_000, 2**16])
@pytest.mark.parametrize("fails", [False, True])
def test_largest_batch_is_found_with_few_compilations(most, fails, monkeypatch):
    tried = []

    def compiled(assembled):
        tried.append(assembled.batch_size)
        if fails and tried[-1] > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        # A part that does not grow, and one that grows a little faster than the batch.
        needed = int(100 + tried[-1] ** 1.05)
        return SimpleNamespace(total=needed)

    monkeypatch.setattr(planning, "compile_step", compiled)
    monkeypatch.setattr(planning, "memory_of", lambda compiled: compiled)
    experiment = aecore.Experiment(
        name="limit", model=NoiseReducer((2,)), degradation=GaussianNoise(0.4)
    )
    device = planning.devices_of("cpu")[:1]
    largest = planning.largest_batch(experiment, (12, 12, 1), device, int(100 + most**1.05))
    assert most * 8 // 9 - 1 <= largest <= most
    assert len(tried) <= (20 if fails else 9)


@needs_libtpu
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
    assert "all-reduce" in planning.exchanges(compiled.as_text(), len(devices))
    assert planning.memory_of(compiled).total < 2**30


def test_exchanges_between_slices_are_counted():
    # As compiled for two slices of TPU v5e, but shorter.
    text = """
  %reduce-scatter.1 = f32[128,512]{1,0:T(8,128)} reduce-scatter(%fusion.1), channel_id=1
  %send = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast, %after-all), channel_id=2,\
 is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %all-gather.6 = f32[512,512]{1,0:T(8,128)S(1)} all-gather(%bitcast.1), channel_id=1
"""
    part = 4 * 64 * 8 * 128
    assert planning.exchanges(text, 8) == {
        "reduce-scatter": planning.Collectives(1, part),
        "all-reduce between slices": planning.Collectives(1, part),
        "all-gather": planning.Collectives(1, 4 * part),
    }


@needs_libtpu
def test_a_plan_for_several_slices_says_what_the_network_costs(capsys):
    assert aecore_command("plan", EXPERIMENT, "--topology", "v5e:2x2", "--slices", "2") == 0
    out = capsys.readouterr().out
    assert "8 x TPU v5 lite (2 slices of v5e:2x2)" in out
    assert out.count("all-reduce between slices") == 2
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    kibibytes = float(rows["all-reduce between slices"][0])
    # At least a quarter of the bytes of 225 gradients from each device of a slice.
    assert kibibytes * 2**10 > 225
    milliseconds = float(rows["network between slices"][0])
    assert milliseconds == pytest.approx(kibibytes * 2**10 / 3.125e9 * 1e3, rel=0.01)
    assert rows["exchange, share of a step"][0].endswith("%")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", EXPERIMENT, "--topology", "cpu", "--slices", "2"], "leave --slices out"),
        (["plan", EXPERIMENT, "--topology", "v5e:2x2", "--slices", "0"], "use 1 or more"),
        (["plan", EXPERIMENT, "--topology", "v99:2x2"], "v99:2x2"),
        (
            ["plan", EXPERIMENT, "--topology", "v5e"],
            "topology 'v5e' is unknown; use cpu, gpu, or a",
        ),
        (["plan", "nowhere.py", "--topology", "cpu"], "nowhere.py does not exist; name a file"),
        (["bench", cli.__file__], "doesn't define `experiment`"),
        (["bench", EXPERIMENT, "--repeats", "0"], "repeats 0"),
        (["bench", EXPERIMENT, "--seconds", "-1"], "seconds -1"),
        (["bench", EXPERIMENT, "--seconds", "nan"], "seconds nan"),
        (["bench", EXPERIMENT, "--seconds", "inf"], "seconds inf"),
        (
            ["evaluate", "runs/none", "--training.seed", "1"],
            "--training.seed is not an option of this command",
        ),
    ],
)
def test_wrong_usage_is_one_line(args, message, capsys):
    assert aecore_command(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "chip", "devices"),
    [
        ("TPU v2", pltpu.ChipVersion.TPU_V2, 2),
        ("TPU v3", pltpu.ChipVersion.TPU_V3, 2),
        ("TPU v4", pltpu.ChipVersion.TPU_V4, 1),
        ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E, 1),
        ("TPU v5", pltpu.ChipVersion.TPU_V5P, 1),
        ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E, 1),
        ("TPU7x", pltpu.ChipVersion.TPU_7X, 2),
    ],
)
def test_limits_are_those_of_a_device(kind, chip, devices):
    cores = chip.num_physical_tensor_cores_per_chip // devices
    core = pltpu.get_tpu_info_for_chip(chip, cores)
    limits = hardware.limits(SimpleNamespace(platform="tpu", device_kind=kind), "bfloat16")
    # Rounded differently, but far from twice or half as much.
    assert limits.flops == pytest.approx(cores * core.bf16_ops_per_second, rel=0.15)
    assert limits.bandwidth == pytest.approx(cores * core.mem_bw_bytes_per_second, rel=0.15)
    assert limits.memory == pytest.approx(cores * core.hbm_capacity_bytes, rel=0.1)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v2:2x2", 8),
        ("v3:2x2", 8),
        ("v4:2x2x1", 4),
        ("v5e:2x2", 4),
        ("v5p:2x2x1", 4),
        ("v6e:2x2", 4),
        ("tpu7x:2x2x1", 8),
    ],
)
def test_clock_rates_fit_the_matrix_rates(topology, devices):
    found = planning.devices_of(topology)
    assert len(found) == devices
    limits = hardware.limits(found[0], "bfloat16")
    size = 4096
    matrix = jax.ShapeDtypeStruct(
        (size, size), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(found[0])
    )
    text = jax.jit(jnp.matmul).lower(matrix, matrix).compile().as_text()
    estimate = estimates.estimate(text, images=1, clock=limits.clock, at_most=None)
    # A large product comes close to the rate, and can't exceed it.
    assert 0.75 < estimate.images_per_second_per_device * 2 * size**3 / limits.flops < 1


def test_the_compilers_estimate_is_added_up():
    # As compiled for TPU v5e, but shorter; with a loop, as where a batch is divided into parts.
    text = Path(__file__).with_name("tpu_program.txt").read_text()
    found = estimates.estimate(text, images=2, clock=1e6, at_most=4000)
    assert found.cycles_per_image == 500
    assert found.images_per_second_per_device == 2000
    assert found.share_of_limit == 0.5
    assert found.kinds == {
        "matrix products": 0.4,
        "reductions": 0.3,
        "copies": 0.17,
        "elementwise": 0.13,
    }
    assert found.no_arithmetic == 0.47
    assert [(cost.layer, cost.direction, cost.cycles_per_image) for cost in found.dearest] == [
        ("conv_0", "forward", 200),
        ("block/conv_0", "backward", 150),
        ("inputs", "other", 75),
        ("degradation and optimizer", "other", 50),
        ("loss", "forward", 15),
        ("Net.encode", "backward", 10),
    ]
    assert found.without_estimate == {"select-and-scatter": 1}
    assert found.loops == 1
    text = "\n".join(estimates.lines(found, devices=3))
    assert "6,000" in text
    assert "1 select-and-scatter" in text


def test_programs_without_cycles_have_no_estimate():
    text = jax.jit(jnp.tanh).lower(jnp.ones(8)).compile().as_text()
    assert estimates.estimate(text, images=1, clock=None, at_most=None) is None


@needs_libtpu
def test_the_estimate_of_a_divided_batch_is_that_of_the_whole():
    devices = planning.devices_of("v5e:2x2")
    plans = []
    for parts in (1, 2):
        experiment = aecore.Experiment(
            name="estimate",
            model=NoiseReducer((2,)),
            degradation=GaussianNoise(0.4),
            training=aecore.Training(batch_size=16, accumulation=parts),
        )
        limits = hardware.limits(devices[0], "float32")
        assembled = assembly.assemble(experiment, (12, 12, 1), COMPILED_BY["jit"](devices), 1)
        plans.append(planning.plan_form(assembled, limits, slices=1))
    whole, divided = (plan.estimate for plan in plans)
    assert divided == whole
    assert whole.loops == 0
    assert 0 < whole.share_of_limit < 1
    directions = {(cost.layer, cost.direction) for cost in whole.dearest}
    assert {("output", "forward"), ("output", "backward")} <= directions


def run_python(*args):
    """A Python process in which JAX has not been told which devices to use."""
    names = ("JAX_PLATFORMS", "TPU_", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    return subprocess.run(
        [sys.executable, *map(str, args)], env=environment, capture_output=True, text=True
    )


@needs_libtpu
def test_libtpu_prints_nothing(pictures, tmp_path):
    restored = tmp_path / "restored.png"
    model = ["-m", "fashion-mnist-denoise"]
    run = run_python("-m", "aecore", "restore", pictures / "0.png", "-o", restored, *model)
    assert run.returncode == 0
    assert run.stderr == ""
    run = run_python("-m", "aecore", "plan", EXPERIMENT, "--topology", "v99:2x2")
    assert run.returncode == 2
    assert run.stderr.startswith("error: topology 'v99:2x2'")
    assert len(run.stderr.splitlines()) == 1
    program = "from aecore.measuring import planning; print(len(planning.devices_of('v5e:2x2')))"
    run = run_python("-c", program)
    assert (run.stdout, run.stderr) == ("4\n", "")


@pytest.mark.parametrize(
    ("device", "is_quiet"),
    [("accel0", False), ("vfio/3", False), ("vfio/vfio", True), ("null", True)],
)
def test_libtpu_is_left_alone_where_there_may_be_a_tpu(tmp_path, monkeypatch, device, is_quiet):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    hardware.quiet_libtpu(device_files=tmp_path)
    assert ("TPU_ACCELERATOR_TYPE" in os.environ) == is_quiet
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


def test_a_topology_without_its_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("libtpu is not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match="aecore\\[tpu\\]"):
        planning.devices_of("v5e:2x2")


def test_a_step_costs_the_host_less_than_a_millisecond(tmp_path, capfd, monkeypatch):
    # The run's clock counts processor time of its own thread, not what else this machine does.
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    experiment = aecore.Experiment(
        name="overhead",
        model=NoiseReducer((1,)),
        degradation=Pixelate(0.5),
        data=aecore.Data(dataset="sample"),
        training=aecore.Training(batch_size=1, steps=4000, checkpoint_every=4000, devices=1),
        run_dir=str(tmp_path / "run"),
    )
    images_per_second = aecore.train(experiment)["images_per_second"]
    assert "images/s" in capfd.readouterr().err
    assert images_per_second >= 1000


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
