"""Adds what a function does, as JAX traced it, to a graph."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from aecore.saved.onnx import elementwise, primitives, windows
from aecore.saved.onnx.graph import Array, Graph, is_static, natural, unsupported

_INLINED = ("checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat2")
"""Primitives that apply a function which they hold."""


def translate(graph: Graph, trace: Any, arguments: Sequence[Array]) -> list[Array]:
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


def _constant(value: Any) -> Array:
    # An array of random keys has no values that NumPy can hold, and stays as it is.
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended)
    array: Any = value if is_key else np.asarray(value)
    return Array(array.shape, array, natural(array.ndim))


def _translate_equation(graph: Graph, equation: Any, operands: Sequence[Array]) -> Sequence[Array]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        return translate(graph, params.get("jaxpr") or params["call_jaxpr"], operands)
    if name == "platform_index":
        # Which of the platforms' functions is meant; the default one is listed under None.
        if None not in params["platforms"]:
            raise unsupported(f"code for {params['platforms']} alone")
        return [_constant(np.int32(params["platforms"].index(None)))]
    if name == "cond" and operands[0].is_constant:
        branches = params["branches"]
        index = min(max(int(operands[0].stored), 0), len(branches) - 1)
        return translate(graph, branches[index], operands[1:])

    shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
    static = all(is_static(size) for shape in shapes for size in shape)
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
        return translate(graph, jax.make_jaxpr(rewritten)(*arguments), operands)
    if name in elementwise.OPERATORS:
        return [elementwise.translate(graph, equation, operands, shapes[0])]
    if name not in _TRANSLATIONS:
        raise unsupported(name)
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


_TRANSLATIONS: dict[str, Callable[..., Array]] = {
    translation.__name__: translation
    for translation in (
        primitives.broadcast_in_dim,
        primitives.concatenate,
        primitives.dim_as_value,
        primitives.dot_general,
        primitives.gather,
        primitives.iota,
        primitives.pad,
        primitives.reduce_max,
        primitives.reduce_sum,
        primitives.reshape,
        primitives.slice,
        primitives.transpose,
        windows.conv_general_dilated,
        windows.reduce_window_max,
        windows.reduce_window_sum,
    )
}
"""For each of the other primitives, makes of `(graph, equation, *operands)` its result."""
