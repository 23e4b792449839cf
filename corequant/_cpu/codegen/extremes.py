"""Smallest and largest of many vectors, and whether all of them are finite.

Bits of a float, read as an integer with a sign, keep the order of what is not negative; read as one
without, they put the most negative last. NaN is beyond infinity in both, so that looking for it
takes no instruction of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.vectors import Vectors

__all__ = ["Extremes"]


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
