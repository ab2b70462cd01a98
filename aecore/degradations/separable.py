"""Linear operators that work along the height and along the width of `(B, H, W, C)` images."""

from collections.abc import Callable
from typing import Any

import numpy as np

from aecore.degradations.base import Array, Ops


def separable(images: Array, rows: Array, columns: Array, ops: Ops) -> Array:
    """Multiplies heights and widths by `([B,] new, old)` matrices."""
    batch = "b" if len(rows.shape) == 3 else ""
    images = ops.einsum(f"{batch}ij,bjwc->biwc", rows, images)
    return ops.einsum(f"{batch}ij,bhjc->bhic", columns, images)


def namespace(parameter: Array, ops: Ops) -> tuple[Any, Callable]:
    """NumPy for a plain number, so that its matrix is a constant; otherwise the ops' own."""
    return (np, np.einsum) if isinstance(parameter, (int, float)) else (ops.xp, ops.einsum)


def as_matrices(parameter: Array) -> Array:
    """`(B, 1, 1, 1)` values as `(B, 1, 1)`, which broadcast against matrices."""
    return np.float32(parameter) if isinstance(parameter, (int, float)) else parameter[..., 0]
