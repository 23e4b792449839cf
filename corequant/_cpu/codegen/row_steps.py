"""Steps of a fused kernel other than the rotation, and the task that describes a row.

*Range*: smallest and largest of many vectors, and whether all of them are finite. Bits of a float,
read as an integer with a sign, keep the order of what is not negative; read as one without, they
put the most negative last. NaN is beyond infinity in both, so that looking for it takes no
instruction of its own.

*Quotients*: numbers over their group's scale, without dividing, yet rounded to the codes that
division gives. A division takes as long as all the rest of the rounding. Beside a scale s is kept
its reciprocal r, and e = 1/s - r, what that lacks by being rounded. In float32 x·r + x·e, added
with one rounding, lies on the same side of every middle between two integers up to 255 as x/s by
division does (``test_quotients.py`` goes through all cases). In float64 it is corrected by its
remainder, which is exact, to what division gives (Markstein, "Computation of elementary functions
on the IBM RISC System/6000 processor", 1990).

*Codes*: numbers to integers of a byte, four vectors at a time, where the processor saturates them.
Narrowed one by one, vectors make four stores of what is one line of the cache, and the ends of the
grid are looked at in four vectors instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from corequant._cpu.codegen.compiler import fuses, saturates
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors

__all__ = [
    "TOGETHER",
    "Extremes",
    "Inverse",
    "Task",
    "corrected",
    "divided",
    "index_dtype",
    "integers_of",
    "inverse",
    "narrows",
    "usual",
]

TOGETHER = 4
"""Vectors whose integers fill one."""

_INT32 = ir.IntType(32)
_WORDS, _SHORTS, _BYTES = (
    ir.VectorType(ir.IntType(bits), 8 * VECTOR_BYTES // bits) for bits in (32, 16, 8)
)
_ROUNDED_AS_SET = ir.Constant(_INT32, 4)

_USUAL = {4: (2.0**-75, 2.0**75), 8: (2.0**-900, 2.0**900)}
"""Scales, by the bytes of a number, with which nothing that counts is subnormal."""

_LINE = 16
"""Numbers gathered in one turn, at most. Rows are whole vectors: 8 numbers each in float64."""

_MOST_COUNTED = 16
"""Vectors of a group up to which their number is part of the code: loops over a few vectors that
LLVM can't count cost more than the work in them."""


