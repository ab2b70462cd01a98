"""Writes a function on images as an ONNX graph.

Images are `(B, H, W, C)` float32 in [0, 1]. The function is traced once, with symbolic B, H and W,
and each JAX primitive of the trace becomes one or a few ONNX nodes. Sizes that depend on the
images are computed in the graph. Three things keep the graph small:

- What depends on no image is computed here and becomes a constant.
- An array remembers in which order its axes are stored. It is transposed only for a node that
  needs another order, so convolutions, which are NCHW in ONNX, don't each turn it around.
- An array that was repeated along an axis is stored with size 1 there, as ONNX broadcasts.

All floating-point numbers are float32 in the graph, even where the function uses fewer bits; all
integers are int64. Of code for several platforms, the default is written.

The primitives that are known here are those that the following emit. aecore's own networks need
about half; the rest is what convolutional networks for images usually have.

- Layers: convolutions (strided, dilated, grouped, transposed), dense layers, einsum and attention,
  max and average pooling, LayerNorm, GroupNorm, RMSNorm, InstanceNorm and BatchNorm in inference.
- Activations: relu, relu6, leaky_relu, prelu, elu, celu, selu, gelu, silu, sigmoid, hard_sigmoid,
  tanh, hard_tanh, softplus, soft_sign, glu, softmax and log_softmax; arithmetic and comparisons.
- Sizes and places: `jax.image.resize` (nearest, bilinear, bicubic), depth-to-space and
  space-to-depth (reshape, transpose, stack), repeat, tile, concatenate, split, slices, flip, and
  `jnp.pad` (constant, edge, reflect, symmetric).

Every other primitive is refused by its name.
"""

import ast
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import lax
from jax.extend import core

from aecore.errors import ConfigError

_OPSET = 17
# The oldest that may hold this opset: a newer one would only shut out older readers.
_IR_VERSION = 8

_INPUT, _EXTENDED, _OUTPUT = "images", "extended", "restored"

Size = Any
"""An int, or JAX's symbolic expression of `b`, `h` and `w`."""


