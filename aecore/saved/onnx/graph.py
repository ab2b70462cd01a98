"""The graph that is being written, and the arrays that it computes."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx

from aecore.errors import ConfigError

INPUT = "images"
"""The name of the graph's input."""

Size = Any
"""An int, or JAX's symbolic expression of `b`, `h` and `w`."""


@dataclasses.dataclass(frozen=True)
class Array:
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


class Graph:
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
        kind = kind_of(array.dtype)
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
            side = self.node("Shape", INPUT, start=axis, end=axis + 1)
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
        sides = self.node("Shape", INPUT, start=1, end=3)
        if scale > 1:
            sides = self.node("Mul", sides, self.constant(scale))
        return self.node("Slice", name, self.constant([0, 0]), sides, self.constant([1, 2]))

    # Arrays

    def name(self, array: Array, order: tuple[int, ...]) -> str:
        """The array, stored in this order, with size 1 along the repeated axes."""
        if not isinstance(array.stored, str):
            return self.constant(np.transpose(array.stored, order))
        if array.order == order:
            return array.stored
        return self.node(
            "Transpose", array.stored, perm=[array.order.index(axis) for axis in order]
        )

    def whole(self, array: Array) -> Array:
        """The array without repeated axes."""
        if not array.repeated:
            return array
        sizes = [array.shape[axis] if axis in array.repeated else 1 for axis in array.order]
        name = self.node("Expand", self.name(array, array.order), self.sizes(sizes))
        return Array(array.shape, name, array.order)

    def dense(self, array: Array, order: tuple[int, ...]) -> str:
        """The array in full, stored in this order."""
        return self.name(self.whole(array), order)

    def unsqueezed(self, array: Array, axes: Sequence[int]) -> str:
        """The array in its natural order, with new axes of size 1."""
        name = self.name(array, natural(len(array.shape)))
        return self.node("Unsqueeze", name, self.constant(axes)) if axes else name

    # Sizes

    def sizes(self, sizes: Sequence[Size]) -> str:
        """An int64 vector of sizes."""
        if all(map(is_static, sizes)):
            return self.constant(np.array(sizes, int))
        return self.node("Concat", *map(self._size, sizes), axis=0)

    def scalar(self, size: Size) -> str:
        """A size as an int64 scalar."""
        return self.node("Squeeze", self._size(size), self.constant([0]))

    def _size(self, size: Size) -> str:
        if is_static(size):
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
                raise unsupported(f"the size {ast.unparse(tree)}")
        left, right = self._expression(left), self._expression(right)
        if operator == "floordiv":
            # ONNX rounds a quotient towards 0; its remainder has the divisor's sign.
            left = self.node("Sub", left, self.node("Mod", left, right))
        names = dict(add="Add", sub="Sub", mult="Mul", mod="Mod", max="Max", min="Min")
        names["floordiv"] = "Div"
        if operator not in names:
            raise unsupported(f"the size {ast.unparse(tree)}")
        return self.node(names[operator], left, right)


def kind_of(dtype: Any) -> str:
    """How the graph stores numbers of a type: float, int or bool."""
    for kind, parent in (("float", jnp.floating), ("int", jnp.integer), ("bool", np.bool_)):
        if jnp.issubdtype(dtype, parent):
            return kind
    raise unsupported(f"numbers of type {dtype}")


def unsupported(what: str) -> ConfigError:
    """Of something that a network uses."""
    return ConfigError(
        f"the network uses {what}, which aecore can't write as ONNX; export without --format onnx"
    )


def natural(rank: int) -> tuple[int, ...]:
    """The order in which an array's axes are in JAX."""
    return tuple(range(rank))


def is_static(size: Size) -> bool:
    """Whether a size depends on no image."""
    return isinstance(size, (int, np.integer))


def shape_of(equation: Any) -> tuple[Size, ...]:
    """Of an equation's first result."""
    return tuple(equation.outvars[0].aval.shape)
