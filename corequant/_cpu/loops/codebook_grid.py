"""Rounding to an ascending table of numbers."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["encode", "fake", "losses", "nearest_code"]


@jit
def nearest_code(v, thresholds):  # type: ignore[no-untyped-def]
    """Return how many of the ascending thresholds ``v`` reaches: the index of the nearest."""
    first = 0
    last = thresholds.shape[0]
    while first < last:
        middle = (first + last) // 2
        if v >= thresholds[middle]:
            first = middle + 1
        else:
            last = middle
    return first


@jit
def encode(x, scales, thresholds, codes):  # type: ignore[no-untyped-def]
    """Codes of ``x`` (groups, size) divided by its groups' scales."""
    for g in range(x.shape[0]):
        scale = scales[g]
        for i in range(x.shape[1]):
            codes[g, i] = np.uint8(nearest_code(x[g, i] / scale, thresholds))


@jit
def fake(x, scales, thresholds, table, out):  # type: ignore[no-untyped-def]
    """Divide, round and multiply back each group of ``x``."""
    for g in range(x.shape[0]):
        scale = scales[g]
        for i in range(x.shape[1]):
            out[g, i] = table[nearest_code(x[g, i] / scale, thresholds)] * scale


@jit
def losses(x, scales, thresholds, table, out):  # type: ignore[no-untyped-def]
    """Squared error of each group of ``x`` with each of its ``scales`` (groups, trials)."""
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            total = 0.0
            for i in range(x.shape[1]):
                value = table[nearest_code(x[g, i] / scale, thresholds)] * scale
                error = np.float64(x[g, i] - value)
                total += error * error
            out[g, k] = total
