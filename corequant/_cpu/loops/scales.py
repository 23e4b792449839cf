"""From the range of a group to its scale and zero point.

``low <= 0 <= high``. Ranges are halved before they are subtracted, quotients are capped where a
decoded number would leave the float range, and exponents come from the bits, so that nothing
overflows for any finite input.

Bit-exact twin: `corequant_torch.device.scales`, `corequant_torch.gpu.fusion`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from corequant._cpu.loops.bits import larger, like, smaller, to_bits, to_float
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.minifloat_grid import Rounder, nearest_value

__all__ = ["FLOAT", "POWER", "ROUNDED", "Rule", "choose", "scale_and_zero", "settle"]

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
    least_normal: np.float32
    lift: np.float32
    """``2**fraction``."""


@jit
def power_of_two(exponent, rule):  # type: ignore[no-untyped-def]
    """Return ``2**exponent`` in the working type, subnormals included."""
    field = exponent + rule.bias
    normal = larger(field, 0) << rule.fraction
    small = 1 << larger(rule.fraction + field - 1, 0)
    return to_float(like(normal if field > 0 else small, rule.rounder.shift))


@jit
def exponent_for(largest, rule):  # type: ignore[no-untyped-def]
    """Return the exponent that the rule gives to a group of that largest magnitude."""
    # 2**fraction makes any subnormal a normal number, exactly.
    small = largest < rule.least_normal
    scaled = largest * rule.lift if small else largest
    bits = np.int64(to_bits(scaled))
    mantissa = bits & ((1 << rule.fraction) - 1)
    exponent = (bits >> rule.fraction) - rule.bias - rule.offset
    exponent -= rule.fraction if small else 0
    exponent += 1 if mantissa >= rule.threshold else 0
    return smaller(larger(exponent, rule.lowest), rule.highest)


@jit
def settle(scale, rule):  # type: ignore[no-untyped-def]
    """Bring a positive quotient to the scale's format, never to zero or infinity."""
    top = rule.huge / rule.span
    scale = top if scale > top else scale
    if rule.kind == ROUNDED:
        scale = nearest_value(scale, rule.rounder)
    return rule.tiny if scale < rule.tiny else scale


@jit
def zero_point(steps, rule):  # type: ignore[no-untyped-def]
    """Return the code that stands for zero, that many steps above the low end."""
    return smaller(larger(np.rint(rule.least + steps), rule.least), rule.most)


@jit
def scale_and_zero(a, b, rule, factor):  # type: ignore[no-untyped-def]
    """Scale and zero point of the range [-a, b]; ``factor`` multiplies before rounding."""
    zero = like(0, rule.tiny)
    if a == 0 and b == 0:
        return rule.idle, zero
    if rule.kind == POWER:
        return power_of_two(exponent_for(larger(a, b), rule), rule), zero
    if rule.symmetric:
        return settle(larger(a, b) / rule.steps * factor, rule), zero
    two = like(2, rule.tiny)
    scale = larger((b / two + a / two) / rule.steps, rule.tiny)
    zero = zero_point(a / scale, rule)
    widest = larger(zero - rule.least, rule.most - zero)
    scale = smaller(scale, rule.huge / widest)
    if rule.kind == ROUNDED:
        scale = larger(nearest_value(scale, rule.rounder), rule.tiny)
        moved = zero_point(a / scale, rule)
        # A zero point further from the middle may make the largest number infinite.
        if scale * larger(moved - rule.least, rule.most - moved) <= rule.huge:
            zero = moved
    return scale, zero


@jit
def choose(low, high, rule, factor, scales, zeros):  # type: ignore[no-untyped-def]
    """Scales and zero points of ranges; a loop for each kind, so that it becomes vectors."""
    if not rule.symmetric:
        for g in range(low.shape[0]):
            scales[g], zeros[g] = scale_and_zero(-low[g], high[g], rule, factor)
        return
    zeros[:] = 0
    top = rule.huge / rule.span
    if rule.kind == POWER:
        for g in range(low.shape[0]):
            largest = larger(-low[g], high[g])
            scale = power_of_two(exponent_for(largest, rule), rule)
            scales[g] = rule.idle if largest == 0 else scale
    elif rule.kind == ROUNDED:
        for g in range(low.shape[0]):
            largest = larger(-low[g], high[g])
            scale = largest / rule.steps * factor
            scale = nearest_value(top if scale > top else scale, rule.rounder)
            scale = rule.tiny if scale < rule.tiny else scale
            scales[g] = rule.idle if largest == 0 else scale
    else:
        for g in range(low.shape[0]):
            largest = larger(-low[g], high[g])
            scale = largest / rule.steps * factor
            scale = top if scale > top else scale
            scale = rule.tiny if scale < rule.tiny else scale
            scales[g] = rule.idle if largest == 0 else scale
