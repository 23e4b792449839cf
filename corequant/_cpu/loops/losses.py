"""Squared errors of trial scales, summed in float64 over lanes in a fixed order.

The lanes' loop has a length that the compiler doesn't know: known lengths are unrolled before they
can become vectors, which made this seven times slower.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.minifloat_grid import nearest_value

__all__ = ["LANES", "integer_losses", "minifloat_losses"]

LANES = 128
"""Partial sums; a group's length must be a multiple of the number that is passed on."""


@jit
def integer_losses(x, scales, zeros, least, most, lanes, out):  # type: ignore[no-untyped-def]
    """Squared error of each group of ``x`` with each of its trials (groups, trials)."""
    width = lanes.shape[0]
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            zero = zeros[g, k]
            lanes[:] = 0
            for start in range(0, x.shape[1], width):
                for j in range(width):
                    value = x[g, start + j]
                    code = np.rint(value / scale) + zero
                    code = least if code < least else code
                    code = most if code > most else code
                    error = np.float64(value - (code - zero) * scale)
                    lanes[j] += error * error
            total = 0.0
            for j in range(width):
                total += lanes[j]
            out[g, k] = total


@jit
def minifloat_losses(x, scales, r, lanes, out):  # type: ignore[no-untyped-def]
    """Squared error of each group of ``x`` with each of its trials (groups, trials)."""
    width = lanes.shape[0]
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            lanes[:] = 0
            for start in range(0, x.shape[1], width):
                for j in range(width):
                    value = x[g, start + j]
                    error = np.float64(value - nearest_value(value / scale, r) * scale)
                    lanes[j] += error * error
            total = 0.0
            for j in range(width):
                total += lanes[j]
            out[g, k] = total
