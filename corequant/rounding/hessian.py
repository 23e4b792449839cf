"""The matrices that describe a layer's inputs: checks, dead columns, order, damping, Cholesky."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, lapack

from corequant._numba.moments import first_fault
from corequant._threads import for_rows
from corequant._validation import check_finite, check_floating, is_floating
from corequant.errors import HessianError, ShapeError
from corequant.rounding.report import Damping

__all__ = [
    "check_cross_moment",
    "check_hessian",
    "column_order",
    "damped_factor",
    "largest_eigenvalue",
    "solve_factored",
]

Array = npt.NDArray[Any]

_PANEL = 256
_TRIES = 12
_SLACK = 1e-3
"""Largest asymmetry allowed, relative to the geometric mean of two diagonal entries; sums of
float32 products taken in another order differ by less than 1e-4 of it."""


def check_hessian(H: Any, d: int, name: str) -> Array:
    """Return H, in a native dtype, if it can be a matrix of second moments (d, d)."""
    H = _check_square("H", H, d, name)
    diagonal = np.diagonal(H).astype(np.float64)
    if d and diagonal.min() < 0:
        j = int(np.argmin(diagonal))
        raise HessianError(
            f"H of {name} must be positive semidefinite, got {diagonal[j]:.6g} at ({j}, {j})"
        )
    root, found = np.sqrt(diagonal), np.empty((d, 2), np.int64)
    native = H.astype(H.dtype.newbyteorder("="), copy=False)
    working = native if native.dtype.kind == "f" and native.itemsize > 2 else H.astype(np.float32)
    for_rows(d, d, lambda first, last: first_fault(first, last, working, root, _SLACK, found))
    faults = [(i, int(found[i, k]), k) for k in (0, 1) for i in np.flatnonzero(found[:, k] < d)[:1]]
    if not faults:
        return working
    i, j, kind = faults[0]
    if kind == 0:
        raise HessianError(
            f"H of {name} must be symmetric, got {H[i, j]} at ({i}, {j}) and {H[j, i]} transposed"
        )
    raise HessianError(
        f"H of {name} must be positive semidefinite, got {H[i, j]} at ({i}, {j}) with "
        f"{diagonal[i]:.6g} and {diagonal[j]:.6g} on the diagonal"
    )


def check_cross_moment(G: Any, H: Array, name: str) -> Array:
    """Return G if it is a finite (d, d) matrix that fits H."""
    G = _check_square("G", G, len(H), name)
    dead = np.diagonal(H) == 0
    if dead.any() and (lost := np.argwhere(np.abs(G[:, dead]).max(0) > 0)).size:
        j = int(np.flatnonzero(dead)[lost[0, 0]])
        raise HessianError(
            f"G of {name} must belong to H's inputs, got column {j} of G nonzero where H has zeros"
        )
    return G


def _check_square(argument: str, matrix: Any, d: int, name: str) -> Array:
    if not isinstance(matrix, np.ndarray):
        raise TypeError(f"{argument} must be a numpy.ndarray, got {type(matrix).__name__}")
    if not is_floating(matrix.dtype):
        check_floating(argument, matrix)
    if matrix.shape != (d, d):
        raise ShapeError(
            f"{argument} of {name} must be (d, d) with d={d} as W has columns, got {matrix.shape}"
        )
    check_finite(f"{argument} of {name}", matrix)
    return matrix


def column_order(H: Array, dead: npt.NDArray[np.bool_], act_order: bool, group: int) -> Array:
    """Return the columns in reverse order of their rounding, int64 (d,).

    With ``act_order`` the column of the largest H_jj is rounded first; otherwise the first. Where
    ``group`` is not zero, groups stay together and are ordered by their means. Dead columns are
    rounded last.
    """
    d = len(H)
    natural = np.arange(d)[::-1]
    if not act_order:
        return natural
    score = np.where(dead, -1.0, np.diagonal(H).astype(np.float64))
    if not group:
        return natural[np.argsort(score[::-1], kind="stable")]
    means = score.reshape(-1, group).mean(1)
    order = np.argsort(means[::-1], kind="stable")
    groups = np.arange(d // group)[::-1][order]
    return np.concatenate(
        [g * group + column_order_within(score[g * group : (g + 1) * group]) for g in groups]
    )


def column_order_within(score: Array) -> Array:
    """Return the indices of ascending scores; of equal ones the last first."""
    order: Array = len(score) - 1 - np.argsort(score[::-1], kind="stable")
    return order


def largest_eigenvalue(H: Array, tolerance: float = 1e-4, steps: int = 30) -> float:
    """Return the largest eigenvalue of H by power iteration from the row sums of |H|."""
    if not len(H):
        return 0.0
    vector = np.abs(H).sum(1, dtype=np.float64)
    value = 0.0
    for _ in range(steps):
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            return 0.0
        vector = (H @ (vector / norm).astype(H.dtype)).astype(np.float64)
        before, value = value, float(np.linalg.norm(vector))
        if abs(value - before) <= tolerance * value:
            break
    return value


def damped_factor(
    H: Array,
    order: Array,
    dead: npt.NDArray[np.bool_],
    value: float,
    dtype: np.dtype[Any],
    name: str,
) -> tuple[Array, Damping]:
    """Return L with ``L Lᵀ = H[order][:, order] + damping`` and the damping that it took.

    Dead columns get the mean of the diagonal. A factorization that fails is repeated with ten
    times the damping, up to the mean of the diagonal.
    """
    diagonal = np.diagonal(H).astype(np.float64)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    floor = mean * float(np.finfo(dtype).eps)
    for attempt in range(1, _TRIES + 1):
        A = np.empty(H.shape, dtype)
        for start in range(0, len(H), _PANEL):
            A[start : start + _PANEL] = H[np.ix_(order[start : start + _PANEL], order)]
        position = np.arange(len(H))
        A[position, position] = np.where(dead, mean, diagonal)[order] + value
        if _factor(A):
            return A, Damping(value, value / mean, attempt)
        value = max(value * 10, floor)
        if value > 10 * mean:
            break
    raise HessianError(
        f"H of {name} must be positive semidefinite: Cholesky failed {attempt} times, at last "
        f"with {value / 10:.3g} added to the diagonal, whose mean is {mean:.3g}; collect it from "
        "more tokens, or in float64"
    )


def _factor(A: Array) -> bool:
    """Replace a symmetric matrix by its lower Cholesky factor; False if it isn't definite.

    In panels, so that nearly all of the work is matrix products, whose results don't depend on
    the number of threads.
    """
    potrf, trsm = lapack.get_lapack_funcs(("potrf",), (A,))[0], blas.get_blas_funcs("trsm", (A,))
    for a in range(0, len(A), _PANEL):
        b = min(a + _PANEL, len(A))
        A[a:, a:b] -= A[a:, :a] @ A[a:b, :a].T
        square, info = potrf(A[a:b, a:b].T, lower=False, clean=True)
        if info or not np.isfinite(square).all():
            return False
        A[a:b, a:b] = square.T
        # X Lᵀ = A for the rows below, as L Xᵀ = Aᵀ.
        A[b:, a:b] = trsm(1.0, square, A[b:, a:b].T, lower=False, trans_a=True).T
        A[a:b, b:] = 0
    return True


def solve_factored(L: Array, B: Array, skip_last: bool = False) -> Array:
    """Return ``B (L Lᵀ)⁻¹`` (rows, d), of the leading block without the last column on request."""
    trsm = blas.get_blas_funcs("trsm", (L,))
    X = np.array(B, L.dtype)
    d = len(L)
    panels = [(a, min(a + _PANEL, d)) for a in range(0, d, _PANEL)]
    for a, b in panels:
        X[:, a:b] -= X[:, :a] @ L[a:b, :a].T
        square = np.asfortranarray(L[a:b, a:b].T)
        X[:, a:b] = trsm(1.0, square, X[:, a:b].T, lower=False, trans_a=True).T
    if skip_last:
        X[:, -1] = 0
    for a, b in reversed(panels):
        X[:, a:b] -= X[:, b:] @ L[b:, a:b]
        square = np.asfortranarray(L[a:b, a:b].T)
        X[:, a:b] = trsm(1.0, square, X[:, a:b].T, lower=False).T
    return X
