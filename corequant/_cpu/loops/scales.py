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

__all__ = ["Power", "Rule", "choose", "scale_and_zero", "settle", "symmetric_scale"]


class Power(NamedTuple):
    """Constants of scales that are powers of two."""

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
    word: np.uint32
    """Of the type of a float's bits."""


class Rule(NamedTuple):
    """Constants of a scale rule in the working type.

    Scales are quotients, rounded where there is a ``rounder``, or powers of two where there is a
    ``power``. Kernels are compiled for what there is.
    """

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
    rounder: Rounder | None
    power: Power | None


@jit
def power_of_two(exponent, power):  # type: ignore[no-untyped-def]
    """Return ``2**exponent`` in the working type, subnormals included."""
    field = exponent + power.bias
    normal = larger(field, 0) << power.fraction
    small = 1 << larger(power.fraction + field - 1, 0)
    return to_float(like(normal if field > 0 else small, power.word))


@jit
def exponent_for(largest, power):  # type: ignore[no-untyped-def]
    """Return the exponent that the rule gives to a group of that largest magnitude."""
    # 2**fraction makes any subnormal a normal number, exactly.
    small = largest < power.least_normal
    scaled = largest * power.lift if small else largest
    bits = np.int64(to_bits(scaled))
    mantissa = bits & ((1 << power.fraction) - 1)
    exponent = (bits >> power.fraction) - power.bias - power.offset
    exponent -= power.fraction if small else 0
    exponent += 1 if mantissa >= power.threshold else 0
    return smaller(larger(exponent, power.lowest), power.highest)


@jit
def rounded(scale, rounder):  # type: ignore[no-untyped-def]
    """Return a quotient in the scales' format."""
    if rounder is None:
        return scale
    return nearest_value(scale, rounder)


@jit
def settle(scale, rule):  # type: ignore[no-untyped-def]
    """Bring a positive quotient to the scale's format, never to zero or infinity."""
    top = rule.huge / rule.span
    scale = rounded(top if scale > top else scale, rule.rounder)
    return rule.tiny if scale < rule.tiny else scale


@jit
def zero_point(steps, rule):  # type: ignore[no-untyped-def]
    """Return the code that stands for zero, that many steps above the low end."""
    return smaller(larger(np.rint(rule.least + steps), rule.least), rule.most)


@jit
def affine(a, b, rule, rounder, power):  # type: ignore[no-untyped-def]
    """Scale and zero point of the range [-a, b], not both zero."""
    if power is not None:
        return power_of_two(exponent_for(larger(a, b), power), power), like(0, rule.tiny)
    two = like(2, rule.tiny)
    scale = larger((b / two + a / two) / rule.steps, rule.tiny)
    zero = zero_point(a / scale, rule)
    widest = larger(zero - rule.least, rule.most - zero)
    scale = smaller(scale, rule.huge / widest)
    if rounder is not None:
        scale = larger(rounded(scale, rounder), rule.tiny)
        moved = zero_point(a / scale, rule)
        # A zero point further from the middle may make the largest number infinite.
        if scale * larger(moved - rule.least, rule.most - moved) <= rule.huge:
            zero = moved
    return scale, zero


@jit
def symmetric_scale(largest, rule, power, factor):  # type: ignore[no-untyped-def]
    """Scale of a symmetric range; ``factor`` multiplies before rounding."""
    if power is not None:
        scale = power_of_two(exponent_for(largest, power), power)
    else:
        scale = settle(largest / rule.steps * factor, rule)
    return rule.idle if largest == 0 else scale


@jit
def scale_and_zero(a, b, rule, factor):  # type: ignore[no-untyped-def]
    """Scale and zero point of the range [-a, b]."""
    if rule.symmetric:
        return symmetric_scale(larger(a, b), rule, rule.power, factor), like(0, rule.tiny)
    if a == 0 and b == 0:
        return rule.idle, like(0, rule.tiny)
    return affine(a, b, rule, rule.rounder, rule.power)


@jit
def choose(low, high, rule, factor, scales, zeros):  # type: ignore[no-untyped-def]
    """Scales and zero points of ranges; loops of their own become vectors."""
    if rule.symmetric:
        for g in range(low.shape[0]):
            scales[g] = symmetric_scale(larger(-low[g], high[g]), rule, rule.power, factor)
            zeros[g] = 0
    else:
        for g in range(low.shape[0]):
            scales[g], zeros[g] = scale_and_zero(-low[g], high[g], rule, factor)
