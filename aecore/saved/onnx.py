"""A function on images, as an ONNX graph.

Images are `(B, H, W, C)` float32 in [0, 1]. The function is traced once, with symbolic B, H and W,
and each primitive of the trace becomes one or a few ONNX nodes; sizes that depend on the images'
are computed in the graph. Three things keep the graph small:

- what depends on no image is computed here and becomes a constant;
- an array remembers in which order its axes are stored, and is transposed only for a node that
  needs another order. So convolutions, which ONNX wants as NCHW, don't turn around every time;
- an array that was repeated along an axis is stored with size 1 there, as ONNX broadcasts.

All floating-point numbers are float32 in the graph, also where the function uses fewer bits; all
integers are int64. Where the function has code for several platforms, the default one is written.
"""

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from aecore.errors import ConfigError

if TYPE_CHECKING:
    import onnx

_OPSET = 17
# The oldest that may hold this opset: a newer one would only shut out older readers.
_IR_VERSION = 8

_INPUT, _OUTPUT = "images", "restored"

Size = Any
"""An int, or JAX's symbolic expression of the sizes `b`, `h` and `w`."""


def convert(
    function: Callable[[jax.Array], jax.Array],
    *,
    channels: int,
    stride: int,
    metadata: Mapping[str, str] | None = None,
) -> "onnx.ModelProto":
    """Writes a function on images as an ONNX model.

    The model needs ONNX operator set 17. Its input `images` and its output `restored` are
    `(batch, height, width, channels)` float32, where batch, height and width are free but for the
    multiples that `stride` demands.

    Args:
      function: `(B, H, W, C)` float32 in [0, 1] to the same shape, for every B and for every H
        and W that are multiples of `stride`. It closes over its parameters.
      channels: C.
      stride: of the function.
      metadata: goes into the model's `metadata_props`.

    Raises:
      ConfigError: onnx is not installed; the function can't be traced without knowing H and W,
        uses what can't be written, or doesn't keep the shape.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(
            'to write ONNX, the package onnx is needed: pip install "aecore[onnx]"'
        ) from error

    shape = jax.export.symbolic_shape(f"b, {stride}*h, {stride}*w, {channels}")
    try:
        trace = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ConfigError(
            "the network depends on the images' height or width in a way that aecore can't write "
            f"as ONNX ({str(error).strip().splitlines()[0]}); export without --format onnx"
        ) from error
    shapes = [tuple(aval.shape) for aval in trace.out_avals]
    if shapes != [tuple(shape)]:
        raise ConfigError(
            f"the network makes {', '.join(map(_shape_text, shapes)) or 'nothing'} of images "
            f"{_shape_text(shape)}; a network for ONNX must keep the shape"
        )

    graph = _Graph(stride)
    (restored,) = _translate(graph, trace, [_Array(tuple(shape), _INPUT, _natural(4))])
    result = graph.node("Identity", graph.dense(restored, _natural(4)), output=_OUTPUT)
    nodes, constants = graph.needed_for(result)
    images, output = (
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, ["batch", "height", "width", channels], doc_string=text
        )
        for name, text in (
            (_INPUT, f"NHWC, in [0, 1]; height and width are multiples of {stride}"),
            (_OUTPUT, "NHWC, of the images' shape"),
        )
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(
                    node.operator, node.inputs, [node.output], name=node.output, **node.attributes
                )
                for node in nodes
            ],
            "restore",
            [images],
            [output],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        producer_name="aecore",
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.helper.set_model_props(model, {key: str(value) for key, value in (metadata or {}).items()})
    return model


def _unsupported(what: str) -> ConfigError:
    return ConfigError(
        f"the network uses {what}, which aecore can't write as ONNX; export without --format onnx"
    )


def _shape_text(shape: Sequence[Size]) -> str:
    return f"({', '.join(map(str, shape))})"


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
    """A name in the graph; or the values, where no image matters, with axes in `shape`'s order."""
    order: tuple[int, ...]
    """Axis `i` of what is stored is axis `order[i]` of `shape`."""
    repeated: frozenset[int] = frozenset()
    """Axes of `shape` that have size 1 where stored."""

    @property
    def is_constant(self) -> bool:
        return not isinstance(self.stored, str)


