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
from corequant.rounding.report import Damping

__all__ = [
    "SLACK",
    "Factor",
    "asymmetric",
    "check_cross_moment",
    "check_hessian",
    "column_order",
    "damped",
    "damped_factor",
    "foreign",
    "indefinite",
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
    """Return the error of an H with an entry that no matrix of second moments has."""
    beside = ""
    if diagonal is not None:
        a, b = float(diagonal[i]), float(diagonal[j])
        beside = f" with {a:.6g} and {b:.6g} on the diagonal"
    return HessianError(
        f"H of {name} must be positive semidefinite, got {float(entry):.6g} at ({i}, {j}){beside}"
    )


def foreign(name: str, column: int) -> HessianError:
    """Return the error of a G that isn't zero where H is."""
    return HessianError(
        f"G of {name} must belong to H's inputs, got column {column} of G nonzero where H has zeros"
    )


def misshapen(argument: str, name: str, shape: Any, d: int) -> ShapeError:
    """Return the error of a matrix that isn't (d, d)."""
    return ShapeError(
        f"{argument} of {name} must be (d, d) with d={d} as W has columns, got {tuple(shape)}"
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
    """Return the largest eigenvalue of a positive semidefinite H, to about 1e-4 of itself.

    By Lanczos' method, all vectors kept orthogonal. The first one has something of every
    direction: row sums alone can be orthogonal to the eigenvector that is looked for.
    """
    if not H.any():
        return 0.0
    largest = float(np.abs(H).max())
    vector = np.abs(H).sum(1, dtype=np.float64) / largest
    vector = lanczos_start(vector / np.linalg.norm(vector))
    basis = np.empty((0, len(H)))
    found = Ritz()
    while len(basis) < len(H):
        basis = np.vstack([basis, vector])
        product = (H @ vector.astype(H.dtype)).astype(np.float64)
        along = float(vector @ product)
        for _ in range(2):
            product -= basis.T @ (basis @ product)
        if found.settled(along, rest := float(np.linalg.norm(product))):
            break
        vector = product / rest
    return found.largest


def lanczos_start(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the direction half-way to one that is drawn with a seed of its own."""
    drawn = np.random.default_rng(0).standard_normal(len(vector))
    mixed = vector + drawn / np.linalg.norm(drawn)
    normalized: npt.NDArray[np.float64] = mixed / np.linalg.norm(mixed)
    return normalized


class Ritz:
    """The small matrix of Lanczos' method, tridiagonal, and its largest eigenvalue."""

    _LEAST, _MOST, _TOLERANCE = 12, 48, 1e-4

    def __init__(self) -> None:
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        self.largest = 0.0

    def settled(self, along: float, rest: float) -> bool:
        """Add a vector's part along itself and what is left; tell whether that was enough."""
        from scipy.linalg import eigvalsh_tridiagonal

        self.diagonal.append(along)
        before, self.largest = (
            self.largest,
            float(eigvalsh_tridiagonal(np.array(self.diagonal), np.array(self.beside))[-1]),
        )
        self.beside.append(rest)
        steps = len(self.diagonal)
        still = steps >= self._LEAST and self.largest - before <= self._TOLERANCE * self.largest
        return rest <= 1e-12 * abs(self.largest) or still or steps >= self._MOST


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
    """Return the mean of the living columns' H_jj; 1 where there is none."""
    return 1.0 if dead.all() else float(diagonal[~dead].mean(dtype=np.float64))


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
    """Return what ``attempt`` makes of a damping, and the damping.

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
