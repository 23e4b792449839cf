"""Half-quadratic search for the scale and zero point of a group, in float64.

Source: HQQ, "Half-Quadratic Quantization of Large Machine Learning Models" (Badri and Shaji, 2023).
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.bits import like
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.scales import settle

__all__ = ["half_quadratic", "settle_all"]

NORM = 0.7
ITERATIONS = 50
GROWTH = 1.05


@jit
def _norm(x, scale, zero, least, most):  # type: ignore[no-untyped-def]
    total = 0.0
    for value in x:
        code = min(max(np.rint(value / scale) + zero, least), most)
        total += abs(value - (code - zero) * scale) ** NORM
    return total


@jit
def half_quadratic(x, rule, unit, scales, zeros):  # type: ignore[no-untyped-def]
    """Lower Σ|x - x̂|^0.7 of each group from the given scales and zero points (integer grids).

    Outliers E are split off by shrinkage, then scale and zero point fit x - E by least squares;
    errors are measured in steps of the first scale, so that the result scales with x.
    """
    least = np.float64(rule.least)
    most = np.float64(rule.most)
    for g in range(x.shape[0]):
        scale = np.float64(scales[g]) * unit
        zero = np.float64(zeros[g])
        first = scale
        best = _norm(x[g], scale, zero, least, most)
        strength = 1.0
        for _ in range(ITERATIONS):
            product = 0.0
            square = 0.0
            offset = 0.0
            for value in x[g]:
                code = min(max(np.rint(value / scale) + zero, least), most)
                error = (value - (code - zero) * scale) / first
                size = abs(error)
                outlier = 0.0
                if size > 0:
                    outlier = np.sign(error) * max(size - size ** (NORM - 1) / strength, 0.0)
                kept = value - outlier * first
                offset += code - kept / scale
                product += kept * (code - zero)
                square += (code - zero) ** 2
            moved = zero
            if not rule.symmetric:
                moved = min(max(np.rint(offset / x.shape[1]), least), most)
            fitted = scale
            if moved == zero and square > 0 and product > 0:
                fitted = product / square
            fitted = np.float64(settle(like(fitted / unit, rule.tiny), rule)) * unit
            if not rule.symmetric:
                # The zero point says how far the codes reach.
                reach = max(moved - least, most - moved)
                fitted = np.float64(like(min(fitted, rule.huge / reach), rule.tiny))
            loss = _norm(x[g], fitted, moved, least, most)
            if not loss < best:
                break
            best = loss
            scale = fitted
            zero = moved
            strength *= GROWTH
        if first != scale or zero != zeros[g]:
            scales[g] = scale / unit
            zeros[g] = zero


@jit
def settle_all(found, rule, scales):  # type: ignore[no-untyped-def]
    """Bring scales to their format; where none was found, the old one stays."""
    for g in range(scales.shape[0]):
        if found[g] > 0:
            scales[g] = settle(like(found[g], rule.tiny), rule)
