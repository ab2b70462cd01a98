"""Primitives as nodes, but for elementwise ones and those on windows.

Each public function takes the graph, the equation of the trace and its operands, and is named after
its primitive.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from aecore.saved.onnx.graph import (
    Array,
    Graph,
    Size,
    kind_of,
    natural,
    shape_of,
    unsupported,
)


def broadcast_in_dim(graph, equation, operand, *_):
    shape, axes = shape_of(equation), equation.params["broadcast_dimensions"]
    new = [axis for axis in range(len(shape)) if axis not in axes]
    repeated = {axis for axis in new if shape[axis] != 1}
    repeated |= {
        axis
        for old, axis in enumerate(axes)
        if old in operand.repeated or (operand.shape[old] == 1 and shape[axis] != 1)
    }
    order = natural(len(shape)) if new else operand.order
    if operand.is_constant:
        stored = np.expand_dims(operand.stored, new)
    else:
        stored = graph.unsqueezed(operand, new) if new else operand.stored
    return Array(shape, stored, order, frozenset(repeated))


def concatenate(graph, equation, *operands):
    shape, axis = shape_of(equation), equation.params["dimension"]
    # jnp.pad adds empty arrays where it adds nothing.
    operands = [operand for operand in operands if operand.shape[axis] != 0] or operands[:1]
    order = next((each.order for each in operands if not each.is_constant), natural(len(shape)))
    names = [graph.dense(operand, order) for operand in operands]
    return Array(shape, graph.node("Concat", *names, axis=order.index(axis)), order)


def dim_as_value(graph, equation):
    return Array((), graph.scalar(equation.params["dim"]), ())


def dot_general(graph, equation, left, right):
    contracted, batch = equation.params["dimension_numbers"]
    shape = shape_of(equation)
    if not batch[0] and len(contracted[0]) == 1 and len(right.shape) == 2:
        (left_axis,), (right_axis,) = contracted
        rest = (axis for axis in range(len(left.shape)) if axis != left_axis)
        name = graph.node(
            "MatMul",
            graph.dense(left, (*rest, left_axis)),
            graph.dense(right, (right_axis, 1 - right_axis)),
        )
        return Array(shape, name, natural(len(shape)))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_left = [next(letters) for _ in left.shape]
    of_right = [next(letters) for _ in right.shape]
    for left_axes, right_axes in (contracted, batch):
        for left_axis, right_axis in zip(left_axes, right_axes, strict=True):
            of_right[right_axis] = of_left[left_axis]
    result = [of_left[axis] for axis in batch[0]]
    for names, used in ((of_left, contracted[0] + batch[0]), (of_right, contracted[1] + batch[1])):
        result += [name for axis, name in enumerate(names) if axis not in used]
    terms = (
        "".join(names[axis] for axis in array.order)
        for names, array in ((of_left, left), (of_right, right))
    )
    name = graph.node(
        "Einsum",
        graph.dense(left, left.order),
        graph.dense(right, right.order),
        equation=f"{','.join(terms)}->{''.join(result)}",
    )
    return Array(shape, name, natural(len(shape)))


def gather(graph, equation, operand, indices):
    params, shape = equation.params, shape_of(equation)
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes, removed = numbers.start_index_map, numbers.collapsed_slice_dims
    if params["mode"] != lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        raise unsupported("gather with checks of the bounds, as jnp.take does (index with [])")
    operand = graph.whole(operand)
    rest = tuple(axis for axis in range(len(operand.shape)) if axis not in axes)
    others_whole = all(sizes[axis] == operand.shape[axis] for axis in rest)
    if others_whole and len(indices.shape) == 1:
        # One window: what indexing makes of slices, where sizes are symbolic.
        start = graph.dense(indices, (0,))
        name = graph.node(
            "Slice",
            graph.name(operand, operand.order),
            start,
            graph.node("Add", start, graph.sizes([sizes[axis] for axis in axes])),
            graph.sizes([operand.order.index(axis) for axis in axes]),
        )
        if removed:
            positions = graph.sizes([operand.order.index(axis) for axis in removed])
            name = graph.node("Squeeze", name, positions)
        return _renumbered(operand, shape, name, removed)
    if not others_whole or set(removed) != set(axes) or numbers.operand_batching_dims:
        raise unsupported("gather of windows at several places")
    places = (axis for axis in range(len(shape)) if axis not in numbers.offset_dims)
    name = graph.node(
        "GatherND",
        graph.name(operand, (*axes, *rest)),
        graph.dense(indices, natural(len(indices.shape))),
    )
    return Array(shape, name, (*places, *numbers.offset_dims))


def iota(graph, equation):
    shape, axis = shape_of(equation), equation.params["dimension"]
    name = graph.node("Range", graph.constant(0), graph.scalar(shape[axis]), graph.constant(1))
    if kind_of(equation.params["dtype"]) == "float":
        name = graph.node("Cast", name, to=1)
    others = [each for each in range(len(shape)) if each != axis]
    name = graph.unsqueezed(Array((shape[axis],), name, (0,)), others)
    return Array(shape, name, natural(len(shape)), frozenset(others))


def pad(graph, equation, operand, value):
    configuration = equation.params["padding_config"]
    if any(between for _, _, between in configuration):
        raise unsupported("pad between entries")
    operand = graph.whole(operand)
    order = operand.order
    low, high = ([configuration[axis][side] for axis in order] for side in (0, 1))
    name = graph.name(operand, order)
    name = graph.node("Pad", name, graph.sizes(low + high), graph.name(value, ()))
    return Array(shape_of(equation), name, order)


def reduce_max(graph, equation, operand):
    return _reduced(graph, equation, operand, "ReduceMax")


def reduce_sum(graph, equation, operand):
    return _reduced(graph, equation, operand, "ReduceSum")


def reshape(graph, equation, operand, *_):
    shape = shape_of(equation)
    name = graph.dense(operand, natural(len(operand.shape)))
    name = graph.node("Reshape", name, graph.sizes(shape), allowzero=1)
    return Array(shape, name, natural(len(shape)))


def slice(graph, equation, operand):
    array, params = graph.whole(operand), equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [1] * len(starts)
    axes = [
        axis
        for axis, size in enumerate(array.shape)
        if not (starts[axis] == 0 and limits[axis] == size and strides[axis] == 1)
    ]
    name = graph.node(
        "Slice",
        graph.name(array, array.order),
        graph.sizes([starts[axis] for axis in axes]),
        graph.sizes([limits[axis] for axis in axes]),
        graph.sizes([array.order.index(axis) for axis in axes]),
        graph.sizes([strides[axis] for axis in axes]),
    )
    return Array(shape_of(equation), name, array.order)


def transpose(graph, equation, operand):
    permutation = tuple(equation.params["permutation"])
    return Array(
        shape_of(equation),
        graph.name(operand, operand.order),
        tuple(permutation.index(axis) for axis in operand.order),
        frozenset(permutation.index(axis) for axis in operand.repeated),
    )


def _reduced(graph: Graph, equation: Any, operand: Array, operator: str) -> Array:
    operand, axes = graph.whole(operand), equation.params["axes"]
    positions = [operand.order.index(axis) for axis in axes]
    name = graph.name(operand, operand.order)
    if operator == "ReduceSum":  # The only one whose axes are an input, not an attribute.
        name = graph.node(operator, name, graph.constant(positions), keepdims=0)
    else:
        name = graph.node(operator, name, axes=positions, keepdims=0)
    return _renumbered(operand, shape_of(equation), name, axes)


def _renumbered(array: Array, shape: tuple[Size, ...], name: str, removed: Sequence[int]) -> Array:
    """The whole array without some axes, which `name` lacks already."""
    kept = [axis for axis in range(len(array.shape)) if axis not in removed]
    return Array(shape, name, tuple(kept.index(axis) for axis in array.order if axis in kept))
