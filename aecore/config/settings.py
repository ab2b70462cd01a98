"""Fields of frozen dataclasses: their types and bounds, and whether a resumed run may change them.

A setting has one home. Its annotation says its type and its choices; `setting` adds its bounds and
what happens on resume; `check` holds an object to all of that.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from aecore.degradations.base import make_plain
from aecore.errors import ConfigError


class OnResume(enum.Enum):
    """Whether a run may be resumed with another value of a setting."""

    FIXED = "it decides what is learned"
    FREE = "it doesn't change what is learned"
    SAME_RATES = "allowed while the learning rates of all finished steps stay the same"


_METADATA = "aecore"

_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "below": ("below", lambda value, bound: value < bound),
}


def setting(
    default: Any,
    *,
    on_resume: OnResume = OnResume.FIXED,
    of_host: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with bounds; tuples have them for each number, None is always in bounds.

    Args:
      default: its value where none is given.
      on_resume: whether a resumed run may change it.
      of_host: whether each host of a training may have its own.
      at_least: the lowest value.
      above: a bound that values must exceed.
      below: a bound that values must stay below.
    """
    bounds = {"at_least": at_least, "above": above, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {_METADATA: {"bounds": given, "on_resume": on_resume, "of_host": of_host}}
    return dataclasses.field(default=default, metadata=metadata)


def on_resume(field: dataclasses.Field) -> OnResume:
    """What `setting` said; fields made otherwise are fixed."""
    return field.metadata.get(_METADATA, {}).get("on_resume", OnResume.FIXED)


def is_of_host(field: dataclasses.Field) -> bool:
    """Whether each host of a training may have its own value."""
    return field.metadata.get(_METADATA, {}).get("of_host", False)


def check(settings: Any, owner: str) -> None:
    """Checks an object's fields against their annotations and bounds.

    NumPy's numbers become Python's first, and lists and arrays tuples. Whole numbers count as
    numbers, booleans don't, and numbers must be finite. Types other than numbers, text, booleans,
    None, tuples and `Literal` are left to whoever uses them.

    Args:
      settings: a dataclass instance.
      owner: what comes before a field's name in messages, such as `training.`.

    Raises:
      ConfigError: names the field, its value, and what it may be.
    """
    for field, hint in _fields(type(settings)):
        value = make_plain(settings, field.name)
        name = f"{owner}{field.name}"
        if not _fits(value, hint):
            raise ConfigError(f"{name} {value!r} is not possible; use {_describe(hint)}")
        for bound, limit in field.metadata.get(_METADATA, {}).get("bounds", {}).items():
            words, holds = _BOUNDS[bound]
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number is None or holds(number, limit) for number in numbers):
                raise ConfigError(f"{name} {value} is out of bounds; use {words} {limit}")


@functools.cache
def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if typing.get_origin(hint) is Literal:
        return any(value is c or (type(value) is type(c) and value == c) for c in hint.__args__)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = typing.get_args(hint)
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return _is_number(value, (int, float)) and math.isfinite(value)
    if hint is int:
        return _is_number(value, int)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _describe(hint: Any) -> str:
    """What a value may be, in words."""
    if _is_union(hint):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, hint.__args__))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        one = _describe(parts[0]).removeprefix("a ")
        return f"{one}s" if parts[-1] is Ellipsis else f"{len(parts)} {one}s"
    names = {type(None): "None", float: "a number", int: "a whole number", str: "text"}
    return names.get(
        hint, "True or False" if hint is bool else getattr(hint, "__name__", str(hint))
    )
