"""Images per second of an experiment's parts on this machine, next to what its devices allow.

Each measurement warms up first, and is then repeated in turns with the others of its table. The
median is reported, with the lowest and highest.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aecore.config import Experiment, with_training
from aecore.data import sources
from aecore.data.batches import training_batches
from aecore.errors import ConfigError
from aecore.measuring import hardware, planning
from aecore.restoring.restorer import Restorer
from aecore.steps.devices import FORMS, DataParallel
from aecore.steps.step import pairs
from aecore.training import assembly, feeds
from aecore.training.assembly import Assembly

_FEEDS = {
    "stream": dict(feed="stream", degrade_on="host"),
    "stream, degraded on device": dict(feed="stream", degrade_on="device"),
    "resident": dict(feed="resident"),
}


def take_turns(
    works: Mapping[str, Callable[[float], int]], seconds: float, repeats: int
) -> dict[str, dict[str, float]]:
    """Measures functions `repeats` times each, in turns, after a short call to warm up.

    Args:
      works: functions that work for about the given seconds, and return how many images they did.
      seconds: of each measurement.
      repeats: measurements of each function.

    Returns:
      For each name, `median`, `lowest` and `highest` in images per second.
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
      experiment: what to measure; its data are loaded, and nothing is written.
      seconds: about how long each measurement lasts; at least one step is done.
      repeats: how often each measurement is repeated.

    Returns:
      JSON values: `pipeline`, `step`, `loop`, `restore` and the device's `limits`. Rates are in
      images per second over all devices.

    Raises:
      ConfigError: the settings don't fit the data or the devices, or there is nothing to measure.
      DataError: the data can't be loaded.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(
            f"seconds {seconds} is no time to measure for; use more than 0, such as 2"
        )
    if repeats < 1:
        raise ConfigError(f"repeats {repeats} leaves nothing to measure; use 1 or more")
    devices = assembly.devices(experiment.training)
    dataset = sources.load(experiment.data)
    experiment.check_images(*dataset.image_shape)
    device = devices.mesh.devices.flat[0]
    limits = {
        precision: hardware.limits(device, precision) for precision in ("float32", "bfloat16")
    }
    return {
        "name": experiment.name,
        "device": device.device_kind,
        "devices": devices.device_count,
        "batch_size": experiment.training.batch_size,
        "jax": jax.__version__,
        "limits": {precision: dataclasses.asdict(limit) for precision, limit in limits.items()},
        "pipeline": take_turns(_pipelines(experiment, dataset.train), seconds, repeats),
        "step": _steps(experiment, dataset.image_shape, limits, seconds, repeats),
        "loop": _loops(experiment, dataset.train, seconds, repeats),
        "restore": take_turns(_restoring(experiment, dataset.validation), seconds, repeats),
    }


def _pipelines(experiment: Experiment, array: np.ndarray) -> dict[str, Callable[[float], int]]:
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
                array,
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
    limits: Mapping[str, hardware.Limits],
    seconds: float,
    repeats: int,
) -> dict[str, Any]:
    """The training step alone, on one batch of random images that stays on the devices."""
    works, reports = {}, {}
    devices = assembly.devices(experiment.training)
    for form in FORMS:
        for precision in limits:
            chosen = with_training(experiment, parallel=form, precision=precision)
            name = f"{form} {precision}"
            works[name] = one_batch(chosen, image_shape)
            first, second = (_seconds(works[name]) for _ in range(2))
            costs = planning.cost(chosen, image_shape, list(devices.mesh.devices.flat))
            reports[name] = {
                "compile_seconds": first - second,
                "flops_per_image": costs.flops,
                "bytes_per_image": costs.bytes,
                "peak_memory": _peak_memory(devices),
            }
    rates = take_turns(works, seconds, repeats)
    for name, report in reports.items():
        report["images_per_second"] = rates[name]
        limit = limits[name.split()[1]].flops
        if limit:
            done = rates[name]["median"] * report["flops_per_image"]
            report["share_of_matrix_rate"] = done / limit / devices.device_count
    return reports


def one_batch(experiment: Experiment, image_shape: tuple[int, int, int]) -> Callable[[float], int]:
    """Repeated training steps on one batch; the first call compiles them."""
    training = experiment.training
    devices, parts = _assemble(experiment, image_shape)
    step = devices.compile_train_step(functools.partial(parts.train_step, prepare=pairs))
    random = np.random.default_rng(0)
    share = devices.share(training.batch_size)
    shape = (share.stop - share.start, *image_shape)
    batch = devices.place_batch(
        (random.random(shape, np.float32), random.random(shape, np.float32))
    )
    state = jax.block_until_ready(devices.compile_create(parts.create)())

    def work(seconds: float) -> int:
        nonlocal state
        end, images = time.perf_counter() + seconds, 0
        while not images or time.perf_counter() < end:
            losses = []
            # A few steps are under way at once, as in training.
            for _ in range(4):
                state, loss = step(state, batch)
                losses.append(loss)
                images += training.batch_size
            jax.block_until_ready(losses)
        return images

    return work


def _assemble(
    experiment: Experiment, image_shape: tuple[int, ...], last_step: int = 1
) -> tuple[DataParallel, Assembly]:
    devices = assembly.devices(experiment.training)
    height, width, channels = image_shape
    return devices, assembly.assemble(experiment, (height, width, channels), devices, last_step)


def _seconds(work: Callable[[float], int]) -> float:
    """How long the shortest possible piece of work takes."""
    start = time.perf_counter()
    work(0.0)
    return time.perf_counter() - start


def _peak_memory(devices: DataParallel) -> int | None:
    """The most bytes in use on a device so far; None if the device doesn't count them."""
    statistics = devices.mesh.local_devices[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")


def _loops(
    experiment: Experiment, array: np.ndarray, seconds: float, repeats: int
) -> dict[str, Any]:
    """The training loop with each feed, without evaluation and saving; and steps on one batch."""
    works, waiting = {}, {}
    for name, settings in _FEEDS.items():
        waiting[name] = []
        works[name] = _loop(with_training(experiment, **settings), array, waiting[name])
    works["one batch"] = one_batch(experiment, array.shape[1:])
    rates = take_turns(works, seconds, repeats)
    reports = {}
    for name, rate in rates.items():
        reports[name] = {
            "images_per_second": rate,
            "share_of_one_batch": rate["median"] / rates["one batch"]["median"],
        }
        if waiting.get(name):
            reports[name]["share_of_time_waiting_for_input"] = statistics.median(waiting[name])
    return reports


def _loop(
    experiment: Experiment, array: np.ndarray, waiting: list[float]
) -> Callable[[float], int]:
    training = experiment.training
    devices, parts = _assemble(experiment, array.shape[1:], training.last_step(len(array)))
    feed = feeds.create(array, experiment.degradation, training, devices, parts.train_step)
    state = devices.compile_create(parts.create)()
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
    """`Restorer` on uint8 images, one per call and many per call."""
    _, parts = _assemble(experiment, array.shape[1:])
    restorer = Restorer(experiment.model, jax.jit(parts.create)().params, {})

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
    """A report as text for people."""
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
        if step["peak_memory"]:
            notes += f", {step['peak_memory'] / 2**30:.2f} GiB at most"
        row(name, step["images_per_second"], notes)
    costs = next(iter(report["step"].values()))
    lines.append(
        f"  {costs['flops_per_image'] / 1e9:,.4g} GFLOP and "
        f"{costs['bytes_per_image'] / 1e6:,.4g} MB per image, as XLA counts them"
    )
    section("whole loop")
    for name, loop in report["loop"].items():
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
