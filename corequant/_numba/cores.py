"""The core's stage: K vectors times a K × K matrix of ±1, four inputs at a time.

K is a multiple of 4. Four inputs have 8 sums up to a sign, made with 12 additions; each output then
takes one of them from every four: K/4 additions for a vector instead of K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corequant._numba.vectors import Vectors
from corequant.hadamard import hadamard_matrix

__all__ = ["mix"]


def mix(
    v: Vectors,
    order: int,
    inverse: bool,
    load: Callable[[Any], Any],
    store: Callable[[Any, Any], None],
    loop: Any,
) -> None:
    """Emit ``out[k] = sum_m in[m] H[m, k]``, or with H transposed for the inverse."""
    matrix = hadamard_matrix(order)
    if inverse:
        matrix = matrix.T
    totals: list[Any] = [None] * order
    for first in range(0, order, 4):
        sums = _sums(v, [load(first + i) for i in range(4)])
        for k in range(order):
            column = tuple(int(s) for s in matrix[first : first + 4, k])
            lead = column[0]
            term = sums[tuple(lead * s for s in column)]
            if totals[k] is None:
                totals[k] = term if lead > 0 else v.negate(term)
            else:
                totals[k] = (v.add if lead > 0 else v.subtract)(totals[k], term)
    for k, total in enumerate(totals):
        store(k, total)


def _sums(v: Vectors, x: list[Any]) -> dict[tuple[int, ...], Any]:
    """Sums (x0 ± x1) + ±(x2 ± x3) by their signs, the first of which is +."""
    left = {1: v.add(x[0], x[1]), -1: v.subtract(x[0], x[1])}
    right = {1: v.add(x[2], x[3]), -1: v.subtract(x[2], x[3])}
    return {
        (1, a, c, c * d): (v.add if c > 0 else v.subtract)(left[a], right[d])
        for a in (1, -1)
        for c in (1, -1)
        for d in (1, -1)
    }
