"""BiLLM's search for salient columns and for the magnitude that splits the others, as published."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.planes import residual_planes

__all__ = ["published_parts", "salient_columns", "split_magnitude"]

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

_MOST_SALIENT = 50
"""Upper limit of the number of salient columns of a block, exclusive."""

_SHARES = np.linspace(0.10, 0.90, 81)
"""Shares of a block's weights to try as the concentrated ones."""


def published_parts(saliency: Array, everywhere: bool) -> tuple[Bools, Bools]:
    """Return the salient columns (n,) and the large weights (rows, n) of a block.

    Parameters
    ----------
    saliency : numpy.ndarray (rows, n)
        Non-negative saliency of each weight. Both searches approximate it in place of the weights.
    everywhere : bool
        Whether salient columns are split, too (ARB-LLM's column-group bitmap).
    """
    salient = salient_columns(saliency)
    large = np.zeros(saliency.shape, np.bool_)
    if everywhere and salient.any():
        inside = np.ascontiguousarray(saliency[:, salient])
        # Zeros, such as all of the other columns there, are excluded from these shares.
        candidates = inside[inside != 0]
        if candidates.size:
            level = _split_of_two_planes(inside, np.quantile(candidates, _SHARES))
            large[:, salient] = inside >= level
    if not salient.all():
        inside = np.ascontiguousarray(saliency[:, ~salient])
        # Salient columns count as zeros in these shares.
        padded = np.concatenate([inside.reshape(-1), np.zeros(saliency.size - inside.size)])
        level = split_magnitude(inside, np.quantile(padded, _SHARES))
        large[:, ~salient] = inside >= level
    return salient, large


def salient_columns(matrix: Array) -> Bools:
    """Return a mask of the salient columns (n,), those with the largest sums of magnitudes.

    Their number is the one with the least squared error if both they and the others are binarized
    twice, at least one and fewer than 50 and than all columns.
    """
    n = matrix.shape[1]
    order = np.argsort(-np.abs(matrix).sum(0, dtype=np.float64), kind="stable")
    sorted_columns = np.ascontiguousarray(matrix[:, order])
    best, count = np.inf, 0
    for k in range(1, min(_MOST_SALIENT, n)):
        error = _error(sorted_columns[:, :k]) + _error(sorted_columns[:, k:])
        if error < best:
            best, count = error, k
    salient = np.zeros(n, np.bool_)
    salient[order[:count]] = True
    return salient


def split_magnitude(matrix: Array, levels: Array) -> float:
    """Return the level that splits each row's non-negative entries with the least error.

    Entries below the level, and the others, are binarized once, with separate means and scales.
    """
    ordered = np.sort(matrix, axis=1)
    zero = np.zeros((len(ordered), 1))
    sums = np.concatenate([zero, np.cumsum(ordered, axis=1, dtype=np.float64)], 1)
    squares = np.concatenate([zero, np.cumsum(np.square(ordered, dtype=np.float64), axis=1)], 1)
    n = np.full(len(ordered), ordered.shape[1])
    none = np.zeros(len(ordered), np.int64)
    best, found = np.inf, float(levels[0])
    for level in levels:
        cut = (matrix < level).sum(1)
        error = _run_error(ordered, sums, squares, none, cut)
        error += _run_error(ordered, sums, squares, cut, n)
        if error < best:
            best, found = error, float(level)
    return found


def _split_of_two_planes(matrix: Array, levels: Array) -> float:
    """Return the level that splits a matrix with the least error of two planes for each part."""
    best, found = np.inf, float(levels[0])
    for level in levels:
        large = matrix >= level
        error = _error(matrix, large) + _error(matrix, ~large)
        if error < best:
            best, found = error, float(level)
    return found


def _error(matrix: Array, mask: Bools | None = None) -> float:
    """Return the squared error of two residual planes."""
    if not matrix.shape[1]:
        return 0.0
    gap = matrix - residual_planes(matrix, 2, mask).values()
    if mask is not None:
        gap = np.where(mask, gap, 0)
    return float(np.einsum("ij,ij->", gap, gap, dtype=np.float64))


def _run_error(ordered: Array, sums: Array, squares: Array, first: Array, last: Array) -> float:
    """Return the squared error of one plane for runs of sorted rows, from their running sums."""
    rows = np.arange(len(ordered))
    count = np.maximum(last - first, 1)
    total = sums[rows, last] - sums[rows, first]
    mean = total / count
    middle = np.clip((ordered < mean[:, None]).sum(1), first, last)
    below = mean * (middle - first) - (sums[rows, middle] - sums[rows, first])
    above = (sums[rows, last] - sums[rows, middle]) - mean * (last - middle)
    scale = (below + above) / count
    square = squares[rows, last] - squares[rows, first]
    return float((square - count * (mean**2 + scale**2))[last > first].sum())
