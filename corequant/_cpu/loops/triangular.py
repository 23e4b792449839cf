"""Cholesky factor and inverse of one small block, in float64."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["factor_and_invert"]


@jit
def factor_and_invert(square, lower, inverse):  # type: ignore[no-untyped-def]
    """Write L of ``square = L Lᵀ`` and L⁻¹, all (n, n); return whether the square is definite."""
    n = square.shape[0]
    L = np.zeros((n, n))
    X = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            total = np.float64(square[i, j])
            for k in range(j):
                total -= L[i, k] * L[j, k]
            if i > j:
                L[i, j] = total / L[j, j]
            elif total > 0 and np.isfinite(total):
                L[i, i] = np.sqrt(total)
            else:
                return False
    for i in range(n):
        X[i, i] = 1 / L[i, i]
        for k in range(i):
            factor = L[i, k] / L[i, i]
            for j in range(k + 1):
                X[i, j] -= factor * X[k, j]
    for i in range(n):
        for j in range(n):
            lower[i, j] = L[i, j]
            inverse[i, j] = X[i, j]
    return True
