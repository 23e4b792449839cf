"""The core's stage: K vectors times a K × K matrix of ±1, four inputs at a time.

K is a multiple of 4. Four inputs have 16 signed sums, made with 12 additions; each output takes one
of them from every four, so that it costs K/4 additions instead of K. Small cores become straight
code with the choice baked in; for large ones that code would outgrow the instruction cache, and the
sums are looked up in a table instead, several by one word: loads are what is short there. Both add
in the same order.
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

_MOST = 14
"""Fours of inputs whose sums are in the table at a time, at most: 4 bits of a word for each, and a
part of the first-level cache."""

_SIGNS = tuple(itertools.product((1, -1), repeat=4))

Load = Callable[[Any], Any]
Store = Callable[[Any, Any], None]
Meanwhile = Callable[[int, int], None]


def mix_scratch(order: int) -> int:
    """Bytes of scratch that the stage of a core of this order needs, 64-aligned."""
    if order <= _LARGEST_STRAIGHT:
        return 0
    return (order + _batch(order) * len(_SIGNS)) * VECTOR_BYTES


def _batch(order: int) -> int:
    """Return how many fours are in the table at a time; as many each time, or nearly so."""
    fours = order // 4
    return -(-fours // -(-fours // _MOST))


def mix(
    v: Vectors,
    order: int,
    inverse: bool,
    load: Load,
    store: Store,
    meanwhile: Meanwhile,
    scratch: Any,
) -> None:
    """Emit ``out[k] = sum_m in[m] H[m, k]``, or with H transposed for the inverse.

    ``meanwhile(i, n)`` emits the i-th of n parts of what is to be done besides.
    """
    matrix = hadamard_matrix(order)
    if inverse:
        matrix = matrix.T
    if order <= _LARGEST_STRAIGHT:
        _mix_straight(v, matrix, load, store, meanwhile)
    else:
        _mix_by_table(v, matrix, load, store, meanwhile, scratch)


def _mix_straight(
    v: Vectors, matrix: npt.NDArray[np.int8], load: Load, store: Store, meanwhile: Meanwhile
) -> None:
    order = len(matrix)
    totals: list[Any] = [None] * order
    for first in range(0, order, 4):
        meanwhile(first // 4, order // 4)
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
    v: Vectors,
    matrix: npt.NDArray[np.int8],
    load: Load,
    store: Store,
    meanwhile: Meanwhile,
    scratch: Any,
) -> None:
    b = v.builder
    order, word_kind = len(matrix), ir.IntType(64)
    fours, most = order // 4, _batch(order)
    run = len(_SIGNS) * VECTOR_BYTES
    partial = v.address(scratch, most * run)
    mask = ir.Constant(word_kind, run - VECTOR_BYTES)
    for first in range(0, fours, most):
        batch = range(first, min(first + most, fours))
        for place, four in enumerate(batch):
            meanwhile(four, fours)
            sums = _sums(v, [load(4 * four + i) for i in range(4)])
            for code, signs in enumerate(_SIGNS):
                positive = signs[0] > 0
                term = sums[signs] if positive else v.negate(sums[tuple(-s for s in signs)])
                v.store(term, v.address(scratch, place * run + code * VECTOR_BYTES), VECTOR_BYTES)
        choices = v.constant_words([VECTOR_BYTES * w for w in _choices(matrix, batch)])
        with counted(b, order) as k:
            kept = v.address(partial, b.mul(k, ir.Constant(word_kind, VECTOR_BYTES)))
            total = v.load(kept) if first else None
            word = v.word(choices, k)
            for place in range(len(batch)):
                shifted = b.lshr(word, ir.Constant(word_kind, 4 * place))
                chosen = v.address(scratch, b.and_(shifted, mask))
                term = v.load(v.address(chosen, place * run))
                total = term if total is None else v.add(total, term)
            if batch.stop == fours:
                store(k, total)
            else:
                v.store(total, kept, VECTOR_BYTES)


def _choices(matrix: npt.NDArray[np.int8], batch: range) -> list[int]:
    """Tell which sum of each four of the batch an output takes, 4 bits each, the first lowest."""
    code = {signs: i for i, signs in enumerate(_SIGNS)}
    return [
        sum(
            code[tuple(int(s) for s in column[4 * four : 4 * four + 4])] << 4 * place
            for place, four in enumerate(batch)
        )
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
