"""What a training step needs on devices, which need not be there, from compiling it for them."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from aecore import memory as memory_limits
from aecore.config import Experiment
from aecore.errors import ConfigError
from aecore.measuring import hardware
from aecore.steps.devices import COMPILED_BY, Devices
from aecore.terminal import silent_stderr
from aecore.training import assembly
from aecore.training.assembly import Assembly

_LARGEST_BATCH = 2**16
"""Images a device; where more than this would fit, memory is not what limits a batch."""


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology.

    Args:
      topology: `cpu` or `gpu` for those of this machine; or a TPU slice such as `v5e:4x4`.

    Raises:
      ConfigError: there is no such topology, or no compiler for it.
    """
    if topology in ("cpu", "gpu"):
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise ConfigError(f"topology {topology}: {error}") from error
    from jax.experimental import topologies

    # Without it, libtpu asks Google Cloud's metadata server, and waits where there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling takes no TPU from a program that uses one, or that compiles too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with silent_stderr():
            slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        return list(slice_.devices)
    except Exception as error:  # Of many types, as libtpu is missing or refuses the name.
        raise ConfigError(
            f"topology {topology!r}: {error}; use cpu, gpu, or a TPU slice such as v5e:4x4, "
            'for which `pip install "aecore[tpu]"` installs the compiler'
        ) from error


def compile_step(assembled: Assembly) -> Any:
    """Compiles an experiment's training step; nothing is allocated.

    Returns:
      The compiled step, with `memory_analysis()`, `cost_analysis()` and `as_text()`.
    """
    devices = assembled.devices
    step = devices.compile_train_step(assembled.train_step)
    return step.lower(devices.abstract(assembled.create), assembled.abstract_batch()).compile()