@dataclasses.dataclass(frozen=True)
class _Node:
    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class _Graph:
    """Collects nodes and constants. Nodes are functions, so that equal ones are made once."""

    def __init__(self, stride: int):
        self._nodes: dict[Any, _Node] = {}
        self._constants: dict[Any, tuple[str, np.ndarray]] = {}
        self._stride = stride

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """Adds a node; the name of its output."""
        key = (operator, inputs, repr(sorted(attributes.items())), output)
        if key not in self._nodes:
            name = output or f"{operator}_{len(self._nodes)}"
            self._nodes[key] = _Node(operator, inputs, name, attributes)
        return self._nodes[key].output

    def constant(self, values: Any) -> str:
        """Adds a constant; its name."""
        array = np.asarray(values)
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(np.float32)
        elif jnp.issubdtype(array.dtype, jnp.integer):
            array = array.astype(np.int64)
        elif array.dtype != bool:
            raise _unsupported(f"numbers of type {array.dtype}")
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = (f"constant_{len(self._constants)}", array)
        return self._constants[key][0]

    def is_zero(self, name: str) -> bool:
        """Whether this is the scalar constant 0.0."""
        return name in (self._constants.get((np.dtype(np.float32), (), bytes(4))) or ())[:1]

    def needed_for(self, output: str) -> tuple[list[_Node], dict[str, np.ndarray]]:
        """The nodes and constants that an output depends on, in an order to compute them."""
        needed, nodes = {output}, []
        for node in reversed(self._nodes.values()):
            if node.output in needed:
                needed.update(node.inputs)
                nodes.append(node)
        constants = {name: array for name, array in self._constants.values() if name in needed}
        return nodes[::-1], constants

    # Arrays

    def name(self, array: _Array, order: tuple[int, ...]) -> str:
        """The array, stored in this order. It still has size 1 along the repeated axes."""
        if array.is_constant:
            return self.constant(np.transpose(array.stored, order))
        if array.order == order:
            return array.stored
        return self.node(
            "Transpose", array.stored, perm=[array.order.index(axis) for axis in order]
        )

    def whole(self, array: _Array) -> _Array:
        """The array without repeated axes. (For a constant, one that the graph computes.)"""
        if not array.repeated:
            return array
        sizes = [array.shape[axis] if axis in array.repeated else 1 for axis in array.order]
        name = self.node("Expand", self.name(array, array.order), self.sizes(sizes))
        return _Array(array.shape, name, array.order)

    def dense(self, array: _Array, order: tuple[int, ...]) -> str:
        """The array in full, stored in this order."""
        return self.name(self.whole(array), order)

    def reshape(self, name: str, before: Sequence[Size], after: Sequence[Size]) -> str:
        """Reshapes what is stored with the sizes `before`."""
        if any(size == 0 for size in after):
            return self.node("Reshape", name, self.sizes(after), allowzero=1)
        # ONNX takes 0 for "as before" and one -1 for "what remains".
        sizes = [
            int(size)
            if _is_static(size)
            else 0
            if axis < len(before) and before[axis] == size
            else -1
            for axis, size in enumerate(after)
        ]
        target = self.constant(np.array(sizes, int)) if sizes.count(-1) < 2 else self.sizes(after)
        return self.node("Reshape", name, target)

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
        # JAX prints a symbolic size as a Python expression, but for the sign of a power.
        return self._expression(ast.parse(str(size).replace("^", "**"), mode="eval").body)

    def _expression(self, tree: ast.expr) -> str:
        match tree:
            case ast.Constant(value=int(value)):
                return self.constant([value])
            case ast.Name(id="b"):
                return self.node("Shape", _INPUT, start=0, end=1)
            case ast.Name(id="h" | "w" as axis):
                first = "bhw".index(axis)
                return self._binary(
                    "Div",
                    self.node("Shape", _INPUT, start=first, end=first + 1),
                    self.constant([self._stride]),
                )
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.node("Neg", self._expression(operand))
            case ast.BinOp(left=left, op=operator, right=right):
                name = type(operator).__name__
            case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]):
                pass
            case _:
                raise _unsupported(f"the size {ast.unparse(tree)}")
        left, right = self._expression(left), self._expression(right)
        match name:
            case "Add" | "Sub" | "Pow":
                return self.node(name, left, right)
            case "Mult":
                return self._binary("Mul", left, right)
            case "Mod" | "mod":
                return self.node("Mod", left, right)
            case "FloorDiv" | "floordiv":
                # ONNX rounds a quotient towards 0; its remainder has the divisor's sign.
                difference = self.node("Sub", left, self.node("Mod", left, right))
                return self._binary("Div", difference, right)
            case "max" | "min":
                return self.node(name.title(), left, right)
        raise _unsupported(f"the size {ast.unparse(tree)}")

    def _binary(self, operator: str, left: str, right: str) -> str:
        """A product or quotient, where it isn't by 1."""
        one = self.constant([1])
        if right == one:
            return left
        if left == one and operator == "Mul":
            return right
        return self.node(operator, left, right)


