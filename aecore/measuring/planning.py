"""What a training step needs on devices, which need not exist, found by compiling it for them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from aecore.config import Experiment
from aecore.data import sources
from aecore.errors import ConfigError
from aecore.measuring import estimates
from aecore.measuring.estimates import Estimate
from aecore.steps import hardware
from aecore.steps import memory as memory_limits
from aecore.steps.devices import COMPILED_BY, Devices
from aecore.steps.hardware import Limits
from aecore.training import assembly
from aecore.training.assembly import Assembly

_LARGEST_BATCH = 2**16
"""Images per device at which the search ends: memory is then not what limits a batch."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled step needs on each device."""

    arguments: int
    temporaries: int
    """With the results that don't take the place of arguments."""
    code: int
    total: int


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What XLA counts for each image."""

    flops: float
    """Floating-point operations."""
    bytes: float
    """Bytes read from and written to memory."""


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The operations of one kind in which devices exchange data."""

    count: int
    bytes: int
    """Size of their results on each device."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The speed at which one limit of the devices is reached, if the others cost nothing."""

    seconds: dict[str, float]
    """The least time per step that each limit allows."""
    binding: str
    """The limit with the longest time."""
    images_per_second_per_device: float
    images_per_second: float


LINKS, NETWORK = "links between devices", "network between slices"
"""The limits on exchanging data."""


@dataclasses.dataclass(frozen=True)
class FormPlan:
    """What the training step needs in one compiled form."""

    memory: Memory
    flops_per_image: float
    bytes_per_image: float
    collectives: dict[str, Collectives]
    roofline: Roofline | None
    """None where no limit of the devices is known."""
    estimate: Estimate | None
    """None except for TPUs."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the training step needs on some devices. Bytes and operations are for each device."""

    name: str
    topology: str
    device: str
    slices: int
    devices: int
    """Of all slices."""
    batch_size: int
    images_per_device: int
    precision: str
    limits: Limits
    forms: dict[str, FormPlan]
    largest_images_per_device: int | None
    """The largest batch that fits; None where the devices' memory is not known."""


