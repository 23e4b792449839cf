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
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64
from corequant.hadamard import hadamard_matrix

__all__ = ["choices", "mix", "mix_scratch"]

_LARGEST_STRAIGHT = 60
"""Largest core that becomes straight code: 60 takes 0.3 s to compile, 92 0.6 s, 172 1.9 s."""

_MOST = 14
"""Fours of inputs whose sums are in the table at a time, at most: 4 bits of a word for each, and a
part of the first-level cache."""

_MOST_UNROLLED = 4
"""Batches that are straight code, each with the next block's share to fetch; more are a loop. Four
reach to an order of 224 and take 0.3 s to compile, the 74 of order 4108 took 18 s."""

_SIGNS = tuple(itertools.product((1, -1), repeat=4))

_RUN = len(_SIGNS) * VECTOR_BYTES
"""Bytes of the table for a four."""

Load = Callable[[Any], Any]
Store = Callable[[Any, Any], None]
Meanwhile = Callable[[Any, int], None]


def mix_scratch(order: int) -> int:
    """Bytes of scratch that the stage of a core of this order needs, 64-aligned."""
    if order <= _LARGEST_STRAIGHT:
        return 0
    return (order + _batch(order) * len(_SIGNS)) * VECTOR_BYTES


def _batch(order: int) -> int:
    """Return how many fours are in the table at a time; as many each time, or nearly so."""
    fours = order // 4
    return -(-fours // -(-fours // _MOST))


@lru_cache(maxsize=16)
def choices(order: int, inverse: bool) -> npt.NDArray[np.uint64]:
    """Return the words that tell which sum of each four an output takes (batches, order).

    4 bits for each four of a batch, the first lowest, times the bytes of a vector. Without any
    where the core is straight code.
    """
    if order <= _LARGEST_STRAIGHT:
        return np.empty((0, order), np.uint64)
    matrix = hadamard_matrix(order)
    negative = (matrix.T if inverse else matrix).reshape(order // 4, 4, order) < 0
    # As ``_SIGNS`` are counted: the first sign is the highest bit.
    codes = np.einsum("fsk,s->fk", negative.astype(np.uint64), np.array([8, 4, 2, 1], np.uint64))
    each = _batch(order)
    words = np.zeros((-(-len(codes) // each), order), np.uint64)
    for place in range(each):
        some = codes[place::each]
        words[: len(some)] |= some << np.uint64(4 * place)
    words *= np.uint64(VECTOR_BYTES)
    words.flags.writeable = False
    return words


def mix(
    v: Vectors,
    order: int,
    inverse: bool,
    load: Load,
    store: Store,
    meanwhile: Meanwhile,
    scratch: Any,
    words: Any,
) -> None:
    """Emit ``out[k] = sum_m in[m] H[m, k]``, or with H transposed for the inverse.

    ``meanwhile(i, n)`` emits the i-th of n parts of unrelated work to overlap with. ``scratch`` and
    ``words`` are byte pointers, to ``mix_scratch`` bytes and to ``choices``.
    """
    if order <= _LARGEST_STRAIGHT:
        matrix = hadamard_matrix(order)
        _mix_straight(v, matrix.T if inverse else matrix, load, store, meanwhile)
    else:
        _Table(v, order, load, store, meanwhile, scratch, words).emit()


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


class _Table:
    """The stage of a large core: sums of a batch of fours, then all outputs' shares of them."""

    def __init__(
        self,
        v: Vectors,
        order: int,
        load: Load,
        store: Store,
        meanwhile: Meanwhile,
        scratch: Any,
        words: Any,
    ) -> None:
        self.v, self.order, self.load, self.store, self.meanwhile = v, order, load, store, meanwhile
        self.scratch, self.words = scratch, words
        self.fours, self.batch = order // 4, _batch(order)
        self.partial = v.address(scratch, self.batch * _RUN)

    def emit(self) -> None:
        """Emit all batches; of many, those that are neither first nor last are a loop."""
        b = self.v.builder
        count = -(-self.fours // self.batch)
        rest = self.fours - (count - 1) * self.batch
        self._fill(0, self.batch)
        self._share(0, self.batch, first=True)
        if count > _MOST_UNROLLED:
            with counted(b, count - 1, start=1) as number:
                self._fill(number, self.batch)
                self._share(number, self.batch)
        else:
            for k in range(1, count - 1):
                self._fill(k, self.batch)
                self._share(k, self.batch)
        self._fill(count - 1, rest)
        self._share(count - 1, rest, last=True)

    def _fill(self, number: Any, fours: int) -> None:
        """Write the sums of a batch to the table."""
        v, b = self.v, self.v.builder
        for place in range(fours):
            if isinstance(number, int):
                four = number * self.batch + place
                inputs = [4 * four + i for i in range(4)]
            else:
                four = b.add(b.mul(number, int64(self.batch)), int64(place))
                inputs = [b.add(b.mul(four, int64(4)), int64(i)) for i in range(4)]
            self.meanwhile(four, self.fours)
            sums = _sums(v, [self.load(i) for i in inputs])
            for code, signs in enumerate(_SIGNS):
                positive = signs[0] > 0
                term = sums[signs] if positive else v.negate(sums[tuple(-s for s in signs)])
                at = v.address(self.scratch, place * _RUN + code * VECTOR_BYTES)
                v.store(term, at, VECTOR_BYTES)

    def _share(self, number: Any, fours: int, first: bool = False, last: bool = False) -> None:
        """Add each output's sums of a batch to what it has."""
        v, b = self.v, self.v.builder
        step = 8 * self.order
        at = number * step if isinstance(number, int) else b.mul(number, int64(step))
        row = v.address(self.words, at)
        with counted(b, self.order) as k:
            kept = v.address(self.partial, b.mul(k, int64(VECTOR_BYTES)))
            total = None if first else v.load(kept)
            word = v.word(row, k)
            for place in range(fours):
                shifted = b.lshr(word, int64(4 * place))
                chosen = v.address(self.scratch, b.and_(shifted, int64(_RUN - VECTOR_BYTES)))
                term = v.load(v.address(chosen, place * _RUN))
                total = term if total is None else v.add(total, term)
            if last:
                self.store(k, total)
            else:
                v.store(total, kept, VECTOR_BYTES)


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
