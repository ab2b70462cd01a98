"""What the fields of a description may hold. A file that says otherwise is refused."""

import math
from collections.abc import Mapping
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _has(value: Any, **checks: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key in value and is_right(value[key]) for key, is_right in checks.items()
    )


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_inputs(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_range(value[measure]) for measure in ("noise", "blockiness") if measure in value
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_count(v) and v for v in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_scores(value: Any) -> bool:
    return _has(value, mse=_is_number, psnr=_is_number, ssim=_is_number, images=_is_count)


CHECKS = {
    "step": _is_count,
    "random_streams": _is_count,
    "channels": lambda value: _is_count(value) and value > 0,
    "image_size": _is_size,
    "inputs": _is_inputs,
    "metrics": _is_scores,
    "history": lambda value: (
        isinstance(value, tuple) and all(_has(v, step=_is_count, mse=_is_number) for v in value)
    ),
    "checksums": _is_mapping,
    "model": _is_mapping,
    "degradation": _is_mapping,
    "data": _is_mapping,
    "optimizer": _is_mapping,
    "training": _is_mapping,
    "started_from": _is_mapping,
    "unlogged": lambda value: isinstance(value, tuple) and all(map(_is_number, value)),
    "seconds": _is_number,
    "time": lambda value: (
        isinstance(value, Mapping) and all(_is_number(item) for item in value.values())
    ),
    "images_per_second": _is_number,
}
"""By field, whether a value that isn't None is possible."""

OF_RUN = frozenset({"step", "history", "metrics", "checksums", "image_size", "channels"})
"""Fields that the description of a run's checkpoint must have."""
