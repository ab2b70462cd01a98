"""Kernels of the convolutions from, to and between an image's phases, made of `(3, 3, C, K)` ones.

From P phases to Q, they are `(T, P C, Q K)`: a matrix for each of T taps.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Taps = tuple[tuple[int, int], ...]
"""Displacements `(di, dj)`: output `(i, j)` depends on pixel `(i + di, j + dj)`."""

ALL: Taps = tuple((di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1))
BEFORE: Taps = tuple((di, dj) for di in (-1, 0) for dj in (-1, 0))
AFTER: Taps = tuple((di, dj) for di in (0, 1) for dj in (0, 1))


def opposite(kernel: jax.Array) -> jax.Array:
    """The kernel that takes a convolution's outputs back: `(n, n, C, K)` to `(n, n, K, C)`.

    If images and gradients are exchanged, the kernel's gradient is that of this one.
    """
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def as_square(kernel: jax.Array) -> jax.Array:
    """`(n², C, K)` taps as `(n, n, C, K)`."""
    side = math.isqrt(len(kernel))
    return kernel.reshape(side, side, *kernel.shape[1:])


def strided(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `AFTER`, that gives a strided convolution from an image's phases.

    Output i depends on pixels 2 i + n, n = 0, 1, 2.
    """
    rows = np.zeros((3, 2, 2, 1), np.float32)
    for n in range(3):
        rows[n, n // 2, n % 2, 0] = 1
    return _place(_outer(rows), kernel)


def transposed(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `BEFORE`, that gives a transposed convolution's phases from an image.

    Output 2 i depends on pixels i - 1 (n = 0) and i (n = 2), output 2 i + 1 on pixel i (n = 1).
    """
    rows = np.zeros((3, 2, 1, 2), np.float32)
    rows[0, 0, 0, 0] = rows[2, 1, 0, 0] = rows[1, 1, 0, 1] = 1
    return _place(_outer(rows), kernel)


def on_phases(kernel: jax.Array) -> jax.Array:
    """The kernel, with taps `ALL`, that gives a convolution's phases from an image's phases.

    Output 2 i + q depends on pixels 2 i + q + n - 1, n = 0, 1, 2.
    """
    rows = np.zeros((3, 3, 2, 2), np.float32)
    for n in range(3):
        for q in range(2):
            tap, phase = divmod(q + n - 1, 2)
            rows[n, tap + 1, phase, q] = 1
    return _place(_outer(rows), kernel)


def _outer(rows: np.ndarray) -> np.ndarray:
    """The selection for both axes, from that for one axis, `(3, taps, phases, phases)`."""
    n, t, p, q = rows.shape
    return np.einsum("ntpq,NTPQ->nNtTpPqQ", rows, rows).reshape(n * n, t * t, p * p, q * q)


_ZEROS = 9
"""The number of a matrix of zeros, after those of a kernel's nine matrices."""


def _place(selection: np.ndarray, kernel: jax.Array) -> jax.Array:
    """Puts the nine `(C, K)` matrices of a kernel where `(9, T, P, Q)` `selection` has ones.

    The result is `(T, P C, Q K)`: T taps from P to Q phases. No place may have two matrices, and
    all matrices must have equally many places.
    """
    taps, phases_in, phases_out = selection.shape[1:]
    channels, features = kernel.shape[2:]
    numbers = np.where(selection.any(0), selection.argmax(0), _ZEROS).flatten()
    taken: Any = _take(kernel.reshape(9, channels, features), tuple(numbers.tolist()))
    placed = taken.reshape(taps, phases_in, phases_out, channels, features)
    return placed.transpose(0, 1, 3, 2, 4).reshape(taps, phases_in * channels, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _take(matrices: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
    """Picks matrices by number, and zeros for `_ZEROS`; each of the nine equally often."""
    return jnp.concatenate([matrices, jnp.zeros_like(matrices[:1])])[np.array(numbers)]


def _take_forward(matrices, numbers):
    return _take(matrices, numbers), None


def _take_backward(numbers, _, cotangent):
    # Picked and summed rather than scattered: that is slow, and adds in any order on GPUs.
    places = np.stack([np.flatnonzero(np.equal(numbers, n)) for n in range(_ZEROS)])
    return (cotangent[places].sum(1),)


_take.defvjp(_take_forward, _take_backward)
