"""Elementwise primitives as nodes."""

from collections.abc import Sequence
from typing import Any

from aecore.saved.onnx.graph import Array, Graph, Size, kind_of, natural, unsupported

OPERATORS = {
    name: name.title()
    for name in (
        *("abs", "add", "and", "div", "erf", "exp", "floor", "log", "max", "min", "mul", "neg"),
        *("not", "or", "pow", "sqrt", "sub", "tanh"),
    )
}
OPERATORS |= {
    "convert_element_type": "Cast",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "logistic": "Sigmoid",
    "lt": "Less",
    "select_n": "Where",
}
"""The operator of each primitive."""


def translate(
    graph: Graph, equation: Any, operands: Sequence[Array], shape: tuple[Size, ...]
) -> Array:
    """Adds a primitive of `OPERATORS`; returns its result, which has this shape."""
    # The others are scalars, which go with everything.
    full = [operand for operand in operands if len(operand.shape) == len(shape)]
    repeated = frozenset(
        axis
        for axis, size in enumerate(shape)
        if size != 1 and all(axis in each.repeated or each.shape[axis] == 1 for each in full)
    )
    # The array with the most axes is not transposed.
    sized = [operand for operand in full if not operand.is_constant]
    order = max(sized, key=_stored_rank).order if sized else natural(len(shape))
    names = [
        graph.name(operand, order if len(operand.shape) == len(shape) else ())
        for operand in operands
    ]
    return Array(shape, _operate(graph, equation, names), order, repeated)


def _operate(graph: Graph, equation: Any, names: list[str]) -> str:
    """Adds the node of an elementwise primitive."""
    name = equation.primitive.name
    kinds = [kind_of(variable.aval.dtype) for variable in (equation.invars[0], *equation.outvars)]
    if name in ("and", "not", "or", "select_n") and kinds[0] != "bool":
        raise unsupported(f"{name} of integers")
    if name == "convert_element_type":
        # Numbers of onnx.TensorProto.DataType.
        number = {"float": 1, "int": 7, "bool": 9}[kinds[1]]
        return names[0] if kinds[0] == kinds[1] else graph.node("Cast", *names, to=number)
    if name == "max" and graph.constant(0.0) in names:
        # Readers merge a Relu with the convolution before it.
        (values,) = set(names) - {graph.constant(0.0)}
        return graph.node("Relu", values)
    if name == "select_n":
        which, otherwise, chosen = names
        return graph.node("Where", which, chosen, otherwise)
    return graph.node(OPERATORS[name], *names)


def _stored_rank(array: Array) -> int:
    """How many axes are stored with a size other than 1."""
    return sum(size != 1 and axis not in array.repeated for axis, size in enumerate(array.shape))
