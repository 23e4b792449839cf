"""Checks and small factors of a matrix of second moments, in float64."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.bits import smaller
from corequant._cpu.loops.jit import jit

__all__ = ["TILE", "factor_and_invert", "has_faults"]

TILE = 64
"""Rows and columns that are compared at a time with those across the diagonal."""


@jit
def _is_faulty(row, stop, column, end, H, root, slack, turned):  # type: ignore[no-untyped-def]
    """Return whether a tile has any fault, in loops that vectorize.

    Unsigned, so that nothing has to find out whether an index counts from the end.
    """
    for j in range(np.uint64(end - column)):
        for i in range(np.uint64(stop - row)):
            turned[i, j] = H[column + j, row + i]
    faults = 0
    for i in range(np.uint64(stop - row)):
        left = root[row + i]
        for j in range(np.uint64(end - column)):
            bound = left * root[column + j]
            value = np.float64(H[row + i, column + j])
            apart = abs(value - turned[i, j])
            faults += (apart > slack * bound) | (abs(value) > (1 + slack) * bound)
    return faults > 0


@jit
def has_faults(first, last, H, root, slack, turned):  # type: ignore[no-untyped-def]
    """Return whether rows ``first..last-1`` of H are not those of a Gram matrix.

    ``root`` (d,) holds the roots of the diagonal. ``H_ij`` and ``H_ji`` may differ by ``slack``
    times ``root_i root_j``, and ``|H_ij|`` may be above that product by as much. ``turned``
    (TILE, TILE) is room in the dtype of H.
    """
    d = H.shape[0]
    for row in range(first, last, TILE):
        stop = smaller(row + TILE, last)
        for column in range(0, d, TILE):
            end = smaller(column + TILE, d)
            corner = (np.uint64(row), np.uint64(stop), np.uint64(column), np.uint64(end))
            if _is_faulty(*corner, H, root, slack, turned):
                return True
    return False


@jit
def factor_and_invert(square, lower, inverse):  # type: ignore[no-untyped-def]
    """Write L of ``square = L Lᵀ`` and L⁻¹, all (n, n); return whether the square is definite.

    ``lower`` and ``inverse`` are zeros, float64.
    """
    n = square.shape[0]
    for i in range(n):
        for j in range(i + 1):
            total = np.float64(square[i, j])
            for k in range(j):
                total -= lower[i, k] * lower[j, k]
            if i > j:
                lower[i, j] = total / lower[j, j]
            elif total > 0 and total < np.inf:
                lower[i, i] = np.sqrt(total)
            else:
                return False
    for i in range(n):
        inverse[i, i] = 1 / lower[i, i]
        for k in range(i):
            factor = lower[i, k] / lower[i, i]
            for j in range(k + 1):
                inverse[i, j] -= factor * inverse[k, j]
    return True
