"""The matrices that describe a layer's inputs: checks, order, shrinkage, damping, Cholesky.

With fewer tokens than channels H has directions that no token took, along which a method may move
weights for nothing: the loss that it sees falls, that of other inputs rises, to many times that of
rounding to nearest. Adding ``λ I`` to H and G, as if other inputs came from all sides, is the known
cure. λ follows from H and the number of tokens: the oracle approximating shrinkage estimator.

Source: Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE
Transactions on Signal Processing 58 (2010), arXiv 0907.4698, equation 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.hessian import TILE, factor_and_invert, has_faults
from corequant._cpu.threads import for_rows
from corequant._validation import check_finite, check_floating, check_index, check_numpy
from corequant.errors import HessianError, ShapeError

__all__ = [
    "ENOUGH",
    "LEAST_CHANNELS",
    "SLACK",
    "Damping",
    "Factor",
    "added",
    "asymmetric",
    "check_cross_moment",
    "check_hessian",
    "check_tokens",
    "column_order",
    "damped",
    "damped_factor",
    "foreign",
    "indefinite",
    "mean_diagonal",
    "misshapen",
    "probes",
    "rank_of",
    "rank_tolerance",
    "shrinkage_weight",
    "shrunk",
]

Array = npt.NDArray[Any]
T = TypeVar("T")

_PANEL, _ROWS = 128, 512

SLACK = 1e-3
"""Largest asymmetry allowed, relative to the geometric mean of two diagonal entries; sums of
float32 products taken in another order differ by less than 1e-4 of it."""

ENOUGH = 1 << 62
"""As many tokens as make an addition of nothing."""

LEAST_CHANNELS = 3
"""Fewer say nothing about how many tokens there were."""

_NEGLIGIBLE = 0.01
"""Share of the mean diagonal below which nothing is added; GPTQ's damping is as much."""

_PROBES = 16
"""Random vectors from which the number of missing directions is estimated."""

_MOST = 1e7
"""Times the mean diagonal that is added at most: weights are then rounded to nearest, but for a few
ties."""


def check_hessian(H: Any, d: int, name: str) -> Array:
    """Return H, in a native dtype, if it can be a matrix of second moments (d, d)."""
    H = _check_square("H", H, d, name)
    diagonal = np.diagonal(H).astype(np.float64)
    if d and diagonal.min() < 0:
        j = int(np.argmin(diagonal))
        raise indefinite(name, diagonal[j], j, j)
    root = np.sqrt(diagonal)
    native = H.astype(H.dtype.newbyteorder("="), copy=False)
    working: Array = (
        native if native.dtype.kind == "f" and native.itemsize > 2 else H.astype(np.float32)
    )
    faults: list[int] = []

    def look(first: int, last: int) -> None:
        room = np.empty((TILE, TILE), working.dtype)
        if has_faults(first, last, working, root, SLACK, room):
            faults.append(first)

    for_rows(d, d, look)
    if faults:
        raise _first_fault(name, working, root, diagonal)
    return working


def _first_fault(name: str, H: Array, root: Array, diagonal: Array) -> HessianError:
    """Return the error of the first entry that is asymmetric or else too large."""
    beyond = None
    for first in range(0, len(H), TILE):
        part = slice(first, first + TILE)
        rows, bound = H[part].astype(np.float64), root[part, None] * root
        for i, j in np.argwhere(np.abs(rows - H[:, part].T) > SLACK * bound)[:1]:
            i = int(i) + first
            return asymmetric(name, H[i, j], H[j, i], i, int(j))
        if beyond is None:
            for i, j in np.argwhere(np.abs(rows) > (1 + SLACK) * bound)[:1]:
                beyond = int(i) + first, int(j)
    assert beyond is not None  # there is a fault of one kind or the other
    return indefinite(name, H[beyond], *beyond, diagonal)


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
            exact = np.zeros((2, b - a, b - a))
            if not factor_and_invert(A[a:b, a:b], exact[0], exact[1]):
                return None
            lower, inverse = exact.astype(A.dtype)
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


