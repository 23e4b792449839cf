"""Block rotations by H_K ⊗ H_2^k, in the order of the definition."""

from __future__ import annotations

import numpy as np

from corequant._numba.jit import jit

__all__ = ["rotate_blocks"]


@jit
def butterfly(buffer, start, length):  # type: ignore[no-untyped-def]
    """Multiply ``buffer[start:start+length]`` by the Sylvester matrix, in place."""
    half = 1
    while half < length:
        for i in range(start, start + length, 2 * half):
            for j in range(i, i + half):
                a = buffer[j]
                b = buffer[j + half]
                buffer[j] = a + b
                buffer[j + half] = a - b
        half *= 2


@jit
def rotate_blocks(first, last, x, out, core, power, scale, before, after):  # type: ignore[no-untyped-def]
    """Rotate the blocks of rows ``first..last-1`` by (core ⊗ H_power) · scale.

    ``core`` (K, K) holds ±1 in the dtype of ``x``; ``before`` and ``after`` (d,) hold
    the signs that x and the result are multiplied by.
    """
    order = core.shape[0]
    size = order * power
    buffer = np.empty(size, x.dtype)
    column = np.empty(order, x.dtype)
    for row in range(first, last):
        for start in range(0, x.shape[1], size):
            for i in range(size):
                buffer[i] = x[row, start + i] * before[start + i]
            for k in range(order):
                butterfly(buffer, k * power, power)
            if order > 1:
                for j in range(power):
                    for k in range(order):
                        column[k] = buffer[k * power + j]
                    for k in range(order):
                        total = column[0] * core[0, k]
                        for m in range(1, order):
                            total += column[m] * core[m, k]
                        buffer[k * power + j] = total
            for i in range(size):
                out[row, start + i] = buffer[i] * scale * after[start + i]