_TOPOLOGIES = "use cpu, gpu, or a TPU slice such as v5e:4x4 or tpu7x:2x2x1"


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a topology.

    Args:
      topology: `cpu` or `gpu` for those of this machine; or a TPU slice such as `v5e:4x4`.
      slices: how many such slices there are, connected by the data centre's network.

    Raises:
      ConfigError: there is no such topology, or no compiler for it.
    """
    if slices < 1:
        raise ConfigError(f"there can't be {slices} slices; use 1 or more")
    if topology in ("cpu", "gpu"):
        if slices > 1:
            raise ConfigError(f"topology {topology} has no slices; leave --slices out")
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise ConfigError(f"topology {topology}: {error}") from error
    if not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ConfigError(f"topology {topology!r} is unknown; {_TOPOLOGIES}")
    from jax.experimental import topologies

    hardware.quiet_libtpu(compiling_only=True)
    # JAX uses both cores of a TPU v4 as one device; the description's default is two devices.
    settings: dict[str, Any] = {}
    if topology.startswith("v4:"):
        settings["chip_config_name"] = "megacore"
    if slices > 1:
        settings["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **settings
        )
        return list(description.devices)
    except Exception as error:  # Of many types, as libtpu is missing or refuses the name.
        raise ConfigError(
            f"topology {topology!r}: {error}; {_TOPOLOGIES}, for which "
            '`pip install "aecore[tpu]"` installs the compiler'
        ) from error


def compile_step(assembled: Assembly) -> Any:
    """Compiles an experiment's training step; nothing is allocated, the devices need not exist.

    Returns:
      The compiled step, with `memory_analysis()`, `cost_analysis()` and `as_text()`.
    """
    step = assembled.devices.compile_train_step(assembled.train_step)
    return step.lower(assembled.abstract_state, assembled.abstract_batch()).compile()


def _cost(compiled: Any, share: int) -> StepCost:
    analysis = compiled.cost_analysis()
    return StepCost(analysis["flops"] / share, analysis["bytes accessed"] / share)


def _ignore(text: str) -> None:
    del text


def plan(
    experiment: Experiment,
    topology: str,
    *,
    slices: int = 1,
    show: Callable[[str], None] = _ignore,
    progress: Callable[[str], None] = _ignore,
) -> Plan:
    """Finds what the training step needs on a topology, in each compiled form.

    Args:
      experiment: what to train; its batch is rounded up to what the devices can divide. Its images
        are loaded only if its settings don't say how large they are.
      topology, slices: as `devices_of` takes them. The batch is spread over the devices of all
        slices.
      show: called with the parts of the plan as text for people, each as soon as it is known.
      progress: called with one line before each thing that takes long.

    Raises:
      ConfigError: there is no such topology.
    """
    devices = devices_of(topology, slices)
    image_shape = _image_shape(experiment)
    batch_size = Devices(devices).round_up(experiment.training.batch_size)
    share = batch_size // len(devices)
    training = experiment.training
    limits = hardware.limits(devices[0], training.precision)
    show(
        f"{experiment.name} on {len(devices)} x {devices[0].device_kind} "
        f"({f'{slices} slices of ' if slices > 1 else ''}{topology}), "
        f"{training.precision}\nbatch {batch_size:,}: {share:,} images per device"
    )
    forms = {}
    # The experiment's own form comes first, as compiling each may take minutes.
    for form in sorted(COMPILED_BY, key=lambda form: form != training.parallel):
        progress(f"compiling the training step with {form}")
        assembled = assembly.assemble(
            experiment, image_shape, COMPILED_BY[form](devices), 1, batch_size=batch_size
        )
        forms[form] = plan_form(assembled, limits, slices)
        show("\n".join(["", form, *_form_lines(forms[form], len(devices), limits)]))
    largest = largest_batch(experiment, image_shape, devices, limits.memory, progress)
    if largest is not None:
        show(f"\nlargest batch that fits: {largest:,} images per device")
    return Plan(
        name=experiment.name,
        topology=topology,
        device=devices[0].device_kind,
        slices=slices,
        devices=len(devices),
        batch_size=batch_size,
        images_per_device=share,
        precision=training.precision,
        limits=limits,
        forms=forms,
        largest_images_per_device=largest,
    )


def _image_shape(experiment: Experiment) -> tuple[int, int, int]:
    size = experiment.data.image_size or experiment.data.crop_size
    if size is not None:
        return (*size, experiment.model.channels)
    return sources.load(experiment.data).image_shape


def plan_form(assembled: Assembly, limits: Limits, slices: int) -> FormPlan:
    """What one compiled form of a training step needs, as XLA counts it once it is compiled."""
    count = assembled.devices.device_count
    share = assembled.batch_size // count
    compiled = whole = compile_step(assembled)
    if assembled.parts > 1:
        # XLA counts a loop's body once, in its costs and in its estimated cycles.
        whole = compile_step(dataclasses.replace(assembled, parts=1))
    costs = _cost(whole, share)
    collectives = exchanges(compiled.as_text(), count)
    roofline = _roofline(costs, collectives, share, count, slices, limits)
    return FormPlan(
        memory=memory_of(compiled),
        flops_per_image=costs.flops,
        bytes_per_image=costs.bytes,
        collectives=collectives,
        roofline=roofline,
        estimate=estimates.estimate(
            whole.as_text(),
            images=share,
            clock=limits.clock,
            at_most=roofline.images_per_second_per_device if roofline else None,
        ),
    )


def memory_of(compiled: Any) -> Memory:
    analysis = compiled.memory_analysis()
    # Results take the memory of the arguments that were donated for them.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    parts = (
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes + outputs,
        analysis.generated_code_size_in_bytes,
    )
    return Memory(*parts, total=sum(parts))


_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(-start)?\("
)
_SENT_TO_SLICES = re.compile(
    r"= \((?P<result>\S+), .*? send\(.*_xla_megascale_transfer_type=\"(?P<kind>\w+)\""
)
_BETWEEN_SLICES = " between slices"
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def exchanges(text: str, devices: int) -> dict[str, Collectives]:
    """A program's collective operations, by kind."""
    found: dict[str, Collectives] = {}

    def add(kind, result):
        size = 0
        for dtype, dimensions in _ARRAY.findall(result):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
            size += math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
        before = found.get(kind, Collectives(0, 0))
        found[kind] = Collectives(before.count + 1, before.bytes + size)

    if devices > 1:
        for match in _COLLECTIVE.finditer(text):
            add(match["kind"], match["result"])
        for match in _SENT_TO_SLICES.finditer(text):
            kind = match["kind"].lower().replace("_", "-")
            add(kind + _BETWEEN_SLICES, match["result"])
    return found


def _sent(kind: str, size: int, participants: int) -> float:
    """Bytes that each device sends in a ring, for a result of a size on each device."""
    others = (participants - 1) / participants
    if kind == "all-reduce":
        return 2 * size * others  # Almost all of the result, twice.
    if kind == "reduce-scatter":
        return size * (participants - 1)  # The result is a part of what is reduced.
    return size * others


