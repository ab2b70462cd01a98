"""Primitives on windows of images as nodes: convolutions and pooling.

Each public function takes the graph, the equation of the trace and its operands, and is named after
its primitive.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aecore.saved.onnx.graph import Array, Graph, Size, is_static, shape_of, unsupported


def conv_general_dilated(graph, equation, images, kernel):
    params = equation.params
    if params["batch_group_count"] != 1:
        raise unsupported("a convolution with groups of the batch")
    layout = params["dimension_numbers"]
    if set(params["lhs_dilation"]) == {1}:
        operator, pads = "Conv", params["padding"]
        weights = graph.dense(kernel, layout.rhs_spec)
        attributes = dict(strides=list(params["window_strides"]))
    else:
        operator = "ConvTranspose"
        weights, pads, attributes = _transposed(graph, params, kernel)
    name = graph.node(
        operator,
        graph.dense(images, layout.lhs_spec),
        weights,
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=_pads(pads),
        **attributes,
    )
    return Array(shape_of(equation), name, layout.out_spec)


def reduce_window_max(graph, equation, images):
    return _pool(graph, equation, images, "MaxPool")


def reduce_window_sum(graph, equation, images):
    mean = _pool(graph, equation, images, "AveragePool", count_include_pad=1)
    count = graph.constant(float(math.prod(equation.params["window_dimensions"])))
    return dataclasses.replace(mean, stored=graph.node("Mul", mean.stored, count))


def _transposed(graph, params, kernel):
    """Of a convolution between whose pixels zeros are put: kernel, pads and other attributes."""
    if set(params["window_strides"]) != {1} or not kernel.is_constant:
        raise unsupported("a transposed convolution with strides, or whose kernel is computed")
    weights = np.transpose(kernel.stored, params["dimension_numbers"].rhs_spec)
    low, high = np.array(params["padding"]).T
    # Without pads, a pixel's kernel reaches so far beyond it on both sides.
    reach = (np.array(weights.shape[2:]) - 1) * params["rhs_dilation"]
    extra = np.maximum(0, high - reach)
    if (extra >= np.maximum(params["lhs_dilation"], params["rhs_dilation"])).any():
        raise unsupported(f"a transposed convolution with padding {params['padding']}")
    pads = zip(reach - low, np.maximum(0, reach - high), strict=True)
    groups, (features, channels, *sizes) = params["feature_group_count"], weights.shape
    weights = np.flip(weights, tuple(range(2, weights.ndim)))
    weights = weights.reshape(groups, features // groups, channels, *sizes).swapaxes(1, 2)
    weights = weights.reshape(groups * channels, features // groups, *sizes)
    attributes = dict(strides=list(params["lhs_dilation"]), output_padding=extra.tolist())
    return graph.constant(weights), pads, attributes


def _pool(graph: Graph, equation: Any, images: Array, operator: str, **attributes) -> Array:
    """A node that makes one number of each window."""
    params = equation.params
    windows, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        raise unsupported("dilated pooling")
    single = (1, 1, (0, 0))
    rest = [
        i for i, axis in enumerate(zip(windows, strides, padding, strict=True)) if axis == single
    ]
    if len(rest) < 2:
        # A node pools over all axes but those of the batch and the channels.
        raise unsupported("windows over too many axes")
    spatial = [axis for axis in range(len(windows)) if axis not in (rest[0], rest[-1])]
    if any(not is_static(n) or n >= windows[axis] for axis in spatial for n in padding[axis]):
        raise unsupported(f"pooling with padding {tuple(padding)}")
    order = (rest[0], rest[-1], *spatial)
    name = graph.node(
        operator,
        graph.dense(images, order),
        kernel_shape=[windows[axis] for axis in spatial],
        strides=[strides[axis] for axis in spatial],
        pads=_pads([padding[axis] for axis in spatial]),
        **attributes,
    )
    return Array(shape_of(equation), name, order)


def _pads(padding: Iterable[tuple[Size, Size]]) -> list[int]:
    """Pairs, in ONNX's order: first all starts, then all ends."""
    padding = tuple(padding)
    if not all(is_static(size) and size >= 0 for pair in padding for size in pair):
        raise unsupported("padding that is negative or depends on the images' size")
    return [int(pair[side]) for side in (0, 1) for pair in padding]
