"""The matrices that describe a layer's inputs: checks, dead columns, order, damping, Cholesky."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.hessian import factor_and_invert, first_fault
from corequant._cpu.threads import for_rows
from corequant._validation import check_finite, check_floating, check_numpy
from corequant.errors import HessianError, ShapeError

__all__ = [
    "SLACK",
    "Damping",
    "Factor",
    "asymmetric",
    "check_cross_moment",
    "check_hessian",
    "column_order",
    "damped",
    "damped_factor",
    "foreign",
    "indefinite",
    "lanczos",
    "largest_eigenvalue",
    "mean_diagonal",
    "misshapen",
]

Array = npt.NDArray[Any]
T = TypeVar("T")

_PANEL = 128
SLACK = 1e-3
"""Largest asymmetry allowed, relative to the geometric mean of two diagonal entries; sums of
float32 products taken in another order differ by less than 1e-4 of it."""

_LEAST_STEPS, _MOST_STEPS, _TOLERANCE = 12, 48, 1e-4
"""Steps of Lanczos' method, and the relative change with which it ends."""


def check_hessian(H: Any, d: int, name: str) -> Array:
    """Return H, in a native dtype, if it can be a matrix of second moments (d, d)."""
    H = _check_square("H", H, d, name)
    diagonal = np.diagonal(H).astype(np.float64)
    if d and diagonal.min() < 0:
        j = int(np.argmin(diagonal))
        raise indefinite(name, diagonal[j], j, j)
    root, found = np.sqrt(diagonal), np.empty((d, 2), np.int64)
    native = H.astype(H.dtype.newbyteorder("="), copy=False)
    working: Array = (
        native if native.dtype.kind == "f" and native.itemsize > 2 else H.astype(np.float32)
    )
    for_rows(d, d, lambda first, last: first_fault(first, last, working, root, SLACK, found))
    rows = [(k, int(i)) for k in (0, 1) for i in np.flatnonzero(found[:, k] < d)[:1]]
    if not rows:
        return working
    kind, i = rows[0]
    j = int(found[i, kind])
    if kind == 0:
        raise asymmetric(name, H[i, j], H[j, i], i, j)
    raise indefinite(name, H[i, j], i, j, diagonal)


def asymmetric(name: str, entry: Any, other: Any, i: int, j: int) -> HessianError:
    """Return the error of an H whose entries (i, j) and (j, i) differ."""
    return HessianError(
        f"H of {name} must be symmetric, got {float(entry):.7g} at ({i}, {j}) and "
        f"{float(other):.7g} transposed"
    )


def indefinite(name: str, entry: Any, i: int, j: int, diagonal: Any = None) -> HessianError:
    """Return the error of an H with an entry that second moments can't have."""
    context = ""
    if diagonal is not None:
        a, b = float(diagonal[i]), float(diagonal[j])
        context = f" with {a:.6g} and {b:.6g} on the diagonal"
    return HessianError(
        f"H of {name} must be positive semidefinite, got {float(entry):.6g} at ({i}, {j}){context}"
    )


def foreign(name: str, column: int) -> HessianError:
    """Return the error of a G with a nonzero column where H's is zero."""
    return HessianError(
        f"G of {name} must be zero in columns where H is, got column {column} nonzero"
    )


def misshapen(argument: str, name: str, shape: Any, d: int) -> ShapeError:
    """Return the error of a matrix that isn't (d, d)."""
    return ShapeError(
        f"{argument} of {name} must be (d, d) with d={d}, the columns of W, got {tuple(shape)}"
    )


def check_cross_moment(G: Any, H: Array, name: str) -> Array:
    """Return G if it is a finite (d, d) matrix that fits H."""
    checked = _check_square("G", G, len(H), name)
    G = checked
    dead = np.diagonal(H) == 0
    if dead.any() and (lost := np.argwhere(np.abs(G[:, dead]).max(0) > 0)).size:
        raise foreign(name, int(np.flatnonzero(dead)[lost[0, 0]]))
    return checked


def _check_square(argument: str, matrix: Any, d: int, name: str) -> Array:
    check_numpy(argument, matrix)
    check_floating(argument, matrix)
    if matrix.shape != (d, d):
        raise misshapen(argument, name, matrix.shape, d)
    check_finite(f"{argument} of {name}", matrix)
    checked: Array = matrix
    return checked


def column_order(
    diagonal: Array, dead: npt.NDArray[np.bool_], act_order: bool, group: int
) -> Array:
    """Return the columns in reverse order of their rounding, int64 (d,), by H's diagonal.

    With ``act_order`` the column of the largest H_jj is rounded first; otherwise the first. Where
    ``group`` is not zero, groups stay together and are ordered by their means. Dead columns are
    rounded last.
    """
    d = len(diagonal)
    natural = np.arange(d)[::-1]
    if not act_order:
        return natural
    score = np.where(dead, -1.0, diagonal.astype(np.float64))
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


def largest_eigenvalue(H: Array) -> float:
    """Return the largest eigenvalue of a positive semidefinite H, to about 1e-4 of itself."""
    if not H.any():
        return 0.0
    sums = np.abs(H).sum(1, dtype=np.float64) / float(np.abs(H).max())
    return lanczos(lambda v: (H @ v.astype(H.dtype)).astype(np.float64), sums)


