"""The time of a TPU program as its compiler estimates it, read from the compiled program's text.

XLA's compiler for TPUs notes the cycles that it expects with most operations of a program. They
tell which layers are expensive before any TPU is there. They are no measurement: operations that
the compiler leaves without cycles count as nothing, and so do copies that run beside others,
transfers between devices, and the host.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Literal

Direction = Literal["forward", "backward", "other"]
OperationKind = Literal["matrix products", "elementwise", "reductions", "copies"]

_DEAREST = 10
_NAMED = 6
_COPIES = {
    *("bitcast", "bitcast-convert", "broadcast", "concatenate", "constant", "convert", "copy"),
    *("dynamic-slice", "dynamic-update-slice", "fusion", "gather", "get-tuple-element", "iota"),
    *("pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple"),
}
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter"}
_PRODUCTS = {"convolution", "dot"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = (?P<result>.*?) ?\b(?P<opcode>[a-z][a-z\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_DIFFERENTIATED = re.compile(r"(?P<backward>transpose\()?jvp\((?P<network>\w*)\)+")
_CONTROL_FLOW = re.compile(r".*\(.*|cond|branch_\d+_fun|while|body|closed_call|checkpoint|remat\d*")


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one direction."""

    layer: str
    direction: Direction
    cycles_per_image: float
    share: float
    """Of the whole step's cycles."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A training step's time on one device, as the compiler estimates it."""

    cycles_per_image: float
    images_per_second_per_device: float | None
    """None where the device's clock rate is not known."""
    share_of_limit: float | None
    """`images_per_second_per_device` relative to what the binding limit allows."""
    kinds: dict[OperationKind, float]
    """Shares of the cycles. A fusion of several operations counts as one kind: that which comes
    first in `matrix products`, `reductions`, `elementwise`, `copies`."""
    no_arithmetic: float
    """The share of copies and reductions together."""
    dearest: tuple[LayerCost, ...]
    """The ten layers and directions with the most cycles, in falling order."""
    without_estimate: dict[str, int]
    """How many operations of each kind have no cycles, and count as nothing."""
    loops: int
    """Loops in the program. What is in a loop is counted once, however often it runs."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    cycles: int | None
    op_name: str
    fused: str | None
    """The computation that a fusion runs."""
    is_scalar: bool
    is_free: bool


def estimate(
    text: str, *, images: int, clock: float | None, at_most: float | None
) -> Estimate | None:
    """Adds up the estimated cycles of a compiled training step.

    Args:
      text: of a compiled program, as from `compiled.as_text()`.
      images: a device's share of the batch.
      clock: the device's cycles per second.
      at_most: images per second that the device's binding limit allows.

    Returns:
      None if the program holds no estimate, as those for CPUs and GPUs.
    """
    computations, run = _parse(text)
    opcodes = _reached_opcodes(computations)
    total, kinds, places = 0, collections.Counter(), collections.Counter()
    without = collections.Counter()
    for name, instructions in computations.items():
        for instruction in instructions:
            if instruction.cycles is not None:
                total += instruction.cycles
                inside = opcodes[instruction.fused] if instruction.fused else {instruction.opcode}
                kinds[_kind(inside)] += instruction.cycles
                places[_place(instruction.op_name)] += instruction.cycles
            elif name in run and not instruction.is_scalar and not instruction.is_free:
                without[instruction.opcode] += 1
    if not total:
        return None
    rate = clock * images / total if clock else None
    return Estimate(
        cycles_per_image=total / images,
        images_per_second_per_device=rate,
        share_of_limit=rate / at_most if rate and at_most else None,
        kinds={kind: cycles / total for kind, cycles in kinds.most_common()},
        no_arithmetic=(kinds["copies"] + kinds["reductions"]) / total,
        dearest=tuple(
            LayerCost(layer, direction, cycles / images, cycles / total)
            for (layer, direction), cycles in places.most_common(_DEAREST)
        ),
        without_estimate=dict(without.most_common()),
        loops=len(run) - 1,
    )


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], set[str]]:
    """A program's computations, and the names of those that run by themselves: entry and loops."""
    computations, run = {}, set()
    instructions = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            instructions = computations[header["name"]] = []
            if header["entry"]:
                run.add(header["name"])
        elif found := _INSTRUCTION.match(line):
            instructions.append(_instruction(line, found["opcode"], found["result"]))
            run.update(_BODY.findall(line))
    return computations, run


