"""The core's stage: K vectors times a K × K matrix of ±1, four inputs at a time.

K is a multiple of 4. Four inputs have 16 signed sums, made with 12 additions; each output takes one
of them from every four, so that it costs K/4 additions instead of K. Small cores become straight
code with the choice baked in; for large ones that code would outgrow the instruction cache, and the
sums are looked up in a table instead. Both add in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from corequant._numba.loops import counted
from corequant._numba.vectors import VECTOR_BYTES, Vectors
from corequant.hadamard import hadamard_matrix

__all__ = ["mix", "mix_scratch"]

_LARGEST_STRAIGHT = 60
"""Largest core that becomes straight code: 60 takes 0.3 s to compile, 92 0.6 s, 172 1.9 s."""

_BATCH = 8
"""Fours of inputs whose sums are in the table at a time: 8 KiB, a part of the first-level cache."""

_SIGNS = tuple(itertools.product((1, -1), repeat=4))

Load = Callable[[Any], Any]
Store = Callable[[Any, Any], None]


def mix_scratch(order: int) -> int:
    """Bytes of scratch that the stage of a core of this order needs, 64-aligned."""
    if order <= _LARGEST_STRAIGHT:
        return 0
    return (order + _BATCH * len(_SIGNS)) * VECTOR_BYTES


def mix(v: Vectors, order: int, inverse: bool, load: Load, store: Store, scratch: Any) -> None:
    """Emit ``out[k] = sum_m in[m] H[m, k]``, or with H transposed for the inverse."""
    matrix = hadamard_matrix(order)
    if inverse:
        matrix = matrix.T
    if order <= _LARGEST_STRAIGHT:
        _mix_straight(v, matrix, load, store)
    else:
        _mix_by_table(v, matrix, load, store, scratch)


def _mix_straight(v: Vectors, matrix: npt.NDArray[np.int8], load: Load, store: Store) -> None:
    order = len(matrix)
    totals: list[Any] = [None] * order
    for first in range(0, order, 4):
        sums = _sums(v, [load(first + i) for i in range(4)])
        for k in range(order):
            column = tuple(int(s) for s in matrix[first : first + 4, k])
            positive = column[0] > 0
            term = sums[column if positive else tuple(-s for s in column)]
            if totals[k] is None:
                totals[k] = term if positive else v.negate(term)
            else:
                totals[k] = (v.add if positive else v.subtract)(totals[k], term)
    for k, total in enumerate(totals):
        store(k, total)


def _mix_by_table(
    v: Vectors, matrix: npt.NDArray[np.int8], load: Load, store: Store, scratch: Any
) -> None:
    b = v.builder
    order = len(matrix)
    fours = order // 4
    partial = v.address(scratch, _BATCH * len(_SIGNS) * VECTOR_BYTES)
    for first in range(0, fours, _BATCH):
        batch = range(first, min(first + _BATCH, fours))
        for place, four in enumerate(batch):
            sums = _sums(v, [load(4 * four + i) for i in range(4)])
            for code, signs in enumerate(_SIGNS):
                positive = signs[0] > 0
                term = sums[signs] if positive else v.negate(sums[tuple(-s for s in signs)])
                at = (place * len(_SIGNS) + code) * VECTOR_BYTES
                v.store(term, v.address(scratch, at), VECTOR_BYTES)
        choices = v.constant_table(_table_offsets(matrix, batch))
        with counted(b, order) as k:
            total = None
            kept = v.address(partial, b.mul(k, ir.Constant(ir.IntType(64), VECTOR_BYTES)))
            if first:
                total = v.load(kept)
            for place in range(len(batch)):
                offset = v.table_entry(choices, k, place)
                term = v.load(v.address(scratch, offset))
                total = term if total is None else v.add(total, term)
            if batch.stop == fours:
                store(k, total)
            else:
                v.store(total, kept, VECTOR_BYTES)


def _table_offsets(matrix: npt.NDArray[np.int8], batch: range) -> list[list[int]]:
    """Byte offsets into the table, of each output's sum in each of the batch's fours."""
    code = {signs: i for i, signs in enumerate(_SIGNS)}
    return [
        [
            (place * len(_SIGNS) + code[tuple(int(s) for s in column[4 * four : 4 * four + 4])])
            * VECTOR_BYTES
            for place, four in enumerate(batch)
        ]
        for column in matrix.T
    ]


def _sums(v: Vectors, x: list[Any]) -> dict[tuple[int, ...], Any]:
    """Emit the sums (x0 ± x1) + ±(x2 ± x3), by their signs, the first of which is +."""
    left = {1: v.add(x[0], x[1]), -1: v.subtract(x[0], x[1])}
    right = {1: v.add(x[2], x[3]), -1: v.subtract(x[2], x[3])}
    return {
        (1, a, c, c * d): (v.add if c > 0 else v.subtract)(left[a], right[d])
        for a in (1, -1)
        for c in (1, -1)
        for d in (1, -1)
    }
