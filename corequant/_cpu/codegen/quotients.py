"""Numbers over their group's scale: without dividing, yet rounded to the codes that division gives.

A division takes as long as all the rest of the rounding. Beside a scale s is kept its reciprocal r,
and e = 1/s - r, what that lacks by being rounded. In float32 x·r + x·e, added with one rounding,
lies on the same side of every middle between two integers up to 255 as x/s by division does
(``test_quotients.py`` goes through all cases). In float64 it is corrected by its remainder, which
is exact, to what division gives (Markstein, "Computation of elementary functions on the IBM RISC
System/6000 processor", 1990).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from corequant._cpu.codegen.compiler import fuses
from corequant._cpu.codegen.vectors import Vectors

__all__ = ["Inverse", "corrected", "divided", "inverse", "usual"]

_USUAL = {4: (2.0**-75, 2.0**75), 8: (2.0**-900, 2.0**900)}
"""Scales, by the bytes of a number, with which nothing that counts is subnormal."""


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
    """Tell whether ``corrected`` is right for a number that is a scale."""
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
