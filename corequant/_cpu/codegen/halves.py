"""Conversion between float16 and float32 by bits, for processors without an instruction for it."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

__all__ = ["narrow", "widen"]

_INT32 = ir.IntType(32)
_REBIAS = 2.0**112
"""Exponents are biased by 127 in float32, by 15 in float16."""


def widen(b: Any, raw: Any) -> Any:
    """Convert a vector of float16 to float32, exactly."""
    c = _Constants(raw.type.count)
    bits = b.zext(b.bitcast(raw, c.halves), c.words)
    magnitude = b.shl(b.and_(bits, c.word(0x7FFF)), c.word(13))
    # The product is exact, and brings subnormal numbers to their place.
    value = b.bitcast(b.fmul(b.bitcast(magnitude, c.floats), c.real(_REBIAS)), c.words)
    special = b.icmp_unsigned(">=", magnitude, c.word(0x7C00 << 13))
    value = b.select(special, b.or_(magnitude, c.word(0x7F800000)), value)
    sign = b.shl(b.and_(bits, c.word(0x8000)), c.word(16))
    return b.bitcast(b.or_(value, sign), c.floats)


def narrow(b: Any, vector: Any) -> Any:
    """Convert a vector of float32 to float16, half to even."""
    c = _Constants(vector.type.count)
    bits = b.bitcast(vector, c.words)
    magnitude = b.and_(bits, c.word(0x7FFFFFFF))
    # Below 2^-14 steps are 2^-24, the last place of 0.5: adding it rounds.
    half = b.fadd(b.bitcast(magnitude, c.floats), c.real(0.5))
    small = b.sub(b.bitcast(half, c.words), c.word(0x3F000000))
    odd = b.and_(b.lshr(magnitude, c.word(13)), c.word(1))
    carried = b.add(b.add(magnitude, c.word(0xFFF)), odd)
    normal = b.lshr(b.sub(carried, c.word(112 << 23)), c.word(13))
    result = b.select(b.icmp_unsigned("<", magnitude, c.word(113 << 23)), small, normal)
    # From 65520 on, half a step above the largest number, the result is infinite.
    infinite = b.icmp_unsigned(">=", magnitude, c.word(0x477FF000))
    result = b.select(infinite, c.word(0x7C00), result)
    unknown = b.icmp_unsigned(">", magnitude, c.word(0x7F800000))
    result = b.select(unknown, c.word(0x7E00), result)
    sign = b.and_(b.lshr(bits, c.word(16)), c.word(0x8000))
    return b.bitcast(b.trunc(b.or_(result, sign), c.halves), ir.VectorType(ir.HalfType(), c.count))


class _Constants:
    """Types and constants of one length of vector."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.words = ir.VectorType(_INT32, count)
        self.halves = ir.VectorType(ir.IntType(16), count)
        self.floats = ir.VectorType(ir.FloatType(), count)

    def word(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.count)

    def real(self, value: float) -> Any:
        return ir.Constant(self.floats, [value] * self.count)
