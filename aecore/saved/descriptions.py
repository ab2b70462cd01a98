"""What a checkpoint says of itself: JSON values, checked before anything relies on them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

REQUIRED = frozenset({"step", "history", "metrics", "checksums", "image_size", "channels"})
"""What the description of a run's checkpoint must have; that of an exported file may lack it."""


def check(description: Any, required: Iterable[str] = ()) -> None:
    """Refuses a description of which a part that aecore uses is not what it should be.

    Models, degradations and settings are checked when they are built from it.

    Args:
      description: what was read.
      required: keys that it must have.

    Raises:
      ValueError: which part, and what it is.
    """
    _require(isinstance(description, Mapping), "description", description)
    missing = sorted(set(required) - description.keys())
    if missing:
        raise ValueError(f"the description lacks {', '.join(missing)}")
    for key, is_right in _CHECKS.items():
        if key in description:
            _require(is_right(description[key]), key, description[key])


def _require(is_right: bool, name: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"the description's {name} can't be {value!r:.80}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _has(value: Any, **checks: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key in value and is_right(value[key]) for key, is_right in checks.items()
    )


def _is_inputs(value: Any) -> bool:
    noise = value.get("noise") if isinstance(value, Mapping) else None
    return isinstance(noise, list) and len(noise) == 2 and all(map(_is_number, noise))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(v) and v for v in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_scores(value: Any) -> bool:
    return _has(value, mse=_is_number, psnr=_is_number, ssim=_is_number, images=_is_count)


_CHECKS = {
    "step": _is_count,
    "channels": lambda value: _is_count(value) and value > 0,
    "image_size": _is_size,
    "inputs": _is_inputs,
    "metrics": lambda value: value is None or _is_scores(value),
    "history": lambda value: (
        isinstance(value, list) and all(_has(v, step=_is_count, mse=_is_number) for v in value)
    ),
    "checksums": _is_mapping,
    "model": _is_mapping,
    "degradation": _is_mapping,
    "data": _is_mapping,
    "optimizer": _is_mapping,
    "training": _is_mapping,
}
