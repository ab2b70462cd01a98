"""Throughput of an experiment's parts, in images a second, and how far it is from the limit.

Every measurement is repeated, in turns with the others of its table, after it has warmed up; the
medians are reported, with the lowest and highest.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aecore.config import Experiment
from aecore.data import sources
from aecore.data.batches import training_batches
from aecore.data.crops import Crops
from aecore.errors import ConfigError
from aecore.measuring import planning
from aecore.networks.network import Precision
from aecore.restoring.restorer import Restorer
from aecore.steps import hardware
from aecore.steps.devices import COMPILED_BY
from aecore.training import assembly, feeds
from aecore.training.assembly import Assembly

_FEEDS = {
    "stream": dict(feed="stream", degrade_on="host"),
    "stream, degraded on device": dict(feed="stream", degrade_on="device"),
    "resident": dict(feed="resident"),
}


_PICTURES = 64
"""Images that are restored."""


def take_turns(works: Mapping[str, Callable[[float], int]], seconds: float, repeats: int):
    """Measures each function `repeats` times, in turns, after a short one to warm up.

    Args:
      works: each is called with how long to work, and returns how many images it did.
      seconds: for each measurement.
      repeats: measurements of each.

    Returns:
      For each name, `median`, `lowest` and `highest` in images a second.
    """

    def rate(work, seconds):
        start = time.perf_counter()
        images = work(seconds)
        return images / (time.perf_counter() - start)

    for work in works.values():
        work(seconds / 4)
    rates = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rates[name].append(rate(work, seconds))
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in rates.items()
    }


def bench(experiment: Experiment, *, seconds: float = 2.0, repeats: int = 5) -> dict[str, Any]:
    """Measures an experiment on this machine's devices.

    Args:
      experiment: its data are loaded; nothing is written.
      seconds: how long each measurement lasts, about; at least one step.
      repeats: how often each is repeated.

    Returns:
      JSON values: `pipeline`, `step`, `loop`, `restore` and the `device`'s limits. Rates are in
      images a second over all devices.

    Raises:
      ConfigError: the settings don't fit the data or the devices, or a number is out of bounds.
      DataError: the data can't be loaded.
    """
    if not (isinstance(repeats, int) and repeats >= 1):
        raise ConfigError(f"repeats {repeats} is not possible; use 1 or more")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds {seconds} is not possible; use a number above 0")
    devices = assembly.devices(experiment.training)
    dataset = sources.load(experiment.data)
    examples = assembly.examples(experiment, dataset)
    pictures, _ = dataset.samples(_PICTURES)
    device = devices.mesh.devices.flat[0]
    limits: dict[Precision, hardware.Limits] = {
        precision: hardware.limits(device, precision) for precision in ("float32", "bfloat16")
    }
    return {
        "name": experiment.name,
        "device": device.device_kind,
        "devices": devices.device_count,
        "batch_size": experiment.training.batch_size,
        "jax": jax.__version__,
        "limits": {precision: dataclasses.asdict(limit) for precision, limit in limits.items()},
        "pipeline": take_turns(_pipelines(experiment, examples), seconds, repeats),
        "step": _steps(experiment, dataset.image_shape, limits, seconds, repeats),
        "loop": _loops(experiment, dataset.image_shape, examples, seconds, repeats),
        "restore": take_turns(_restoring(experiment, pictures), seconds, repeats),
    }


def _pipelines(
    experiment: Experiment, examples: np.ndarray | Crops
) -> dict[str, Callable[[float], int]]:
    """The input pipeline alone."""
    training = experiment.training

    def work(batches: Iterator, seconds: float) -> int:
        end, images = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            next(batches)
            images += training.batch_size
        return images

    return {
        name: functools.partial(
            work,
            training_batches(
                examples,
                degradation,
                batch_size=training.batch_size,
                seed=training.seed,
                flip=training.flip,
            ),
        )
        for name, degradation in (
            ("degraded on host", experiment.degradation),
            ("bytes", None),
        )
    }


def _steps(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    limits: Mapping[Precision, hardware.Limits],
    seconds: float,
    repeats: int,
) -> dict[str, Any]:
    """The training step alone, on one batch of random images that stays on the devices."""
    works, reports = {}, {}
    device_count = assembly.devices(experiment.training).device_count
    for form in COMPILED_BY:
        for precision in limits:
            devices = assembly.devices(experiment.training, form)
            name = f"{form} {precision}"
            assembled = assembly.assemble(
                experiment, image_shape, devices, 1, precision=precision, degrades_on_device=False
            )
            works[name] = one_batch(assembled)
            first, second = (_seconds(works[name]) for _ in range(2))
            needed = planning.plan_form(assembled, limits[precision], slices=1)
            reports[name] = {
                "compile_seconds": first - second,
                "flops_per_image": needed.flops_per_image,
                "bytes_per_image": needed.bytes_per_image,
                "peak_memory": needed.memory.total,
            }
    rates = take_turns(works, seconds, repeats)
    for name, report in reports.items():
        report["images_per_second"] = rates[name]
        limit = limits[name.split()[1]].flops
        if limit:
            done = rates[name]["median"] * report["flops_per_image"]
            report["share_of_matrix_rate"] = done / limit / device_count
    return reports


def one_batch(assembled: Assembly) -> Callable[[float], int]:
    """Training on one batch of pairs, again and again; it compiles when it is first called."""
    devices = assembled.devices
    step = devices.compile_train_step(assembled.train_step)
    random = np.random.default_rng(0)
    share = devices.share(assembled.batch_size)
    count = share.stop - share.start
    shapes = assembled.input_shape, assembled.image_shape
    batch = devices.shard_batch(
        tuple(random.random((count, *shape), np.float32) for shape in shapes)
    )
    state = jax.block_until_ready(devices.compile_create(assembled.create)())

    def work(seconds: float) -> int:
        nonlocal state
        end, images = time.perf_counter() + seconds, 0
        while not images or time.perf_counter() < end:
            # A few steps are under way at once, as in training.
            for _ in range(4):
                state, _ = step(state, batch)
                images += assembled.batch_size
            jax.block_until_ready(state)
        return images

    return work


def _seconds(work: Callable[[float], int]) -> float:
    """How long the least amount of some work takes."""
    start = time.perf_counter()
    work(0.0)
    return time.perf_counter() - start


def _loops(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    examples: np.ndarray | Crops,
    seconds: float,
    repeats: int,
) -> dict[str, Any]:
    """Training as it is, with each feed, without evaluation and saving; and on one batch."""
    works, waiting, reports = {}, {}, {}
    with contextlib.ExitStack() as at_end:
        for name, settings in _FEEDS.items():
            waiting[name] = []
            training = dataclasses.replace(experiment.training, **settings)
            chosen = dataclasses.replace(experiment, training=training)
            try:
                works[name] = _loop(chosen, image_shape, examples, waiting[name], at_end)
            except ConfigError as error:  # The devices can't hold the images.
                reports[name] = {"not_possible": str(error)}
        devices = assembly.devices(experiment.training)
        works["one batch"] = one_batch(
            assembly.assemble(experiment, image_shape, devices, 1, degrades_on_device=False)
        )
        rates = take_turns(works, seconds, repeats)
    for name, rate in rates.items():
        reports[name] = {
            "images_per_second": rate,
            "share_of_one_batch": rate["median"] / rates["one batch"]["median"],
        }
        if waiting.get(name):
            reports[name]["share_of_time_waiting_for_input"] = statistics.median(waiting[name])
    return reports


def _loop(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    examples: np.ndarray | Crops,
    waiting: list[float],
    at_end: contextlib.ExitStack,
) -> Callable[[float], int]:
    training = experiment.training
    devices = assembly.devices(training)
    assembled = assembly.assemble(
        experiment, image_shape, devices, training.last_step(len(examples))
    )
    feed = feeds.create(examples, experiment.degradation, training, assembled)
    at_end.callback(feed.close)
    state = devices.compile_create(assembled.create)()
    step = 0

    def work(seconds: float) -> int:
        nonlocal state, step
        first, waited, begin = step, feed.seconds_waited, time.perf_counter()
        while time.perf_counter() < begin + seconds:
            losses = []
            before, start = step, time.perf_counter()
            for _ in range(4):
                state, loss, count = feed.launch(state, step, 1 << 30)
                losses.append(loss)
                step += count
            jax.block_until_ready(losses)
            feed.seconds_per_step((time.perf_counter() - start) / (step - before))
        waiting.append((feed.seconds_waited - waited) / (time.perf_counter() - begin))
        return (step - first) * training.batch_size

    return work


def _restoring(experiment: Experiment, array: np.ndarray) -> dict[str, Callable[[float], int]]:
    """`Restorer` on uint8 images, one at a time and many."""
    devices = assembly.devices(experiment.training)
    parts = assembly.assemble(experiment, array.shape[1:], devices, last_step=1)
    restorer = Restorer.of(experiment.model, jax.jit(parts.create)().params)

    def work(images: np.ndarray, seconds: float) -> int:
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            restorer(images)
            count += len(images)
        return count

    return {
        f"{size} at a time": functools.partial(work, np.resize(array, (size, *array.shape[1:])))
        for size in (1, 64)
    }


def table(report: Mapping[str, Any]) -> str:
    """A report, for people."""
    lines = [
        f"{report['name']} on {report['devices']} x {report['device']}, "
        f"batch {report['batch_size']}, JAX {report['jax']}"
    ]
    for precision, limits in report["limits"].items():
        if limits["flops"]:
            line = f"matrix products in {precision}: {limits['flops'] / 1e9:,.0f} GFLOP/s"
            if limits["bandwidth"]:
                line += f"; memory: {limits['bandwidth'] / 1e9:,.0f} GB/s"
            lines.append(line)

    def section(title):
        lines.extend(["", f"{title:30}{'images/s':>12}{'lowest':>12}{'highest':>12}"])

    def row(name, rate, notes=""):
        numbers = "".join(
            f"{rate[key]:12,.4g}" if rate[key] < 100 else f"{rate[key]:12,.0f}"
            for key in ("median", "lowest", "highest")
        )
        lines.append(f"  {name:28}{numbers}{notes}")

    section("pipeline alone")
    for name, rate in report["pipeline"].items():
        row(name, rate)
    section("step alone")
    for name, step in report["step"].items():
        notes = f"   compiled in {step['compile_seconds']:.1f} s"
        if "share_of_matrix_rate" in step:
            notes += f", {step['share_of_matrix_rate']:.0%} of the matrix rate"
        notes += f", {step['peak_memory'] / 2**30:.2f} GiB on each device"
        row(name, step["images_per_second"], notes)
    costs = next(iter(report["step"].values()))
    lines.append(
        f"  {costs['flops_per_image'] / 1e9:,.4g} GFLOP and "
        f"{costs['bytes_per_image'] / 1e6:,.4g} MB an image, as XLA counts them"
    )
    section("whole loop")
    for name, loop in report["loop"].items():
        if "not_possible" in loop:
            lines.append(f"  {name:28}not possible: {loop['not_possible']}")
            continue
        notes = ""
        if name != "one batch":
            notes = f"   {loop['share_of_one_batch']:.0%} of one batch"
        if "share_of_time_waiting_for_input" in loop:
            notes += f", {loop['share_of_time_waiting_for_input']:.0%} waiting for input"
        row(name, loop["images_per_second"], notes)
    section("restore")
    for name, rate in report["restore"].items():
        row(name, rate)
    return "\n".join(lines)
