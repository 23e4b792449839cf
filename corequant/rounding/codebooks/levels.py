"""Levels of least squared error, for given numbers (exactly) and for distributions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.codebooks.kmeans import optimal_levels
from corequant._cpu.threads import for_rows
from corequant._validation import check_finite, check_floating, check_index, check_numpy
from corequant.errors import ShapeError, SpecError
from corequant.rounding.codebooks.densities import DENSITIES

__all__ = ["MOST_LEVELS", "LevelTable", "kmeans_levels", "kmeans_table", "lloyd_max"]

Array = npt.NDArray[Any]

MOST_LEVELS = 4096
"""Largest number of levels; memory of the search grows with it."""

_PANEL = 64
"""Rows sorted at a time."""

_COST = 16
"""Approximate number of visits to each value per level."""


@dataclass(frozen=True, eq=False)
class LevelTable:
    """The best levels of each row for several numbers of levels.

    Attributes
    ----------
    sizes : tuple of int
        Numbers of levels, ascending.
    losses : numpy.ndarray (..., len(sizes)), float64
        Weighted squared error of a row for each size; infinite if it overflows float64.
    """

    sizes: tuple[int, ...]
    losses: npt.NDArray[np.float64]
    _levels: npt.NDArray[np.float64]

    def levels(self, size: int) -> npt.NDArray[np.float64]:
        """Return the levels (..., size), ascending.

        If a row has fewer distinct values, its largest level is repeated.

        Raises
        ------
        ValueError
            If ``size`` is not one of ``sizes``.
        """
        if size not in self.sizes:
            raise ValueError(f"size must be one of {self.sizes}, got {size}")
        start = sum(s for s in self.sizes if s < size)
        return self._levels[..., start : start + size]


def kmeans_levels(values: Any, weights: Any = None, levels: int = 16) -> npt.NDArray[np.float64]:
    """Return the levels that have the least weighted squared error.

    Parameters
    ----------
    values : numpy.ndarray (n,) or (rows, n)
        Floating and finite; rows are independent of each other.
    weights : numpy.ndarray (n,) or (rows, n), optional
        Non-negative weights of the squared errors; equal by default, and in rows where all are
        zero.
    levels : int
        Number of levels, 1 to 4096.

    Returns
    -------
    numpy.ndarray (levels,) or (rows, levels), float64
        Levels in ascending order. If a row has fewer distinct values, its largest level is
        repeated.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is invalid.

    Notes
    -----
    This is k-means in one dimension, solved exactly by dynamic programming: no levels have a
    smaller error, up to rounding in float64, and nothing is random. See ``kmeans_table``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.kmeans_levels(np.array([0.0, 9.0, 1.0, 10.0, 5.0]), levels=3)
    array([0.5, 5. , 9.5])
    """
    size = check_index("levels", levels)
    return kmeans_table(values, weights, (size,)).levels(size)


def kmeans_table(
    values: Any, weights: Any = None, sizes: Sequence[int] = (2, 4, 8, 16)
) -> LevelTable:
    """Return the levels of least weighted squared error for several numbers of levels at once.

    Parameters
    ----------
    values, weights
        See ``kmeans_levels``.
    sizes : sequence of int
        Numbers of levels, each 1 to 4096.

    Returns
    -------
    LevelTable

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument breaks its rule.

    Notes
    -----
    The search for the largest size solves all smaller ones on its way, so that they cost almost
    nothing. A row of n values takes ``O(n log n)`` steps per level (arXiv 1701.07204); rows are
    distributed over threads.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> table = cq.kmeans_table(np.array([0.0, 9.0, 1.0, 10.0, 5.0]), sizes=(1, 2, 3))
    >>> table.losses
    array([82. , 14.5,  1. ])
    >>> table.levels(2)
    array([0.5, 8. ])
    """
    if not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be a sequence of integers, got {type(sizes).__name__}")
    values = _check_values(values)
    counts = None if weights is None else _check_weights(weights, values)
    ordered = tuple(sorted({check_index("sizes", size) for size in sizes}))
    if not ordered or ordered[-1] > MOST_LEVELS:
        raise ValueError(f"sizes must be numbers from 1 to {MOST_LEVELS}, got {tuple(sizes)}")
    rows = values.reshape(-1, values.shape[-1])
    levels = np.empty((len(rows), sum(ordered)))
    losses = np.empty((len(rows), len(ordered)))
    limits = np.array(ordered, np.int64)
    starts = np.cumsum(limits) - limits
    unit, share = _exponent(rows), 0 if counts is None else _exponent(counts)

    def work(first: int, last: int) -> None:
        for a in range(first, last, _PANEL):
            b = min(a + _PANEL, last)
            given = None if counts is None else counts[a:b] if counts.ndim == 2 else counts
            panel, masses = _sorted(rows[a:b], given, unit, share)
            optimal_levels(panel, masses, limits, starts, levels[a:b], losses[a:b])

    for_rows(len(rows), rows.shape[1] * ordered[-1] * _COST, work)
    np.ldexp(levels, unit, out=levels)
    with np.errstate(over="ignore", under="ignore"):
        np.ldexp(losses, 2 * unit + share, out=losses)
    front = values.shape[:-1]
    return LevelTable(
        ordered, losses.reshape(*front, len(ordered)), levels.reshape(*front, sum(ordered))
    )


def lloyd_max(distribution: str, levels: int) -> npt.NDArray[np.float64]:
    """Return the levels of least mean squared error for a distribution.

    Parameters
    ----------
    distribution : str
        ``"normal"`` or ``"laplace"``, of mean 0 and variance 1.
    levels : int
        Number of levels, 1 to 4096.

    Returns
    -------
    numpy.ndarray (levels,), float64
        Levels in ascending order, symmetric about 0.

    Raises
    ------
    SpecError
        If the distribution is unknown.
    TypeError, ValueError
        If ``levels`` is not 1 to 4096.

    Notes
    -----
    Each level is the mean of the numbers nearest to it (Lloyd, 1957; Max, 1960). For densities with
    a concave logarithm this has a unique solution (Fleischer, 1964), found here by Newton's method
    from the levels of the best companding quantizer, which are quantiles of the density's cube
    root.

    Examples
    --------
    >>> import corequant as cq
    >>> cq.lloyd_max("normal", 4).round(4)
    array([-1.5104, -0.4528,  0.4528,  1.5104])
    """
    if not isinstance(distribution, str) or distribution not in DENSITIES:
        raise SpecError(f"distribution must be {' or '.join(DENSITIES)}, got {distribution!r}")
    size = check_index("levels", levels)
    if size > MOST_LEVELS:
        raise ValueError(f"levels must be at most {MOST_LEVELS}, got {size}")
    return DENSITIES[distribution].levels(size)


def _check_values(values: Any) -> Array:
    """Return floating, finite values of one or two axes, none of them empty."""
    check_numpy("values", values)
    check_floating("values", values)
    if values.ndim > 2 or values.size == 0:
        raise ShapeError(f"values must be (n,) or (rows, n), not empty, got shape {values.shape}")
    check_finite("values", values)
    checked: Array = values
    return checked


def _check_weights(weights: Any, values: Array) -> Array:
    """Return the weights, of one row or of each row of ``values``, after checking them."""
    check_numpy("weights", weights)
    check_floating("weights", weights)
    if weights.shape not in (values.shape, values.shape[-1:]):
        raise ShapeError(
            f"weights must have values' shape {values.shape} or one row of it, got {weights.shape}"
        )
    check_finite("weights", weights)
    if weights.min() < 0:
        raise ValueError(f"weights must not be negative, got {weights.min()}")
    checked: Array = weights
    return checked


def _exponent(numbers: Array) -> int:
    """Return the exponent of the largest magnitude, by which products are kept in range."""
    return math.frexp(max(abs(float(numbers.min())), abs(float(numbers.max()))))[1]


def _sorted(rows: Array, weights: Array | None, unit: int, share: int) -> tuple[Array, Array]:
    """Return rows, scaled to float64 units and sorted, and their weights in the same order."""
    scaled = np.ldexp(rows.astype(np.float64), -unit)
    if weights is None:
        return np.sort(scaled, axis=1), np.empty((len(rows), 0))
    order = np.argsort(scaled, axis=1, kind="stable")
    masses = np.ldexp(np.broadcast_to(weights, rows.shape).astype(np.float64), -share)
    return np.take_along_axis(scaled, order, axis=1), np.take_along_axis(masses, order, axis=1)