def _instruction(line: str, opcode: str, result: str) -> _Instruction:
    cycles, name, fused = _CYCLES.search(line), _OP_NAME.search(line), _FUSED.search(line)
    return _Instruction(
        opcode=opcode,
        cycles=int(cycles[1]) if cycles else None,
        op_name=name[1] if name else "",
        fused=fused[1] if fused and opcode == "fusion" else None,
        is_scalar=not re.search(r"\[\d", result),
        # Copies that run beside other operations have a start and an end.
        is_free=opcode in _FREE
        or opcode.endswith(("-start", "-done"))
        or '"ConcatBitcast"' in line,
    )


def _reached_opcodes(computations: dict[str, list[_Instruction]]) -> dict[str, set[str]]:
    """The operations of each computation, with those of the fusions in it."""

    def reached(name: str) -> Iterator[str]:
        for instruction in computations.get(name, ()):
            yield instruction.opcode
            if instruction.fused:
                yield from reached(instruction.fused)

    fused = {i.fused for instructions in computations.values() for i in instructions if i.fused}
    return {name: set(reached(name)) for name in fused}


def _kind(opcodes: set[str]) -> OperationKind:
    if opcodes & _PRODUCTS:
        return "matrix products"
    if opcodes & _REDUCTIONS:
        return "reductions"
    return "copies" if opcodes <= _COPIES else "elementwise"


def _place(op_name: str) -> tuple[str, Direction]:
    """The layer and direction of an operation, from the path that JAX gave it.

    The path of a layer's operation is like
    `jit(train_step)/.../transpose(jvp(UNet))/UNet._down/encoder_0_0/Conv_1/cond/.../add`.
    """
    path = op_name.split("/")
    for position, part in enumerate(path, 1):
        if found := _DIFFERENTIATED.fullmatch(part):
            layer = _layer(path[position:-1], found["network"])
            return layer, "backward" if found["backward"] else "forward"
    if not op_name:
        return "unnamed", "other"
    return "inputs" if len(path) == 1 else "degradation and optimizer", "other"


def _layer(path: list[str], network: str) -> str:
    if not network:
        return "loss"
    scopes = list(itertools.takewhile(lambda part: not _CONTROL_FLOW.fullmatch(part), path))
    # A scope is `MODULE` or `MODULE.METHOD`, and a module comes again where its methods are nested.
    modules = [name for name, _ in itertools.groupby(scope.split(".")[0] for scope in scopes)]
    if modules == [network]:
        return scopes[-1]
    return "/".join(modules[1:] if modules[:1] == [network] else modules) or network


def lines(estimate: Estimate, devices: int) -> list[str]:
    """An estimate, for people.

    Args:
      estimate: of one device.
      devices: how many there are.
    """
    result = [f"  {'cycles per image':30}{estimate.cycles_per_image:>16,.0f}"]
    if rate := estimate.images_per_second_per_device:
        of_limit = estimate.share_of_limit
        note = f"   {of_limit:.0%} of what the binding limit allows" if of_limit else ""
        result += [
            f"  {'images/s':30}{rate:>16,.0f}{note}",
            f"  {'images/s, all devices':30}{rate * devices:>16,.0f}",
        ]
    result += [f"  {kind:30}{share:>16.1%}" for kind, share in estimate.kinds.items()]
    result += [
        f"  {'without arithmetic':30}{estimate.no_arithmetic:>16.1%}   copies and reductions",
        "",
        f"  {'dearest layers':30}{'direction':>16}{'cycles/image':>16}{'share':>10}",
    ]
    result += [
        f"  {cost.layer:30}{cost.direction:>16}{cost.cycles_per_image:>16,.0f}{cost.share:>10.1%}"
        for cost in estimate.dearest
    ]
    result += [
        "",
        "  Not a measurement. It leaves out copies that run beside other operations, transfers",
        "  between devices, and the host that feeds them.",
    ]
    if estimate.without_estimate:
        kinds = [f"{count} {kind}" for kind, count in estimate.without_estimate.items()]
        others = ["others"] if len(kinds) > _NAMED else []
        named = ", ".join([*kinds[:_NAMED], *others])
        result.append(f"  Operations without an estimate, counted as nothing: {named}.")
    if estimate.loops:
        result.append(f"  Loops are counted as if they ran once: {estimate.loops}.")
    return result