def lanczos(product: Callable[[Array], Array], sums: Array) -> float:
    """Return the largest eigenvalue of a matrix by Lanczos' method with full orthogonalization.

    Not ``scipy.sparse.linalg.eigsh``: where eigenvalues are equal, ARPACK restarts from vectors
    that differ from call to call, and it takes nearly as long.

    Parameters
    ----------
    product : callable
        Returns ``H v`` of a vector v (d,), float64; H is positive semidefinite and not zero.
    sums : numpy.ndarray (d,), float64
        Proportional to the row sums of |H|. The first vector is half-way between them and a random
        direction, since sums alone can be orthogonal to the eigenvector.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    drawn = np.random.default_rng(0).standard_normal(len(sums))
    vector = sums / np.linalg.norm(sums) + drawn / np.linalg.norm(drawn)
    vector = vector / np.linalg.norm(vector)
    basis, largest = np.empty((0, len(sums))), 0.0
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    while len(basis) < min(len(sums), _MOST_STEPS):
        basis = np.vstack([basis, vector])
        image = product(vector)
        diagonal.append(float(vector @ image))
        for _ in range(2):
            image -= basis.T @ (basis @ image)
        found = eigvalsh_tridiagonal(np.array(diagonal), np.array(offdiagonal))
        before, largest = largest, float(found[-1])
        rest = float(np.linalg.norm(image))
        settled = len(basis) >= _LEAST_STEPS and largest - before <= _TOLERANCE * largest
        if settled or rest <= 1e-12 * abs(largest):
            break
        offdiagonal.append(rest)
        vector = image / rest
    return largest


@dataclass(frozen=True, eq=False)
class Factor:
    """``L Lᵀ = A`` (d, d) with the inverses of the blocks on L's diagonal (panels, b, b).

    In panels of 128 columns nearly all of the work is matrix products; the blocks are factored in
    float64.
    """

    L: Array
    inverses: Array

    @classmethod
    def of(cls, A: Array) -> Factor | None:
        """Factor a symmetric matrix, which is overwritten; None if it isn't definite.

        What is above the blocks on its diagonal is not read.
        """
        panels = _panels(len(A))
        inverses = np.zeros((len(panels), _PANEL, _PANEL), A.dtype)
        for k, (a, b) in enumerate(panels):
            A[a:, a:b] -= A[a:, :a] @ A[a:b, :a].T
            lower, inverse = np.empty((2, b - a, b - a), A.dtype)
            if not factor_and_invert(A[a:b, a:b], lower, inverse):
                return None
            A[a:b, a:b] = lower
            inverses[k, : b - a, : b - a] = inverse
            A[b:, a:b] = A[b:, a:b] @ inverse.T
            A[a:b, b:] = 0
        return cls(A, inverses)

    def forward(self, X: Array) -> Array:
        """Return ``X L⁻ᵀ``; X (rows, d) is overwritten."""
        for k, (a, b) in enumerate(_panels(len(self.L))):
            X[:, a:b] -= X[:, :a] @ self.L[a:b, :a].T
            X[:, a:b] = X[:, a:b] @ self.inverses[k, : b - a, : b - a].T
        return X

    def backward(self, X: Array) -> Array:
        """Return ``X L⁻¹``; X (rows, d) is overwritten."""
        for k, (a, b) in reversed(list(enumerate(_panels(len(self.L))))):
            X[:, a:b] -= X[:, b:] @ self.L[b:, a:b]
            X[:, a:b] = X[:, a:b] @ self.inverses[k, : b - a, : b - a]
        return X


def _panels(d: int) -> list[tuple[int, int]]:
    return [(a, min(a + _PANEL, d)) for a in range(0, d, _PANEL)]


def mean_diagonal(diagonal: Array, dead: npt.NDArray[np.bool_]) -> float:
    """Return the mean of H_jj over columns that aren't dead; 1 if all are."""
    return 1.0 if dead.all() else float(diagonal[~dead].mean(dtype=np.float64))


@dataclass(frozen=True)
class Damping:
    """The addition to the diagonal of H.

    Attributes
    ----------
    value : float
        The addition.
    relative : float
        The same, divided by the mean of the diagonal.
    tries : int
        Number of factorizations; 1 unless H was not positive definite enough.
    """

    value: float
    relative: float
    tries: int


def damped_factor(
    H: Array,
    order: Array,
    dead: npt.NDArray[np.bool_],
    value: float,
    dtype: np.dtype[Any],
    name: str,
) -> tuple[Factor, Damping]:
    """Return the factor of ``H[order][:, order] + damping`` and the damping that it took.

    Dead columns get the mean of the diagonal.
    """
    diagonal = np.diagonal(H).astype(np.float64)
    mean = mean_diagonal(diagonal, dead)

    def attempt(value: float) -> Factor | None:
        # The factor reads what is below the diagonal and the blocks on it.
        A = np.empty(H.shape, dtype)
        for a, b in _panels(len(H)):
            A[a:b, :b] = np.take(H[order[a:b]], order[:b], axis=1)
        position = np.arange(len(H))
        A[position, position] = np.where(dead, mean, diagonal)[order] + value
        return Factor.of(A)

    return damped(attempt, value, mean, float(np.finfo(dtype).eps), name)


def damped(
    attempt: Callable[[float], T | None], value: float, mean: float, eps: float, name: str
) -> tuple[T, Damping]:
    """Return the result of ``attempt`` and the damping that it took.

    An attempt that gives None is repeated with ten times the damping, up to ``mean``, the mean of
    the diagonal; ``eps`` is the working precision.
    """
    tries = 0
    while tries == 0 or value <= mean:
        tries += 1
        factor = attempt(value)
        if factor is not None:
            return factor, Damping(value, value / mean, tries)
        value = max(value * 10, mean * eps)
    raise HessianError(
        f"H of {name} must be positive semidefinite: Cholesky failed {tries} times, at last "
        f"with {value / 10:.3g} added to the diagonal, whose mean is {mean:.3g}; collect it from "
        "more tokens, or in float64"
    )
