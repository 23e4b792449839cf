"""Searches for the scale of a group in float64: half-quadratic, and exact by breakpoints.

Source: half-quadratic optimisation as in HQQ (Badri and Shaji, 2023); the sweep over breakpoints
as in PiSO, arXiv 2606.10890, for an identity Hessian.
"""

from __future__ import annotations

import numpy as np

from corequant._numba.bits import like
from corequant._numba.jit import jit
from corequant._numba.scales import settle

__all__ = ["half_quadratic", "sweep"]

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
def sweep(x, levels, middles, scales):  # type: ignore[no-untyped-def]
    """Write the scale of least squared error of each group, 0 where no scale beats all zeros.

    ``levels`` ascend, ``middles[j]`` lies between levels j and j + 1. As the scale falls from
    infinity, entry x changes its code at ``x / middles[j]`` only; between two such points the best
    scale for fixed codes is Σ(level·x) / Σ(level²), so the least error of all is that of some
    piece.
    """
    origin = np.searchsorted(middles, 0.0)
    count = middles.shape[0]
    places = np.empty(x.shape[1] * max(count, 1), np.float64)
    products = np.empty_like(places)
    squares = np.empty_like(places)
    for g in range(x.shape[0]):
        base = levels[origin]
        product = 0.0
        square = 0.0
        n = 0
        for value in x[g]:
            w = np.float64(value)
            product += base * w
            square += base * base
            if w == 0:
                continue
            for j in range(count):
                if middles[j] * w > 0:
                    upward = w > 0
                    new = levels[j + 1] if upward else levels[j]
                    old = levels[j] if upward else levels[j + 1]
                    places[n] = w / middles[j]
                    products[n] = (new - old) * w
                    squares[n] = new * new - old * old
                    n += 1
        order = np.argsort(places[:n])[::-1]
        best = 0.0
        scale = 0.0
        for k in range(-1, n):
            if k >= 0:
                product += products[order[k]]
                square += squares[order[k]]
            if product > 0 and square > 0 and product * product > best * square:
                best = product * product / square
                scale = product / square
        scales[g] = scale
