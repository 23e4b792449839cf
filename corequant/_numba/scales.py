"""From the range of a group to its scale and zero point.

``low <= 0 <= high``. Ranges are halved before they are subtracted, quotients are capped where a
decoded number would leave the float range, and exponents come from the bits, so that nothing
overflows for any finite input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from corequant._numba.bits import like, to_bits, to_float
from corequant._numba.jit import jit
from corequant._numba.minifloat import Rounder, nearest_value

__all__ = ["FLOAT", "POWER", "ROUNDED", "Rule", "choose", "power_of_two", "settle"]

FLOAT, ROUNDED, POWER = 0, 1, 2
"""Kinds of rules: the quotient itself; the quotient rounded to a float format; a power of two."""


class Rule(NamedTuple):
    """Constants of a scale rule in the working type."""

    kind: int
    symmetric: bool
    least: np.float32
    most: np.float32
    steps: np.float32
    """What the largest magnitude maps to; half the number of steps for integers."""
    span: np.float32
    """Largest magnitude that multiplies a scale."""
    tiny: np.float32
    huge: np.float32
    idle: np.float32
    """The scale of a group of zeros."""
    rounder: Rounder
    """Of the scale's format, where it is rounded."""
    offset: int
    threshold: int
    """Mantissas from here on raise the exponent."""
    lowest: int
    highest: int
    fraction: int
    bias: int


@jit
def power_of_two(exponent, rule):  # type: ignore[no-untyped-def]
    """Return ``2**exponent`` in the working type, subnormals included."""
    if exponent + rule.bias > 0:
        return to_float(like((exponent + rule.bias) << rule.fraction, rule.rounder.shift))
    return to_float(like(1 << (exponent + rule.bias + rule.fraction - 1), rule.rounder.shift))


@jit
def exponent_for(largest, rule):  # type: ignore[no-untyped-def]
    """Return the exponent that the rule gives to a group of that largest magnitude."""
    bits = np.int64(to_bits(largest))
    shifted = 0
    if bits >> rule.fraction == 0:
        # 2**fraction makes any subnormal a normal number, exactly.
        bits = np.int64(to_bits(like(largest * np.float64(1 << rule.fraction), rule.tiny)))
        shifted = rule.fraction
    mantissa = bits & ((1 << rule.fraction) - 1)
    exponent = (bits >> rule.fraction) - rule.bias - shifted - rule.offset
    if mantissa >= rule.threshold:
        exponent += 1
    return min(max(exponent, rule.lowest), rule.highest)


@jit
def settle(scale, rule):  # type: ignore[no-untyped-def]
    """Bring a positive quotient to the scale's format, never to zero or infinity."""
    top = rule.huge / rule.span
    scale = top if scale > top else scale
    if rule.kind == ROUNDED:
        scale = nearest_value(scale, rule.rounder)
    return rule.tiny if scale < rule.tiny else scale


@jit
def choose(low, high, rule, factor, scales, zeros):  # type: ignore[no-untyped-def]
    """Scales and zero points of ranges; ``factor`` multiplies quotients before they are rounded."""
    two = like(2, rule.tiny)
    for g in range(low.shape[0]):
        a = -low[g]
        b = high[g]
        zero = like(0, rule.tiny)
        if a == 0 and b == 0:
            scale = rule.idle
        elif rule.kind == POWER:
            scale = power_of_two(exponent_for(max(a, b), rule), rule)
        elif rule.symmetric:
            scale = settle(max(a, b) / rule.steps * factor, rule)
        else:
            scale = max((b / two + a / two) / rule.steps, rule.tiny)
            zero = np.rint(rule.least + a / scale)
            zero = min(max(zero, rule.least), rule.most)
            widest = max(zero - rule.least, rule.most - zero)
            scale = min(scale, rule.huge / widest)
            if rule.kind == ROUNDED:
                scale = max(nearest_value(scale, rule.rounder), rule.tiny)
                zero = min(max(np.rint(rule.least + a / scale), rule.least), rule.most)
        scales[g] = scale
        zeros[g] = zero