def index_dtype(length: int) -> np.dtype[Any]:
    """Return the dtype of permutations: the narrower, the more of the cache is left."""
    return np.dtype(np.uint16 if length <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Task:
    """What a fused kernel does with a row in addition to rotating it.

    The length of a row and that of a large group are told at run time: there are as many kernels as
    there are ways to work, not as many as there are shapes. ``of`` finds the task of a shape.

    Attributes
    ----------
    group : int
        Numbers that share a scale, in whole vectors; 0 where that is told at run time.
    whole : bool
        A row is one group.
    together : int
        Vectors of a group that are worked on side by side; divides their number.
    line : int
        Numbers that are gathered in one turn; divides a row.
    wide : bool
        Indices take 32 bits instead of 16.
    grid : {"codes", "values", "float4"}
        Write int8 codes of an affine grid, the values they stand for, or codes of float4_e2m1fn,
        one a byte, with a scale of float8_e8m0fnu for each group.
    symmetric : bool
        Without zero points.
    permuted : bool
        Gather the channels first.
    stores : {"ordinary", "streamed", "shifted"}
        How values are stored, as in ``Plan``; for shifted ones a row is whole lines.
    """

    group: int
    whole: bool
    together: int
    line: int
    wide: bool
    grid: str
    symmetric: bool
    permuted: bool
    stores: str = "ordinary"

    @classmethod
    def of(
        cls,
        lanes: int,
        length: int,
        group: int,
        grid: str,
        symmetric: bool = True,
        permuted: bool = False,
        stores: str = "ordinary",
    ) -> Task:
        """Return the task of rows of ``length`` numbers in groups, both whole vectors of lanes."""
        vectors = group // lanes
        return cls(
            group if vectors <= _MOST_COUNTED and group < length else 0,
            group == length,
            next(n for n in (TOGETHER, 3, 2, 1) if vectors % n == 0),
            math.gcd(_LINE, length) if permuted else 0,
            permuted and index_dtype(length).itemsize == 4,
            grid,
            symmetric,
            permuted,
            stores,
        )


class Extremes:
    """Emits code that finds the range of vectors, zero included.

    Where it is ``symmetric`` that is the largest magnitude, and what is opposite.
    """

    def __init__(self, v: Vectors, symmetric: bool) -> None:
        self.b = v.builder
        self.v = v
        self.symmetric = symmetric
        self.word = ir.IntType(8 * v.scalar_bytes)
        self.kind = ir.VectorType(self.word, v.lanes)
        with self.b.goto_entry_block():
            self.above, self.below = (self.b.alloca(self.kind) for _ in range(2))

    def begin(self) -> None:
        """Forget what was seen."""
        for slot in (self.above, self.below):
            self.b.store(ir.Constant(self.kind, [0] * self.v.lanes), slot)

    def see(self, vectors: list[Any]) -> None:
        """Take in some vectors."""
        if self.symmetric:
            self._take(map(self.v.magnitude, vectors), self.above, self._beyond)
        else:
            self._take(vectors, self.above, self._above)
            self._take(vectors, self.below, self._beyond)

    def ends(self) -> tuple[Any, Any]:
        """Return both ends of the range; one of them is not finite if not all numbers are."""
        b, v = self.b, self.v
        if self.symmetric:
            most = b.bitcast(v.across(b.load(self.above), self._beyond), v.scalar)
            return b.fneg(most), most
        above = v.across(b.load(self.above), self._above)
        below = v.across(b.load(self.below), self._beyond)
        nought = ir.Constant(self.word, 0)
        below = b.select(b.icmp_signed("<", below, nought), below, nought)
        return b.bitcast(below, v.scalar), b.bitcast(above, v.scalar)

    def _take(self, vectors: Any, slot: Any, choose: Callable[[Any, Any], Any]) -> None:
        bits = [self.b.bitcast(vector, self.kind) for vector in vectors]
        self.b.store(self.v.reduced([self.b.load(slot), *bits], choose), slot)

    def _above(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    def _beyond(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.icmp_unsigned(">", a, b), a, b)


class Inverse(NamedTuple):
    """What stands in for dividing by scales: vectors, or numbers."""

    reciprocal: Any
    rest: Any


def inverse(v: Vectors, scale: Any) -> Inverse:
    """Find the inverse of a vector of scales."""
    one = v.constant(1.0)
    reciprocal = v.builder.fdiv(one, scale)
    if not fuses():
        return Inverse(reciprocal, reciprocal)
    missing = v.fused(v.builder.fneg(scale), reciprocal, one)
    return Inverse(reciprocal, v.builder.fdiv(missing, scale))


def usual(v: Vectors, scale: Any) -> Any:
    """Return whether ``corrected`` is right for a number that is a scale."""
    least, most = (ir.Constant(v.scalar, bound) for bound in _USUAL[v.scalar_bytes])
    above = v.builder.fcmp_ordered(">", scale, least)
    return v.builder.and_(above, v.builder.fcmp_ordered("<", scale, most))


def divided(v: Vectors, x: Any, scale: Any) -> Any:
    """Divide, and round to integers, half to even."""
    return v.nearest(v.builder.fdiv(x, scale))


def corrected(v: Vectors, x: Any, scale: Any, by: Inverse) -> Any:
    """Return what rounds to the integers that ``divided`` gives."""
    quotient = v.fused(x, by.reciprocal, v.builder.fmul(x, by.rest))
    if v.scalar_bytes == 4:
        return quotient
    remainder = v.fused(v.builder.fneg(quotient), scale, x)
    return v.fused(remainder, by.reciprocal, quotient)


def narrows(v: Vectors) -> bool:
    """Return whether the processor supports ``integers_of``."""
    return v.scalar_bytes == 4 and saturates()


def integers_of(v: Vectors, four: list[Any], shift: Any, least: Any, most: Any) -> Any:
    """Round four vectors half to even, add ``shift`` and clip, to a vector of 64 bytes.

    ``shift``, ``least`` and ``most`` are numbers of int8.
    """
    b = v.builder
    wholes = [_rounded(v, x) for x in four]
    # Each 128 bits separately: first four numbers of the first vector, then of the second, ...
    halves = [_packed(v, "packssdw", _SHORTS, wholes[k : k + 2]) for k in (0, 2)]
    wide = _splat(v, b.sext(shift, _SHORTS.element), _SHORTS)
    bytes_ = _packed(v, "packsswb", _BYTES, [b.add(half, wide) for half in halves])
    for relation, end in ((">", least), ("<", most)):
        bound = _splat(v, end, _BYTES)
        bytes_ = b.select(b.icmp_signed(relation, bytes_, bound), bytes_, bound)
    order = [TOGETHER * (k % TOGETHER) + k // TOGETHER for k in range(_WORDS.count)]
    words = b.bitcast(bytes_, _WORDS)
    return b.shuffle_vector(words, words, ir.Constant(_WORDS, order))


def _rounded(v: Vectors, x: Any) -> Any:
    mask = ir.IntType(v.lanes)
    function = v.declared(
        "llvm.x86.avx512.mask.cvtps2dq.512", _WORDS, [v.kind, _WORDS, mask, _INT32]
    )
    nothing, all_lanes = ir.Constant(_WORDS, ir.Undefined), ir.Constant(mask, -1)
    return v.builder.call(function, [x, nothing, all_lanes, _ROUNDED_AS_SET])


def _packed(v: Vectors, name: str, result: Any, two: list[Any]) -> Any:
    function = v.declared(f"llvm.x86.avx512.{name}.512", result, [x.type for x in two])
    return v.builder.call(function, two)


def _splat(v: Vectors, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    single = v.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    places = ir.Constant(ir.VectorType(_INT32, kind.count), [0] * kind.count)
    return v.builder.shuffle_vector(single, undefined, places)