# ---- The trace

_INLINED = frozenset(
    {
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "jit",
        "pjit",
        "remat",
        "remat2",
    }
)
"""Primitives that apply a function which they hold."""


def _translate(graph: _Graph, trace: Any, arguments: Sequence[_Array]) -> list[_Array]:
    """Adds a traced function, open or closed, to the graph; what it gives for the arguments."""
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
    is_key = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.extended)
    array = value if is_key else np.asarray(value)
    return _Array(array.shape, array, _natural(array.ndim))


def _translate_equation(
    graph: _Graph, equation: Any, operands: Sequence[_Array]
) -> Sequence[_Array]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        body = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
        return _translate(graph, body, operands)
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
    constant = all(operand.is_constant for operand in operands)
    stored_whole = not any(operand.repeated for operand in operands)
    if constant and static and stored_whole and (operands or name == "iota"):
        return [_constant(value) for value in _compute(equation, operands)]
    if name in _ELEMENTWISE:
        return [_translate_elementwise(graph, equation, operands, shapes[0])]
    if name not in _TRANSLATIONS:
        raise _unsupported(name)
    if constant and operands and name != "broadcast_in_dim":
        # All are constants, but not the result's size.
        first, *others = operands
        named = dataclasses.replace(first, stored=graph.name(first, first.order))
        operands = [named, *others]
    results = _TRANSLATIONS[name](graph, equation, *operands)
    return results if isinstance(results, list) else [results]