def cost(assembled: Assembly) -> dict[str, float]:
    """Floating-point operations and bytes of memory traffic an image, as compiled by XLA.

    Returns:
      `flops` and `bytes`.
    """
    # XLA counts a loop's body once, so that a batch must not be divided into parts.
    compiled = compile_step(dataclasses.replace(assembled, parts=1))
    return _cost(compiled, assembled.batch_size // assembled.devices.device_count)


def _cost(compiled: Any, share: int) -> dict[str, float]:
    analysis = compiled.cost_analysis()
    return {"flops": analysis["flops"] / share, "bytes": analysis["bytes accessed"] / share}


def plan(
    experiment: Experiment, image_shape: tuple[int, int, int], topology: str
) -> dict[str, Any]:
    """What the training step needs on a topology, in each form.

    Args:
      experiment: what to train; a batch is rounded up to what the devices can divide.
      image_shape: height, width and channels.
      topology: as `devices_of` takes it.

    Returns:
      JSON values. Bytes and operations are per device, rates in images a second.

    Raises:
      ConfigError: there is no such topology.
    """
    devices = devices_of(topology)
    batch_size = Devices(devices).round_up(experiment.training.batch_size)
    share = batch_size // len(devices)
    limits = hardware.limits(devices[0], experiment.training.precision)
    forms = {}
    for form in COMPILED_BY:
        assembled = assembly.assemble(
            experiment, image_shape, COMPILED_BY[form](devices), 1, batch_size=batch_size
        )
        compiled = compile_step(assembled)
        collectives = _collectives(compiled.as_text(), len(devices))
        costs = cost(assembled) if assembled.parts > 1 else _cost(compiled, share)
        forms[form] = {
            "memory": _memory(compiled),
            **{f"{name}_per_image": value for name, value in costs.items()},
            "collectives": collectives,
            "roofline": _roofline(costs, collectives, share, len(devices), limits),
        }
    return {
        "name": experiment.name,
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": batch_size,
        "images_per_device": share,
        "precision": experiment.training.precision,
        "limits": dataclasses.asdict(limits),
        "forms": forms,
        "largest_images_per_device": _largest(experiment, image_shape, devices, limits.memory),
    }


def _memory(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    # Results share the memory of the arguments that were donated for them.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes + outputs,
        "code": analysis.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}


_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def _collectives(text: str, devices: int) -> dict[str, dict[str, int]]:
    """How many collective operations of each kind a program has, and the bytes they give."""
    found = {}
    for match in _COLLECTIVE.finditer(text) if devices > 1 else ():
        size = 0
        for dtype, dimensions in _ARRAY.findall(match["result"]):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
            size += math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
        entry = found.setdefault(match["kind"], {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def _roofline(
    costs: Mapping[str, float],
    collectives: Mapping[str, Mapping[str, int]],
    share: int,
    devices: int,
    limits: hardware.Limits,
) -> dict[str, Any] | None:
    """Images a second if the limit that binds were reached; the others cost nothing."""
    seconds = {}
    if limits.flops:
        seconds["operations"] = share * costs["flops"] / limits.flops
    if limits.bandwidth:
        seconds["memory bandwidth"] = share * costs["bytes"] / limits.bandwidth
    if limits.link and collectives:
        # In a ring, each device sends almost all of the result twice.
        size = sum(entry["bytes"] for entry in collectives.values())
        seconds["links between devices"] = 2 * size * (devices - 1) / devices / limits.link
    if not seconds:
        return None
    binding = max(seconds, key=lambda limit: seconds[limit])
    return {
        "seconds": seconds,
        "binding": binding,
        "images_per_second_per_device": share / seconds[binding],
        "images_per_second": devices * share / seconds[binding],
    }


def _largest(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    devices: list[Any],
    memory: int | None,
) -> int | None:
    """The most images a device whose step fits its memory, to an eighth."""
    if memory is None:
        return None

    @functools.cache
    def needed(share):
        form = COMPILED_BY[experiment.training.parallel](devices)
        assembled = assembly.assemble(
            experiment, image_shape, form, 1, batch_size=share * len(devices), parts=1
        )
        try:
            return _memory(compile_step(assembled))["total"]
        except jax.errors.JaxRuntimeError as error:
            if memory_limits.ran_out(error):
                return math.inf
            raise

    def fits(share):
        return needed(share) <= memory

    # Memory grows almost in proportion, so that two small steps tell where to begin.
    share = 8
    if fits(16):
        guess = 8 + (memory - needed(8)) / max((needed(16) - needed(8)) / 8, 1)
        share = int(min(max(8, guess), _LARGEST_BATCH)) // 8 * 8
    if fits(share):
        while share < _LARGEST_BATCH and fits(_larger(share)):
            share = _larger(share)
        return share
    while share > 1 and not fits(share):
        share = max(1, share * 7 // 8)
    return share if fits(share) else 0


def _larger(share: int) -> int:
    return min(_LARGEST_BATCH, max(share + 1, share * 9 // 8))


def table(plan: Mapping[str, Any]) -> str:
    """A plan, for people."""
    lines = [
        f"{plan['name']} on {plan['devices']} x {plan['device']} ({plan['topology']}), "
        f"{plan['precision']}",
        f"batch {plan['batch_size']:,}: {plan['images_per_device']:,} images a device",
        "",
        f"{'per device':24}" + "".join(f"{form:>20}" for form in plan["forms"]),
    ]

    def row(name, value):
        lines.append(f"{name:24}" + "".join(f"{value(f):>20}" for f in plan["forms"].values()))

    for name in ("arguments", "temporaries", "code", "total"):
        row(f"memory, {name}", lambda f, name=name: f"{f['memory'][name] / 2**20:,.1f} MiB")
    if plan["limits"]["memory"]:
        memory = plan["limits"]["memory"]
        row("share of its memory", lambda f: f"{f['memory']['total'] / memory:.1%}")
    row("operations an image", lambda f: f"{f['flops_per_image'] / 1e9:,.4g} GFLOP")
    row("bytes an image", lambda f: f"{f['bytes_per_image'] / 1e6:,.4g} MB")
    if plan["forms"]["jit"]["roofline"]:
        for limit in plan["forms"]["jit"]["roofline"]["seconds"]:
            row(
                f"{limit}, at least",
                lambda f, limit=limit: f"{f['roofline']['seconds'].get(limit, 0) * 1e3:,.4g} ms",
            )
        row("limited by", lambda f: f["roofline"]["binding"].split()[0])
        row(
            "images/s, at most",
            lambda f: f"{f['roofline']['images_per_second_per_device']:,.0f}",
        )
        row("of all devices", lambda f: f"{f['roofline']['images_per_second']:,.0f}")
    kinds = sorted({kind for form in plan["forms"].values() for kind in form["collectives"]})
    for kind in kinds:
        row(
            kind,
            lambda f, kind=kind: "{count} x, {kib:,.1f} KiB".format(
                count=f["collectives"].get(kind, {"count": 0})["count"],
                kib=f["collectives"].get(kind, {"bytes": 0})["bytes"] / 2**10,
            ),
        )
    largest = plan["largest_images_per_device"]
    lines += ["", f"largest batch that fits: {largest:,} images a device"] if largest else []
    return "\n".join(lines)
