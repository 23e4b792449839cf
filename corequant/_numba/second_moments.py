"""One look at a matrix of second moments."""

from __future__ import annotations

import numpy as np

from corequant._numba.jit import jit

__all__ = ["first_fault"]

_TILE = 64


@jit
def first_fault(first, last, H, root, slack, found):  # type: ignore[no-untyped-def]
    """Write where rows ``first..last-1`` of H stop being those of a Gram matrix.

    ``root`` (d,) holds the roots of the diagonal. ``found`` (d, 2) gets, for each row, the first
    column where ``H_ij`` and ``H_ji`` differ by more than ``slack`` times ``root_i root_j``, and
    the first where ``|H_ij|`` is above that product by more than ``slack``; d where there is none.
    """
    d = H.shape[0]
    for row in range(first, last, _TILE):
        stop = min(row + _TILE, last)
        for i in range(row, stop):
            found[i, 0] = d
            found[i, 1] = d
        for column in range(0, d, _TILE):
            for i in range(row, stop):
                for j in range(column, min(column + _TILE, d)):
                    bound = np.float64(root[i]) * root[j]
                    if abs(np.float64(H[i, j]) - H[j, i]) > slack * bound and found[i, 0] == d:
                        found[i, 0] = j
                    if abs(H[i, j]) > (1 + slack) * bound and found[i, 1] == d:
                        found[i, 1] = j