def convert(
    function: Callable[[jax.Array], jax.Array],
    *,
    channels: int,
    stride: int,
    scale: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Writes a function on images as an ONNX model for images of any size.

    The model needs ONNX operator set 17. Its input `images` is `(batch, height, width, channels)`
    float32 in [0, 1], each side at least 1. Its output `restored` is
    `(batch, scale height, scale width, channels)` float32. As `Restorer` does, the model extends
    sides that are not multiples of `stride` by reflection, and crops the result.

    Args:
      function: takes `(B, H, W, C)` float32 in [0, 1] and gives `(B, scale H, scale W, C)`, for
        every B, and every H and W that are multiples of `stride`. It holds its parameters.
      channels: C.
      stride: what H and W must be multiples of.
      scale: how many times larger the function makes the sides.
      metadata: is stored in the model's `metadata_props`.

    Raises:
      ConfigError: the function can't be traced without knowing H and W, uses something that can't
        be written, or returns another shape.
    """
    shape = jax.export.symbolic_shape(f"b, {stride}*h, {stride}*w, {channels}")
    batch, height, width, _ = shape
    try:
        trace = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ConfigError(
            "the network depends on the images' height or width in a way that aecore can't write "
            f"as ONNX ({str(error).strip().splitlines()[0]}); export without --format onnx"
        ) from error
    made = [tuple(aval.shape) for aval in trace.out_avals]
    wanted = (batch, scale * height, scale * width, channels)
    if made != [wanted]:
        raise ConfigError(
            f"the network makes {', '.join(map(str, made)) or 'nothing'} of images "
            f"{tuple(shape)}; for ONNX, it must make {wanted}"
        )

    graph = _Graph(_INPUT if stride == 1 else _EXTENDED, stride)
    if stride > 1:
        graph.extend(_INPUT, output=_EXTENDED)
    (restored,) = _translate(graph, trace, [_Array(tuple(shape), graph.images, _natural(4))])
    restored = graph.dense(restored, _natural(4))
    if stride > 1:
        restored = graph.crop(restored, scale)
    graph.node("Identity", restored, output=_OUTPUT)
    nodes, constants = graph.needed_for(_OUTPUT)
    sides = ["height", "width"]
    larger = sides if scale == 1 else [f"{scale} * {side}" for side in sides]
    images, output = (
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, ["batch", *sides, channels], "NHWC, in [0, 1]"
        )
        for name, sides in ((_INPUT, sides), (_OUTPUT, larger))
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "restore",
            [images],
            [output],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        producer_name="aecore",
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.helper.set_model_props(model, dict(metadata or {}))
    return model


def _unsupported(what: str) -> ConfigError:
    return ConfigError(
        f"the network uses {what}, which aecore can't write as ONNX; export without --format onnx"
    )


def _natural(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def _is_static(size: Size) -> bool:
    return isinstance(size, (int, np.integer))


# ---- The graph


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the traced function, and what stands for it in the graph."""

    shape: tuple[Size, ...]
    stored: str | np.ndarray
    """A name in the graph; or, where no image matters, the values, with axes as in `shape`."""
    order: tuple[int, ...]
    """Axis `i` of what is stored is axis `order[i]` of `shape`."""
    repeated: frozenset[int] = frozenset()
    """Axes of `shape` that are stored with size 1."""

    @property
    def is_constant(self) -> bool:
        return not isinstance(self.stored, str)


class _Graph:
    """Collects nodes and constants, and keeps only one of those that are equal.

    Args:
      images: the name of the array whose shape gives `b`, `h` and `w`.
      stride: its sides are `stride` times `h` and `w`.
    """

    def __init__(self, images: str, stride: int):
        self.images = images
        self._stride = stride
        self._nodes: dict[Any, onnx.NodeProto] = {}
        self._constants: dict[Any, tuple[str, np.ndarray]] = {}

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """Adds a node; returns the name of its output."""
        key = (operator, inputs, repr(sorted(attributes.items())), output)
        if key not in self._nodes:
            name = output or f"{operator}_{len(self._nodes)}"
            self._nodes[key] = onnx.helper.make_node(
                operator, inputs, [name], name=name, **attributes
            )
        return self._nodes[key].name

    def constant(self, values: Any) -> str:
        """Adds a constant; returns its name."""
        array = np.asarray(values)
        kind = _kind(array.dtype)
        array = array.astype({"float": np.float32, "int": np.int64, "bool": bool}[kind])
        key = (kind, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = (f"constant_{len(self._constants)}", array)
        return self._constants[key][0]

    def needed_for(self, output: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
        """The nodes and constants that an output depends on, in an order to compute them."""
        needed, nodes = {output}, []
        for node in reversed(self._nodes.values()):
            if node.name in needed:
                needed.update(node.input)
                nodes.append(node)
        constants = {name: array for name, array in self._constants.values() if name in needed}
        return nodes[::-1], constants

    # Any size of images

    def extend(self, name: str, output: str) -> None:
        """Adds reflected rows and columns up to a multiple of the stride, as `np.pad` does."""
        zero, one, two = map(self.constant, (0, 1, 2))
        for axis in (1, 2):
            side = self.node("Shape", _INPUT, start=axis, end=axis + 1)
            side = self.node("Squeeze", side, self.constant([0]))
            missing = self.node("Mod", self.node("Neg", side), self.constant(self._stride))
            places = self.node("Range", zero, self.node("Add", side, missing), one)
            # There and back again, without the last row twice; a single row is repeated.
            period = self.node("Mul", self.node("Sub", side, one), two)
            period = self.node("Max", period, one)
            there = self.node("Mod", places, period)
            places = self.node("Min", there, self.node("Sub", period, there))
            name = self.node(
                "Gather", name, places, axis=axis, output=output if axis == 2 else None
            )

    def crop(self, name: str, scale: int) -> str:
        """Cuts off what became of the added rows and columns."""
        sides = self.node("Shape", _INPUT, start=1, end=3)
        if scale > 1:
            sides = self.node("Mul", sides, self.constant(scale))
        return self.node("Slice", name, self.constant([0, 0]), sides, self.constant([1, 2]))

    # Arrays

    def name(self, array: _Array, order: tuple[int, ...]) -> str:
        """The array, stored in this order, with size 1 along the repeated axes."""
        if not isinstance(array.stored, str):
            return self.constant(np.transpose(array.stored, order))
        if array.order == order:
            return array.stored
        return self.node(
            "Transpose", array.stored, perm=[array.order.index(axis) for axis in order]
        )

    def whole(self, array: _Array) -> _Array:
        """The array without repeated axes."""
        if not array.repeated:
            return array
        sizes = [array.shape[axis] if axis in array.repeated else 1 for axis in array.order]
        name = self.node("Expand", self.name(array, array.order), self.sizes(sizes))
        return _Array(array.shape, name, array.order)

    def dense(self, array: _Array, order: tuple[int, ...]) -> str:
        """The array in full, stored in this order."""
        return self.name(self.whole(array), order)

    def unsqueezed(self, array: _Array, axes: Sequence[int]) -> str:
        """The array in its natural order, with new axes of size 1."""
        name = self.name(array, _natural(len(array.shape)))
        return self.node("Unsqueeze", name, self.constant(axes)) if axes else name

    # Sizes

    def sizes(self, sizes: Sequence[Size]) -> str:
        """An int64 vector of sizes."""
        if all(map(_is_static, sizes)):
            return self.constant(np.array(sizes, int))
        return self.node("Concat", *map(self._size, sizes), axis=0)

    def scalar(self, size: Size) -> str:
        """A size as an int64 scalar."""
        return self.node("Squeeze", self._size(size), self.constant([0]))

    def _size(self, size: Size) -> str:
        if _is_static(size):
            return self.constant([size])
        # JAX prints a symbolic size as a Python expression.
        return self._expression(ast.parse(str(size), mode="eval").body)

    def _expression(self, tree: ast.expr) -> str:
        match tree:
            case ast.Constant(value=int(value)):
                return self.constant([value])
            case ast.Name(id="b" | "h" | "w" as letter):
                axis = "bhw".index(letter)
                size = self.node("Shape", self.images, start=axis, end=axis + 1)
                if letter == "b" or self._stride == 1:
                    return size
                return self.node("Div", size, self.constant([self._stride]))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.node("Neg", self._expression(operand))
            case ast.BinOp(left=left, op=operation, right=right):
                operator = type(operation).__name__.lower()
            case ast.Call(func=ast.Name(id=operator), args=[left, right], keywords=[]):
                pass
            case _:
                raise _unsupported(f"the size {ast.unparse(tree)}")
        left, right = self._expression(left), self._expression(right)
        if operator == "floordiv":
            # ONNX rounds a quotient towards 0; its remainder has the divisor's sign.
            left = self.node("Sub", left, self.node("Mod", left, right))
        names = dict(add="Add", sub="Sub", mult="Mul", mod="Mod", max="Max", min="Min")
        names["floordiv"] = "Div"
        if operator not in names:
            raise _unsupported(f"the size {ast.unparse(tree)}")
        return self.node(names[operator], left, right)


def _kind(dtype: Any) -> str:
    for kind, parent in (("float", jnp.floating), ("int", jnp.integer), ("bool", np.bool_)):
        if jnp.issubdtype(dtype, parent):
            return kind
    raise _unsupported(f"numbers of type {dtype}")


# ---- The trace

_INLINED = ("checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2")
"""Primitives that apply a function which they hold."""


def _translate(graph: _Graph, trace: Any, arguments: Sequence[_Array]) -> list[_Array]:
    """Adds a traced function, open or closed, to the graph; returns its results."""
    jaxpr = getattr(trace, "jaxpr", trace)
    constants = [_constant(value) for value in getattr(trace, "consts", ())]
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom):
        return _constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = _translate_equation(graph, equation, [read(atom) for atom in equation.invars])
        known |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _constant(value: Any) -> _Array:
    # An array of random keys has no values that NumPy can hold, and stays as it is.
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended)
    array: Any = value if is_key else np.asarray(value)
    return _Array(array.shape, array, _natural(array.ndim))


def _translate_equation(
    graph: _Graph, equation: Any, operands: Sequence[_Array]
) -> Sequence[_Array]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        return _translate(graph, params.get("jaxpr") or params["call_jaxpr"], operands)
    if name == "platform_index":
        # Which of the platforms' functions is meant; the default one is listed under None.
        if None not in params["platforms"]:
            raise _unsupported(f"code for {params['platforms']} alone")
        return [_constant(np.int32(params["platforms"].index(None)))]
    if name == "cond" and operands[0].is_constant:
        branches = params["branches"]
        index = min(max(int(operands[0].stored), 0), len(branches) - 1)
        return _translate(graph, branches[index], operands[1:])

    shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
    static = all(_is_static(size) for shape in shapes for size in shape)
    known = all(operand.is_constant and not operand.repeated for operand in operands)
    if known and static and (operands or name == "iota"):
        if "precision" in params:
            # The graph's own products have all bits of float32, too.
            params = params | {"precision": (lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
        results = equation.primitive.bind(*(operand.stored for operand in operands), **params)
        return [
            _constant(v) for v in (results if equation.primitive.multiple_results else [results])
        ]
    if name in _REWRITTEN:
        arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
        rewritten = functools.partial(_REWRITTEN[name], **params)
        return _translate(graph, jax.make_jaxpr(rewritten)(*arguments), operands)
    if name in _OPERATORS:
        return [_translate_elementwise(graph, equation, operands, shapes[0])]
    if name not in _TRANSLATIONS:
        raise _unsupported(name)
    return [_TRANSLATIONS[name](graph, equation, *operands)]


_REWRITTEN: dict[str, Callable[..., Any]] = {
    "copy": lambda x: x,
    "erfc": lambda x, **_: 1 - lax.erf(x),
    "expm1": lambda x, **_: lax.exp(x) - 1,
    "integer_pow": lambda x, y: lax.pow(x, jnp.asarray(y, x.dtype)),
    "log1p": lambda x, **_: lax.log(1 + x),
    "name": lambda x, **_: x,
    "ne": lambda x, y: ~lax.eq(x, y),
    "rev": lambda x, dimensions: functools.reduce(_reversed, dimensions, x),
    "rsqrt": lambda x, **_: 1 / lax.sqrt(x),
    "split": lambda x, sizes, axis: [
        lax.slice_in_dim(x, end - size, end, axis=axis)
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
    ],
    "square": lambda x: x * x,
    "squeeze": lambda x, dimensions: lax.reshape(
        x, [size for axis, size in enumerate(x.shape) if axis not in dimensions]
    ),
    "stack": lambda *arrays, axis: lax.concatenate(
        [lax.expand_dims(array, [axis]) for array in arrays], axis
    ),
    "stop_gradient": lambda x: x,
    "tile": lambda x, reps: functools.reduce(
        lambda x, axis: lax.concatenate([x] * reps[axis], axis), range(x.ndim), x
    ),
}
"""Primitives that are rewritten with others: functions of the operands and parameters."""


def _reversed(x: jax.Array, axis: int) -> jax.Array:
    places = x.shape[axis] - 1 - jnp.arange(x.shape[axis])
    index = (*[slice(None)] * axis, places)
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


# ---- Elementwise

_OPERATORS = {
    name: name.title()
    for name in (
        *("abs", "add", "and", "div", "erf", "exp", "floor", "log", "max", "min", "mul", "neg"),
        *("not", "or", "pow", "sqrt", "sub", "tanh"),
    )
}
_OPERATORS |= {
    "convert_element_type": "Cast",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "logistic": "Sigmoid",
    "lt": "Less",
    "select_n": "Where",
}


def _operate(graph: _Graph, equation: Any, names: list[str]) -> str:
    """Adds the node of an elementwise primitive."""
    name = equation.primitive.name
    kinds = [_kind(variable.aval.dtype) for variable in (equation.invars[0], *equation.outvars)]
    if name in ("and", "not", "or", "select_n") and kinds[0] != "bool":
        raise _unsupported(f"{name} of integers")
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
    return graph.node(_OPERATORS[name], *names)


def _translate_elementwise(
    graph: _Graph, equation: Any, operands: Sequence[_Array], shape: tuple[Size, ...]
) -> _Array:
    # The others are scalars, which go with everything.
    full = [operand for operand in operands if len(operand.shape) == len(shape)]
    repeated = frozenset(
        axis
        for axis, size in enumerate(shape)
        if size != 1 and all(axis in each.repeated or each.shape[axis] == 1 for each in full)
    )
    # The array with the most axes is not transposed.
    sized = [operand for operand in full if not operand.is_constant]
    order = max(sized, key=_stored_rank).order if sized else _natural(len(shape))
    names = [
        graph.name(operand, order if len(operand.shape) == len(shape) else ())
        for operand in operands
    ]
    return _Array(shape, _operate(graph, equation, names), order, repeated)


def _stored_rank(array: _Array) -> int:
    """How many axes are stored with a size other than 1."""
    return sum(size != 1 and axis not in array.repeated for axis, size in enumerate(array.shape))


# ---- Other primitives

_TRANSLATIONS: dict[str, Callable[..., _Array]] = {}
"""For each primitive, makes of `(graph, equation, *operands)` its result."""


def _translation(function: Callable[..., _Array]) -> Callable[..., _Array]:
    """Decorator: `function` translates the primitive that it is named after."""
    _TRANSLATIONS[function.__name__.strip("_")] = function
    return function


def _shape_of(equation: Any) -> tuple[Size, ...]:
    return tuple(equation.outvars[0].aval.shape)


@_translation
def _broadcast_in_dim(graph, equation, operand, *_):
    shape, axes = _shape_of(equation), equation.params["broadcast_dimensions"]
    new = [axis for axis in range(len(shape)) if axis not in axes]
    repeated = {axis for axis in new if shape[axis] != 1}
    repeated |= {
        axis
        for old, axis in enumerate(axes)
        if old in operand.repeated or (operand.shape[old] == 1 and shape[axis] != 1)
    }
    order = _natural(len(shape)) if new else operand.order
    if operand.is_constant:
        stored = np.expand_dims(operand.stored, new)
    else:
        stored = graph.unsqueezed(operand, new) if new else operand.stored
    return _Array(shape, stored, order, frozenset(repeated))


@_translation
def _concatenate(graph, equation, *operands):
    shape, axis = _shape_of(equation), equation.params["dimension"]
    # jnp.pad adds empty arrays where it adds nothing.
    operands = [operand for operand in operands if operand.shape[axis] != 0] or operands[:1]
    order = next((each.order for each in operands if not each.is_constant), _natural(len(shape)))
    names = [graph.dense(operand, order) for operand in operands]
    return _Array(shape, graph.node("Concat", *names, axis=order.index(axis)), order)


@_translation
def _conv_general_dilated(graph, equation, images, kernel):
    params = equation.params
    if params["batch_group_count"] != 1:
        raise _unsupported("a convolution with groups of the batch")
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
    return _Array(_shape_of(equation), name, layout.out_spec)


def _transposed(graph, params, kernel):
    """Of a convolution between whose pixels zeros are put: kernel, pads and other attributes."""
    if set(params["window_strides"]) != {1} or not kernel.is_constant:
        raise _unsupported("a transposed convolution with strides, or whose kernel is computed")
    weights = np.transpose(kernel.stored, params["dimension_numbers"].rhs_spec)
    low, high = np.array(params["padding"]).T
    # Without pads, a pixel's kernel reaches so far beyond it on both sides.
    reach = (np.array(weights.shape[2:]) - 1) * params["rhs_dilation"]
    extra = np.maximum(0, high - reach)
    if (extra >= np.maximum(params["lhs_dilation"], params["rhs_dilation"])).any():
        raise _unsupported(f"a transposed convolution with padding {params['padding']}")
    pads = zip(reach - low, np.maximum(0, reach - high), strict=True)
    groups, (features, channels, *sizes) = params["feature_group_count"], weights.shape
    weights = np.flip(weights, tuple(range(2, weights.ndim)))
    weights = weights.reshape(groups, features // groups, channels, *sizes).swapaxes(1, 2)
    weights = weights.reshape(groups * channels, features // groups, *sizes)
    attributes = dict(strides=list(params["lhs_dilation"]), output_padding=extra.tolist())
    return graph.constant(weights), pads, attributes


def _pads(padding: Iterable[tuple[Size, Size]]) -> list[int]:
    """Pairs, in ONNX's order: first all starts, then all ends."""
    padding = tuple(padding)
    if not all(_is_static(size) and size >= 0 for pair in padding for size in pair):
        raise _unsupported("padding that is negative or depends on the images' size")
    return [int(pair[side]) for side in (0, 1) for pair in padding]


@_translation
def _dim_as_value(graph, equation):
    return _Array((), graph.scalar(equation.params["dim"]), ())


@_translation
def _dot_general(graph, equation, left, right):
    contracted, batch = equation.params["dimension_numbers"]
    shape = _shape_of(equation)
    if not batch[0] and len(contracted[0]) == 1 and len(right.shape) == 2:
        (left_axis,), (right_axis,) = contracted
        rest = (axis for axis in range(len(left.shape)) if axis != left_axis)
        name = graph.node(
            "MatMul",
            graph.dense(left, (*rest, left_axis)),
            graph.dense(right, (right_axis, 1 - right_axis)),
        )
        return _Array(shape, name, _natural(len(shape)))
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
    return _Array(shape, name, _natural(len(shape)))


@_translation
def _gather(graph, equation, operand, indices):
    params, shape = equation.params, _shape_of(equation)
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axes, removed = numbers.start_index_map, numbers.collapsed_slice_dims
    if params["mode"] != lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        raise _unsupported("gather with checks of the bounds, as jnp.take does (index with [])")
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
        raise _unsupported("gather of windows at several places")
    places = (axis for axis in range(len(shape)) if axis not in numbers.offset_dims)
    name = graph.node(
        "GatherND",
        graph.name(operand, (*axes, *rest)),
        graph.dense(indices, _natural(len(indices.shape))),
    )
    return _Array(shape, name, (*places, *numbers.offset_dims))


@_translation
def _iota(graph, equation):
    shape, axis = _shape_of(equation), equation.params["dimension"]
    name = graph.node("Range", graph.constant(0), graph.scalar(shape[axis]), graph.constant(1))
    if _kind(equation.params["dtype"]) == "float":
        name = graph.node("Cast", name, to=1)
    others = [each for each in range(len(shape)) if each != axis]
    name = graph.unsqueezed(_Array((shape[axis],), name, (0,)), others)
    return _Array(shape, name, _natural(len(shape)), frozenset(others))


@_translation
def _pad(graph, equation, operand, value):
    configuration = equation.params["padding_config"]
    if any(between for _, _, between in configuration):
        raise _unsupported("pad between entries")
    operand = graph.whole(operand)
    order = operand.order
    low, high = ([configuration[axis][side] for axis in order] for side in (0, 1))
    name = graph.name(operand, order)
    name = graph.node("Pad", name, graph.sizes(low + high), graph.name(value, ()))
    return _Array(_shape_of(equation), name, order)


def _pool(graph: _Graph, equation: Any, images: _Array, operator: str, **attributes) -> _Array:
    """A node that makes one number of each window."""
    params = equation.params
    windows, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        raise _unsupported("dilated pooling")
    single = (1, 1, (0, 0))
    rest = [
        i for i, axis in enumerate(zip(windows, strides, padding, strict=True)) if axis == single
    ]
    if len(rest) < 2:
        # A node pools over all axes but those of the batch and the channels.
        raise _unsupported("windows over too many axes")
    spatial = [axis for axis in range(len(windows)) if axis not in (rest[0], rest[-1])]
    if any(not _is_static(n) or n >= windows[axis] for axis in spatial for n in padding[axis]):
        raise _unsupported(f"pooling with padding {tuple(padding)}")
    order = (rest[0], rest[-1], *spatial)
    name = graph.node(
        operator,
        graph.dense(images, order),
        kernel_shape=[windows[axis] for axis in spatial],
        strides=[strides[axis] for axis in spatial],
        pads=_pads([padding[axis] for axis in spatial]),
        **attributes,
    )
    return _Array(_shape_of(equation), name, order)


_TRANSLATIONS["reduce_window_max"] = functools.partial(_pool, operator="MaxPool")


@_translation
def _reduce_window_sum(graph, equation, images):
    mean = _pool(graph, equation, images, "AveragePool", count_include_pad=1)
    count = graph.constant(float(math.prod(equation.params["window_dimensions"])))
    return dataclasses.replace(mean, stored=graph.node("Mul", mean.stored, count))


def _reduced(graph: _Graph, equation: Any, operand: _Array, operator: str) -> _Array:
    operand, axes = graph.whole(operand), equation.params["axes"]
    positions = [operand.order.index(axis) for axis in axes]
    name = graph.name(operand, operand.order)
    if operator == "ReduceSum":  # The only one whose axes are an input, not an attribute.
        name = graph.node(operator, name, graph.constant(positions), keepdims=0)
    else:
        name = graph.node(operator, name, axes=positions, keepdims=0)
    return _renumbered(operand, _shape_of(equation), name, axes)


_TRANSLATIONS |= {
    "reduce_max": functools.partial(_reduced, operator="ReduceMax"),
    "reduce_sum": functools.partial(_reduced, operator="ReduceSum"),
}


def _renumbered(
    array: _Array, shape: tuple[Size, ...], name: str, removed: Sequence[int]
) -> _Array:
    """The whole array without some axes, which `name` lacks already."""
    kept = [axis for axis in range(len(array.shape)) if axis not in removed]
    return _Array(shape, name, tuple(kept.index(axis) for axis in array.order if axis in kept))


@_translation
def _reshape(graph, equation, operand, *_):
    shape = _shape_of(equation)
    name = graph.dense(operand, _natural(len(operand.shape)))
    name = graph.node("Reshape", name, graph.sizes(shape), allowzero=1)
    return _Array(shape, name, _natural(len(shape)))


@_translation
def _slice(graph, equation, operand):
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
    return _Array(_shape_of(equation), name, array.order)


@_translation
def _transpose(graph, equation, operand):
    permutation = tuple(equation.params["permutation"])
    return _Array(
        _shape_of(equation),
        graph.name(operand, operand.order),
        tuple(permutation.index(axis) for axis in operand.order),
        frozenset(permutation.index(axis) for axis in operand.repeated),
    )
