"""Moments of few tokens: shrinkage towards a multiple of the identity.

With fewer tokens than channels H has directions that no token took, along which a method may move
weights for nothing: the loss that it sees falls, that of other inputs rises, to many times that of
rounding to nearest. Adding ``λ I`` to H and G, as if other inputs came from all sides, is the known
cure. λ follows from H and the number of tokens: the oracle approximating shrinkage estimator.

Source: Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE
Transactions on Signal Processing 58 (2010), arXiv 0907.4698, equation 23.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.rounding.hessian import Factor

__all__ = [
    "ENOUGH",
    "LEAST_CHANNELS",
    "added",
    "check_tokens",
    "probes",
    "rank_of",
    "rank_tolerance",
    "shrunk",
    "weight",
]

Array = npt.NDArray[Any]

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

_ROWS = 512


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
    rho = weight(trace, squares, channels, tokens)
    most = min(_MOST, 1e-3 * largest / (trace / channels))
    value = min(rho / (1 - rho), most) if rho < 1 else most
    return value if value > _NEGLIGIBLE else 0.0


def weight(trace: float, squares: float, channels: int, tokens: int) -> float:
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