def _compute(equation: Any, operands: Sequence[_Array]) -> Sequence[Any]:
    """What an equation gives for constants."""
    params = dict(equation.params)
    if "precision" in params:
        # The graph's own products have all bits of float32, too.
        params["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    results = equation.primitive.bind(*(operand.stored for operand in operands), **params)
    return results if equation.primitive.multiple_results else [results]


# ---- Elementwise

_ELEMENTWISE: dict[str, Callable[..., str]] = {}
"""Per primitive, what makes of `(graph, equation, *names)` the name of its result."""


def _node_of(operator: str, **attributes: Any) -> Callable[..., str]:
    return lambda graph, equation, *names: graph.node(operator, *names, **attributes)


_ELEMENTWISE |= {
    primitive: _node_of(operator)
    for primitive, operator in {
        "abs": "Abs",
        "acos": "Acos",
        "acosh": "Acosh",
        "add": "Add",
        "add_any": "Add",
        "asin": "Asin",
        "asinh": "Asinh",
        "atan": "Atan",
        "atanh": "Atanh",
        "ceil": "Ceil",
        "cos": "Cos",
        "cosh": "Cosh",
        "div": "Div",
        "eq": "Equal",
        "erf": "Erf",
        "exp": "Exp",
        "floor": "Floor",
        "ge": "GreaterOrEqual",
        "gt": "Greater",
        "le": "LessOrEqual",
        "log": "Log",
        "logistic": "Sigmoid",
        "lt": "Less",
        "min": "Min",
        "mul": "Mul",
        "neg": "Neg",
        "pow": "Pow",
        "sign": "Sign",
        "sin": "Sin",
        "sinh": "Sinh",
        "sqrt": "Sqrt",
        "sub": "Sub",
        "tan": "Tan",
        "tanh": "Tanh",
    }.items()
}
_ELEMENTWISE["rem"] = _node_of("Mod", fmod=1)
_ELEMENTWISE |= {
    primitive: lambda graph, equation, name: name
    for primitive in ("copy", "name", "sharding_constraint", "stop_gradient")
}


def _elementwise(function: Callable[..., str]) -> Callable[..., str]:
    """Decorator: `function` translates the primitive that it is named after."""
    _ELEMENTWISE[function.__name__.strip("_")] = function
    return function


@_elementwise
def _max(graph, equation, left, right):
    # Readers merge a Relu with the convolution before it.
    if graph.is_zero(right):
        return graph.node("Relu", left)
    if graph.is_zero(left):
        return graph.node("Relu", right)
    return graph.node("Max", left, right)


@_elementwise
def _clamp(graph, equation, low, name, high):
    return graph.node("Min", graph.node("Max", name, low), high)


@_elementwise
def _convert_element_type(graph, equation, name):
    kinds = [_kind(var.aval.dtype) for var in (equation.invars[0], equation.outvars[0])]
    # Numbers of onnx.TensorProto.DataType.
    number = {"float": 1, "int": 7, "bool": 9}[kinds[1]]
    return name if kinds[0] == kinds[1] else graph.node("Cast", name, to=number)


def _kind(dtype: Any) -> str:
    for kind, parent in (("float", jnp.floating), ("int", jnp.integer), ("bool", np.bool_)):
        if jnp.issubdtype(dtype, parent):
            return kind
    raise _unsupported(f"numbers of type {dtype}")


@_elementwise
def _erfc(graph, equation, name):
    return graph.node("Sub", graph.constant(1.0), graph.node("Erf", name))


@_elementwise
def _exp2(graph, equation, name):
    return graph.node("Exp", graph.node("Mul", name, graph.constant(math.log(2))))


@_elementwise
def _expm1(graph, equation, name):
    return graph.node("Sub", graph.node("Exp", name), graph.constant(1.0))


@_elementwise
def _integer_pow(graph, equation, name):
    return graph.node("Pow", name, graph.constant(float(equation.params["y"])))


@_elementwise
def _is_finite(graph, equation, name):
    return graph.node("Not", graph.node("Or", graph.node("IsNaN", name), graph.node("IsInf", name)))


@_elementwise
def _log1p(graph, equation, name):
    return graph.node("Log", graph.node("Add", name, graph.constant(1.0)))


@_elementwise
def _ne(graph, equation, left, right):
    return graph.node("Not", graph.node("Equal", left, right))


@_elementwise
def _round(graph, equation, name):
    if equation.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise _unsupported("round away from zero")
    return graph.node("Round", name)


@_elementwise
def _rsqrt(graph, equation, name):
    return graph.node("Reciprocal", graph.node("Sqrt", name))


@_elementwise
def _select_n(graph, equation, which, *cases):
    if equation.invars[0].aval.dtype != bool:
        raise _unsupported("select_n by an integer")
    return graph.node("Where", which, *cases[::-1])


@_elementwise
def _square(graph, equation, name):
    return graph.node("Mul", name, name)


def _logical(operator: str) -> Callable[..., str]:
    def translate(graph, equation, *names):
        if equation.invars[0].aval.dtype != bool:
            raise _unsupported(f"{equation.primitive.name} of integers")
        return graph.node(operator, *names)

    return translate


_ELEMENTWISE |= {name: _logical(name.title()) for name in ("and", "not", "or", "xor")}


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
    if all(operand.is_constant for operand in operands):
        common = np.broadcast_shapes(*(operand.stored.shape for operand in full))
        values = [
            dataclasses.replace(each, stored=np.broadcast_to(each.stored, common))
            if len(each.shape) == len(shape)
            else each
            for each in operands
        ]
        (value,) = _compute(equation, values)
        return _Array(shape, np.asarray(value), _natural(len(shape)), repeated)
    # The largest array isn't transposed.
    sized = [operand for operand in full if not operand.is_constant]
    largest = max(sized, key=_stored_axes, default=None)
    order = largest.order if largest else _natural(len(shape))
    names = [
        graph.name(operand, order if len(operand.shape) == len(shape) else ())
        for operand in operands
    ]
    return _Array(
        shape, _ELEMENTWISE[equation.primitive.name](graph, equation, *names), order, repeated
    )


def _stored_axes(array: _Array) -> int:
    """How many axes have a size other than 1 where stored."""
    return sum(size != 1 and axis not in array.repeated for axis, size in enumerate(array.shape))


# ---- Other primitives

_TRANSLATIONS: dict[str, Callable[..., _Array | list[_Array]]] = {}
"""Per primitive, what makes of `(graph, equation, *operands)` its result or results."""


def _translation(function: Callable[..., _Array | list[_Array]]) -> Callable:
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
    if operand.is_constant:
        stored, order = np.expand_dims(operand.stored, new), _natural(len(shape))
    elif not new:
        stored, order = operand.stored, operand.order
    else:
        name = graph.name(operand, _natural(len(axes)))
        stored = graph.node("Unsqueeze", name, graph.constant(new))
        order = _natural(len(shape))
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
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    padding, stretch = list(params["padding"]), tuple(params["lhs_dilation"])
    strides, dilations = list(params["window_strides"]), list(params["rhs_dilation"])
    axes = layout.lhs_spec[2:]
    if set(stretch) != {1}:
        result = _conv_transpose(graph, equation, images, kernel)
        if result is not None:
            return result
    if set(stretch) != {1} or not _fits(padding):
        configuration = [(0, 0, 0)] * len(images.shape)
        for axis, (low, high), factor in zip(axes, padding, stretch, strict=True):
            configuration[axis] = (low, high, factor - 1)
        images = _padded(graph, images, configuration, graph.constant(0.0))
        padding = [(0, 0)] * len(axes)
    name = graph.node(
        "Conv",
        graph.dense(images, layout.lhs_spec),
        graph.dense(kernel, layout.rhs_spec),
        strides=strides,
        dilations=dilations,
        group=groups,
        pads=_pads(padding),
    )
    return _Array(_shape_of(equation), name, layout.out_spec)


def _conv_transpose(graph, equation, images, kernel) -> _Array | None:
    """A convolution of images with zeros put between their pixels; None if it needs the zeros."""
    params = equation.params
    if set(params["window_strides"]) != {1} or not kernel.is_constant:
        return None
    if not all(_is_static(size) for pair in params["padding"] for size in pair):
        return None
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    weights = np.transpose(kernel.stored, layout.rhs_spec)
    pads, extra = [], []
    for size, (low, high), factor, dilation in zip(
        weights.shape[2:],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    ):
        # Without pads, a pixel's kernel reaches `reach` beyond it on both sides.
        reach = (size - 1) * dilation
        pads.append((int(reach - low), max(0, int(reach - high))))
        extra.append(max(0, int(high - reach)))
        if low > reach or extra[-1] >= max(factor, dilation):
            return None
    features, channels, *sizes = weights.shape
    weights = np.flip(weights, range(2, weights.ndim))
    weights = weights.reshape(groups, features // groups, channels, *sizes).swapaxes(1, 2)
    weights = weights.reshape(groups * channels, features // groups, *sizes)
    name = graph.node(
        "ConvTranspose",
        graph.dense(images, layout.lhs_spec),
        graph.constant(weights),
        strides=list(params["lhs_dilation"]),
        dilations=list(params["rhs_dilation"]),
        group=groups,
        pads=_pads(pads),
        output_padding=extra,
    )
    return _Array(_shape_of(equation), name, layout.out_spec)


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Pairs, in ONNX's order: first all starts, then all ends."""
    return [int(pair[side]) for side in (0, 1) for pair in padding]


def _fits(padding: Sequence[tuple[Size, Size]], sizes: Sequence[int] | None = None) -> bool:
    """Whether a node can pad so: by known numbers, not negative and less than a window's sizes."""
    limits = sizes or [math.inf] * len(padding)
    return all(
        _is_static(size) and 0 <= size < limit
        for pair, limit in zip(padding, limits, strict=True)
        for size in pair
    )


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
    numbers, mode = params["dimension_numbers"], params["mode"]
    axes, removed = numbers.start_index_map, numbers.collapsed_slice_dims
    sizes = params["slice_sizes"]
    others_whole = all(
        sizes[axis] == size for axis, size in enumerate(operand.shape) if axis not in axes
    )
    in_bounds = mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS
    operand, rank = graph.whole(operand), len(operand.shape)
    if others_whole and in_bounds and len(indices.shape) == 1:
        # One window: what indexing makes of slices, where sizes are symbolic.
        start = graph.dense(indices, (0,))
        name = graph.node(
            "Slice",
            graph.name(operand, operand.order),
            start,
            graph.node("Add", start, graph.sizes([sizes[axis] for axis in axes])),
            graph.constant([operand.order.index(axis) for axis in axes]),
        )
        return _without(graph, _Array(sizes, name, operand.order), removed)
    if not others_whole or set(removed) != set(axes) or numbers.operand_batching_dims:
        raise _unsupported("gather of windows at several places")
    places = tuple(axis for axis in range(len(shape)) if axis not in numbers.offset_dims)
    rest = tuple(axis for axis in range(rank) if axis not in axes)
    given = graph.dense(indices, _natural(len(indices.shape)))
    valid = given
    if not in_bounds:
        zero, one = graph.constant(0), graph.constant(1)
        last = graph.node("Sub", graph.sizes([operand.shape[axis] for axis in axes]), one)
        valid = graph.node("Min", graph.node("Max", given, zero), last)
    name = graph.node("GatherND", graph.name(operand, (*axes, *rest)), valid)
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        if _kind(equation.outvars[0].aval.dtype) != "float":
            raise _unsupported("gather of integers that may be out of bounds")
        # NaN where any of the indices is out of bounds.
        excess = graph.node("Abs", graph.node("Sub", given, valid))
        excess = graph.node("ReduceMax", excess, axes=[-1], keepdims=0)
        if rest:
            positions = np.arange(len(places), len(shape))
            excess = graph.node("Unsqueeze", excess, graph.constant(positions))
        inside = graph.node("Equal", excess, graph.constant(0))
        name = graph.node("Where", inside, name, graph.constant(np.nan))
    return _Array(shape, name, (*places, *numbers.offset_dims))


@_translation
def _iota(graph, equation):
    shape, axis = _shape_of(equation), equation.params["dimension"]
    name = graph.node("Range", graph.constant(0), graph.scalar(shape[axis]), graph.constant(1))
    if _kind(equation.params["dtype"]) == "float":
        name = graph.node("Cast", name, to=1)
    others = [each for each in range(len(shape)) if each != axis]
    if others:
        name = graph.node("Unsqueeze", name, graph.constant(others))
    return _Array(shape, name, _natural(len(shape)), frozenset(others))


@_translation
def _optimization_barrier(graph, equation, *operands):
    return list(operands)


@_translation
def _pad(graph, equation, operand, value):
    return _padded(graph, operand, equation.params["padding_config"], graph.name(value, ()))


def _padded(
    graph: _Graph, array: _Array, configuration: Sequence[tuple[Size, Size, int]], value: str
) -> _Array:
    """Pads as `lax.pad` does: per axis before, after and between the entries."""
    array = graph.whole(array)
    order, shape = array.order, list(array.shape)
    name = graph.name(array, order)
    for axis, (_, _, between) in enumerate(configuration):
        if between:
            # Every entry is followed by `between` values; those after the last one are cut off.
            position = order.index(axis)
            name = graph.node("Unsqueeze", name, graph.constant([position + 1]))
            pads = [0] * (2 * len(order) + 2)
            pads[len(order) + 1 + position + 1] = between
            name = graph.node("Pad", name, graph.constant(pads), value)
            before = [shape[each] for each in order]
            before.insert(position + 1, between + 1)
            shape[axis] = shape[axis] * (between + 1)
            name = graph.reshape(name, before, [shape[each] for each in order])
            name = graph.node(
                "Slice", name, *(graph.constant([n]) for n in (0, -between, position))
            )
            shape[axis] = shape[axis] - between
    low, high = ([configuration[axis][side] for axis in order] for side in (0, 1))
    if any(size != 0 for size in low + high):
        name = graph.node("Pad", name, graph.sizes(low + high), value)
    shape = [low + size + high for size, (low, high, _) in zip(shape, configuration, strict=True)]
    return _Array(tuple(shape), name, order)


def _pool(graph: _Graph, equation: Any, images: _Array, operator: str, empty: float) -> _Array:
    """A node that makes one number of each window; `empty` is what padding holds."""
    params = equation.params
    per_axis = [params[f"window_{name}"] for name in ("dimensions", "strides", "dilation")]
    padding = list(params["padding"])
    if set(params["base_dilation"]) != {1}:
        raise _unsupported("windows over dilated images")
    rest = [
        axis
        for axis, values in enumerate(zip(*per_axis, padding, strict=True))
        if values[0] == values[1] == 1 and all(size == 0 for size in values[3])
    ]
    if len(rest) < 2:
        # A node pools over all axes but those of the batch and the channels.
        raise _unsupported("windows over too many axes")
    if _kind(equation.outvars[0].aval.dtype) != "float":
        raise _unsupported("pooling of integers")
    order = (rest[0], rest[-1], *(a for a in range(len(padding)) if a not in (rest[0], rest[-1])))
    windows, strides, dilations = ([values[axis] for axis in order[2:]] for values in per_axis)
    if not _fits([padding[axis] for axis in order[2:]], windows):
        configuration = [(*pair, 0) for pair in padding]
        images = _padded(graph, images, configuration, graph.constant(empty))
        padding = [(0, 0)] * len(padding)
    attributes = dict(
        kernel_shape=windows, strides=strides, pads=_pads([padding[axis] for axis in order[2:]])
    )
    if operator == "MaxPool":
        attributes["dilations"] = dilations
    else:
        attributes["count_include_pad"] = 1
        if set(dilations) != {1}:
            raise _unsupported("a sum over dilated windows")
    name = graph.node(operator, graph.dense(images, order), **attributes)
    return _Array(_shape_of(equation), name, order)


@_translation
def _reduce_window_max(graph, equation, images):
    return _pool(graph, equation, images, "MaxPool", -math.inf)


@_translation
def _reduce_window_min(graph, equation, images):
    name = graph.node("Neg", graph.name(images, images.order))
    images = dataclasses.replace(images, stored=name)
    result = _pool(graph, equation, images, "MaxPool", -math.inf)
    return dataclasses.replace(result, stored=graph.node("Neg", result.stored))


@_translation
def _reduce_window_sum(graph, equation, images):
    mean = _pool(graph, equation, images, "AveragePool", 0.0)
    count = graph.constant(float(math.prod(equation.params["window_dimensions"])))
    return dataclasses.replace(mean, stored=graph.node("Mul", mean.stored, count))


def _reduction(operator: str) -> Callable[..., _Array]:
    def translate(graph, equation, operand):
        axes = equation.params["axes"]
        if not axes:
            return operand
        if operand.repeated & set(axes):
            operand = graph.whole(operand)
        name = graph.name(operand, operand.order)
        positions = [operand.order.index(axis) for axis in axes]
        if operator == "ReduceSum":  # The only one whose axes are an input, not an attribute.
            name = graph.node(operator, name, graph.constant(positions), keepdims=0)
        else:
            name = graph.node(operator, name, axes=positions, keepdims=0)
        return _renumbered(operand, name, axes)

    return translate


_TRANSLATIONS |= {
    f"reduce_{name}": _reduction(f"Reduce{name.title()}") for name in ("max", "min", "prod", "sum")
}


def _renumbered(array: _Array, name: str, removed: Sequence[int]) -> _Array:
    """The array without some axes, which `name` lacks already."""
    kept = [axis for axis in range(len(array.shape)) if axis not in removed]
    return _Array(
        tuple(array.shape[axis] for axis in kept),
        name,
        tuple(kept.index(axis) for axis in array.order if axis in kept),
        frozenset(kept.index(axis) for axis in array.repeated if axis in kept),
    )


def _without(graph: _Graph, array: _Array, axes: Sequence[int]) -> _Array:
    """The array without some axes, all of size 1."""
    if not axes:
        return array
    positions = graph.constant([array.order.index(axis) for axis in axes])
    name = graph.node("Squeeze", graph.name(array, array.order), positions)
    return _renumbered(array, name, axes)


@_translation
def _reshape(graph, equation, operand, *_):
    if equation.params["dimensions"] is not None:
        raise _unsupported("reshape of permuted axes")
    shape = _shape_of(equation)
    name = graph.dense(operand, _natural(len(operand.shape)))
    return _Array(shape, graph.reshape(name, operand.shape, shape), _natural(len(shape)))


@_translation
def _rev(graph, equation, operand):
    axes = [operand.order.index(a) for a in equation.params["dimensions"]]
    if not axes:
        return operand
    end = np.iinfo(np.int64).min
    name = graph.node(
        "Slice",
        graph.name(operand, operand.order),
        *(graph.constant([number] * len(axes)) for number in (-1, end)),
        graph.constant(axes),
        graph.constant([-1] * len(axes)),
    )
    return dataclasses.replace(operand, stored=name)


@_translation
def _slice(graph, equation, operand):
    params = equation.params
    strides = params["strides"] or [1] * len(operand.shape)
    return _sliced(graph, operand, params["start_indices"], params["limit_indices"], strides)


def _sliced(graph, array, starts, limits, strides) -> _Array:
    axes = [
        axis
        for axis, size in enumerate(array.shape)
        # Along a repeated axis, all entries are the same one.
        if axis not in array.repeated
        and not (starts[axis] == 0 and limits[axis] == size and strides[axis] == 1)
    ]
    shape = tuple(
        -((start - limit) // stride)
        for start, limit, stride in zip(starts, limits, strides, strict=True)
    )
    name = graph.name(array, array.order)
    if axes:
        name = graph.node(
            "Slice",
            name,
            graph.sizes([starts[axis] for axis in axes]),
            graph.sizes([limits[axis] for axis in axes]),
            graph.constant([array.order.index(axis) for axis in axes]),
            graph.constant([strides[axis] for axis in axes]),
        )
    return _Array(shape, name, array.order, array.repeated)


@_translation
def _split(graph, equation, operand):
    axis, start, parts = equation.params["axis"], 0, []
    for size in equation.params["sizes"]:
        starts, limits = [0] * len(operand.shape), list(operand.shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(_sliced(graph, operand, starts, limits, [1] * len(starts)))
        start = start + size
    return parts


@_translation
def _squeeze(graph, equation, operand):
    return _without(graph, operand, equation.params["dimensions"])


@_translation
def _tile(graph, equation, operand):
    operand, shape = graph.whole(operand), _shape_of(equation)
    times = graph.constant([equation.params["reps"][axis] for axis in operand.order])
    name = graph.node("Tile", graph.name(operand, operand.order), times)
    return _Array(shape, name, operand.order)


@_translation
def _transpose(graph, equation, operand):
    permutation = tuple(equation.params["permutation"])
    return _Array(
        _shape_of(equation),
        operand.stored,
        tuple(permutation.index(axis) for axis in operand.order),
        frozenset(permutation.index(axis) for axis in operand.repeated),
    )
