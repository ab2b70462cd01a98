"""What the fields of a description may hold. A file that says otherwise is refused."""

import sys
from collections.abc import Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that floats can hold; NaN and infinity are not."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether a value from JSON can be a number of steps, or of anything else that is counted."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _has(value: Any, **checks: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key in value and is_right(value[key]) for key, is_right in checks.items()
    )


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_inputs(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_range(value[measure]) for measure in ("noise", "blockiness") if measure in value
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_count(v) and v for v in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_scores(value: Any) -> bool:
    return _has(value, mse=is_number, psnr=is_number, ssim=is_number, images=is_count)


CHECKS = {
    "step": is_count,
    "random_streams": is_count,
    "channels": lambda value: is_count(value) and value > 0,
    "image_size": _is_size,
    "inputs": _is_inputs,
    "metrics": _is_scores,
    "history": lambda value: (
        isinstance(value, tuple) and all(_has(v, step=is_count, mse=is_number) for v in value)
    ),
    "checksums": _is_mapping,
    "model": _is_mapping,
    "degradation": _is_mapping,
    "data": _is_mapping,
    "optimizer": _is_mapping,
    "training": _is_mapping,
    "started_from": _is_mapping,
    "unlogged": lambda value: isinstance(value, tuple) and all(map(is_number, value)),
    "seconds": is_number,
    "time": lambda value: (
        isinstance(value, Mapping) and all(is_number(item) for item in value.values())
    ),
    "images_per_second": is_number,
}
"""By field, whether a value that isn't None is possible."""

OF_RUN = frozenset({"step", "history", "metrics", "checksums", "image_size", "channels"})
"""Fields that the description of a run's checkpoint must have."""