def _roofline(
    costs: StepCost,
    collectives: Mapping[str, Collectives],
    share: int,
    devices: int,
    slices: int,
    limits: Limits,
) -> Roofline | None:
    seconds = {}
    if limits.flops:
        seconds["operations"] = share * costs.flops / limits.flops
    if limits.bandwidth:
        seconds["memory bandwidth"] = share * costs.bytes / limits.bandwidth
    if limits.link and collectives:
        sent = sum(
            _sent(kind, entry.bytes, devices // slices)
            for kind, entry in collectives.items()
            if not kind.endswith(_BETWEEN_SLICES)
        )
        seconds[LINKS] = sent / limits.link
    if limits.network and slices > 1:
        sent = sum(
            _sent(kind.removesuffix(_BETWEEN_SLICES), entry.bytes, slices)
            for kind, entry in collectives.items()
            if kind.endswith(_BETWEEN_SLICES)
        )
        seconds[NETWORK] = sent / limits.network
    if not seconds:
        return None
    binding = max(seconds, key=lambda limit: seconds[limit])
    return Roofline(
        seconds=seconds,
        binding=binding,
        images_per_second_per_device=share / seconds[binding],
        images_per_second=devices * share / seconds[binding],
    )


def largest_batch(
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    devices: list[Any],
    memory: int | None,
    progress: Callable[[str], None] = _ignore,
) -> int | None:
    """The most images per device with which the step fits its memory, to within an eighth."""
    if memory is None:
        return None

    @functools.cache
    def needed(share: int) -> float:
        progress(f"searching the largest batch: compiling for {share:,} images per device")
        form = COMPILED_BY[experiment.training.parallel](devices)
        assembled = assembly.assemble(
            experiment, image_shape, form, 1, batch_size=share * len(devices), parts=1
        )
        try:
            return memory_of(compile_step(assembled)).total
        except jax.errors.JaxRuntimeError as error:
            if memory_limits.ran_out(error):
                return math.inf
            raise

    def fits(share: int) -> bool:
        return needed(share) <= memory

    if not fits(8):
        share = 8
        while share > 1 and not fits(share):
            share = max(1, share * 7 // 8)
        return share if fits(share) else 0
    low, high, share = 8, None, 16
    while True:
        if fits(share):
            low = share
        else:
            high = share
        if low == _LARGEST_BATCH or (high is not None and high <= _larger(low)):
            return low
        # Memory grows almost in proportion, so each try tells well where to look next.
        growth = max((needed(share) - needed(8)) / (share - 8), 1)
        guess = min(int(8 + (memory - needed(8)) / growth), _LARGEST_BATCH) // 8 * 8
        if high is not None and (guess >= high or math.isinf(growth)):
            guess = (low + high) // 2
        share = guess if guess > low else _larger(low)


def _larger(share: int) -> int:
    return min(_LARGEST_BATCH, max(share + 1, share * 9 // 8))


def _exchange_share(estimate: Estimate, roofline: Roofline) -> float | None:
    """The part of a step's time that goes into exchanging data, if nothing else runs meanwhile."""
    exchange = sum(roofline.seconds.get(limit, 0) for limit in (LINKS, NETWORK))
    rate = estimate.images_per_second_per_device
    if not exchange or not rate:
        return None
    images = roofline.seconds[roofline.binding] * roofline.images_per_second_per_device
    return exchange / (exchange + images / rate)


def _form_lines(form: FormPlan, devices: int, limits: Limits) -> list[str]:
    """What one form needs, for people."""
    result = []

    def row(name: str, value: str, note: str = "") -> None:
        result.append(f"  {name:30}{value:>16}" + (f"   {note}" if note else ""))

    def mebibytes(count: int) -> str:
        return f"{count / 2**20:,.1f} MiB"

    row("memory, arguments", mebibytes(form.memory.arguments))
    row("memory, temporaries", mebibytes(form.memory.temporaries))
    row("memory, code", mebibytes(form.memory.code))
    of_memory = f"{form.memory.total / limits.memory:.1%} of the device's" if limits.memory else ""
    row("memory, total", mebibytes(form.memory.total), of_memory)
    row("operations per image", f"{form.flops_per_image / 1e9:,.4g} GFLOP")
    row("bytes per image", f"{form.bytes_per_image / 1e6:,.4g} MB")
    for kind, entry in sorted(form.collectives.items()):
        row(kind, f"{entry.bytes / 2**10:,.1f} KiB", f"{entry.count} x")
    if form.roofline:
        result += ["", "limits"]
        for limit, seconds in form.roofline.seconds.items():
            row(limit, f"{seconds * 1e3:,.4g} ms", "per step, at least")
        rate = form.roofline.images_per_second_per_device
        row("images/s, at most", f"{rate:,.0f}", f"limited by {form.roofline.binding}")
        row("images/s, all devices, at most", f"{form.roofline.images_per_second:,.0f}")
        if not limits.network and any(kind.endswith(_BETWEEN_SLICES) for kind in form.collectives):
            row(NETWORK, "not known", "and left out")
        if form.estimate and (exchange := _exchange_share(form.estimate, form.roofline)):
            row("exchange, share of a step", f"{exchange:.1%}", "if nothing else runs meanwhile")
    if form.estimate:
        result += ["", "the compiler's estimate", *estimates.lines(form.estimate, devices)]
    return result
