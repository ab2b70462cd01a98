"""A degradation from text, as it is written in Python."""

import ast
import operator
from collections.abc import Callable
from typing import Any

from aecore.degradations.base import REGISTRY, Degradation
from aecore.errors import ConfigError

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parse(text: str) -> Degradation:
    """Reads a degradation such as `GaussianNoise(25 / 255, clip=False)`.

    Nothing is run: there may be registered degradations, one in another, numbers and the four
    operations on them, strings, True, False, None, and tuples.

    Raises:
      ConfigError: it is not such a text, or the degradation can't have these settings.
    """
    try:
        if not isinstance(text, str):
            raise TypeError("it is no text")
        degradation = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        # Of a syntax error, without a file and a line that nobody wrote.
        why = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"degradation {text!r} can't be read: {why}; write it as in Python, such as "
            "'GaussianNoise(25 / 255, clip=False)'"
        ) from error
    if not isinstance(degradation, Degradation):
        raise ConfigError(
            f"{text!r} is no degradation; write one such as 'GaussianNoise(25 / 255)'"
        )
    return degradation


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Tuple(elements) | ast.List(elements):
            return tuple(map(_value, elements))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.UnaryOp(ast.UAdd(), operand):
            return +_value(operand)
        case ast.Name(name) if name in REGISTRY:
            raise ValueError(f"to use the defaults of {name}, write {name}()")
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_value(left), _value(right))
        case ast.Call(ast.Name(name), args, keywords):
            if name not in REGISTRY:
                known = ", ".join(sorted(REGISTRY))
                raise ValueError(f"there is no degradation {name}, only {known}")
            named = {}
            for keyword in keywords:
                if keyword.arg is None:
                    raise ValueError(f"**{ast.unparse(keyword.value)} is not allowed")
                named[keyword.arg] = _value(keyword.value)
            return REGISTRY[name](*map(_value, args), **named)
    raise ValueError(f"{ast.unparse(node)} is not allowed")