def shrunk(H: Array, G: Array | None, tokens: int | None) -> tuple[Array, Array | None, float]:
    """Return H and G with an addition to their diagonals, and its ratio to H's mean diagonal.

    Parameters
    ----------
    H, G : numpy.ndarray (d, d)
        Checked. They are returned themselves where nothing is to be added.
    tokens : int or None
        How many they are the moments of. By default they count as the rank of H where that is
        lacking, and as enough otherwise.
    """
    diagonal = np.diagonal(H).astype(np.float64)
    living = diagonal > 0
    count = int(living.sum())
    if not count:
        return H, G, 0.0
    known = _tokens_of(H, diagonal) if tokens is None else tokens
    if known is None:
        return H, G, 0.0
    squares = sum(
        float(np.square(H[i : i + _ROWS], dtype=np.float64).sum()) for i in range(0, len(H), _ROWS)
    )
    largest = float(np.finfo(H.dtype).max)
    value = added(float(diagonal.sum()), squares, count, known, largest)
    if not value:
        return H, G, 0.0
    mean = float(diagonal.sum()) / count
    moved = [None if M is None else M.copy() for M in (H, G)]
    place = np.flatnonzero(living)
    for matrix in moved:
        if matrix is not None:
            matrix[place, place] += np.asarray(value * mean, matrix.dtype)
    assert moved[0] is not None
    return moved[0], moved[1], value


def added(trace: float, squares: float, channels: int, tokens: int, largest: float) -> float:
    """Return the addition to each diagonal entry, relative to their mean.

    Parameters
    ----------
    trace, squares : float
        Sum of H's diagonal, and of the squares of all its entries.
    channels : int
        Those that any token reached.
    tokens : int
    largest : float
        Number that a matrix holds; what is added stays well below it.
    """
    rho = shrinkage_weight(trace, squares, channels, tokens)
    most = min(_MOST, 1e-3 * largest / (trace / channels))
    value = min(rho / (1 - rho), most) if rho < 1 else most
    return value if value > _NEGLIGIBLE else 0.0


def shrinkage_weight(trace: float, squares: float, channels: int, tokens: int) -> float:
    """Return the estimator's ρ: the weight of ``mean · I`` against that of H, 0 to 1.

    It has no more than ``channels / tokens``: where H is a multiple of the identity anyway, nothing
    else tells how far G is to be trusted.
    """
    if not tokens:
        return 1.0
    p, n = channels, tokens
    gap = (n + 1 - 2 / p) * (squares - trace * trace / p)
    share = (1 - 2 / p) * squares + trace * trace
    rho = 1.0 if gap <= share else share / gap
    return min(rho, p / n)


def check_tokens(tokens: Any) -> int | None:
    """Return ``tokens`` as int, or None."""
    return None if tokens is None else check_index("tokens", tokens, 0)


def rank_tolerance(channels: int) -> float:
    """Return the roundoff of an eigenvalue of 0 where the diagonal is all ones."""
    return 32 * float(np.finfo(np.float32).eps) * math.sqrt(channels)


def probes(channels: int) -> Array:
    """Return the random signs (probes, channels), float32, that ``rank_of`` needs solved."""
    signs = np.array([-1, 1], np.float32)
    drawn: Array = np.random.default_rng(0).choice(signs, (_PROBES, channels))
    return drawn


def rank_of(squares: float, channels: int) -> int | None:
    """Return the rank from the squares of ``z L⁻ᵀ`` of all probes; None if it lacks one or none."""
    missing = rank_tolerance(channels) * squares / _PROBES
    return None if missing < 1.5 else max(1, channels - round(missing))


def _tokens_of(H: Array, diagonal: Array) -> int | None:
    """Return the rank of H where it lacks more than one direction, which a mean of zero takes.

    With δ on the diagonal, ``δ tr (H + δ)⁻¹`` counts the eigenvalues below δ; the trace is
    estimated from the norms of ``L⁻¹ z`` for random signs z.
    """
    living = np.flatnonzero(diagonal > 0)
    count = len(living)
    if count < LEAST_CHANNELS:
        return None
    root = (1 / np.sqrt(diagonal[living])).astype(np.float32)
    A = H.astype(np.float32) if count == len(H) else H[np.ix_(living, living)].astype(np.float32)
    A *= root
    A *= root[:, None]
    delta = rank_tolerance(count)
    place = np.arange(count)
    A[place, place] = np.float32(1 + delta)
    factor = Factor.of(A)
    if factor is None:
        # Rounded off below -δ: nothing is certain but that some are missing.
        return None
    solved = factor.forward(probes(count)).astype(np.float64)
    return rank_of(float(np.square(solved).sum()), count)
