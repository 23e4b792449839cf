"""Squared errors of trial scales, summed in float64 over 16 lanes in a fixed order."""

from __future__ import annotations

import numpy as np

from corequant._numba.jit import jit
from corequant._numba.minifloat import nearest_value

__all__ = ["integer_losses", "minifloat_losses"]

LANES = 16


@jit
def integer_losses(x, scales, zeros, least, most, out):  # type: ignore[no-untyped-def]
    """Squared error of each group of ``x`` with each of its trials (groups, trials)."""
    lanes = np.empty(LANES, np.float64)
    whole = x.shape[1] // LANES * LANES
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            zero = zeros[g, k]
            lanes[:] = 0
            for start in range(0, whole, LANES):
                for j in range(LANES):
                    value = x[g, start + j]
                    code = np.rint(value / scale) + zero
                    code = least if code < least else code
                    code = most if code > most else code
                    error = np.float64(value - (code - zero) * scale)
                    lanes[j] += error * error
            for i in range(whole, x.shape[1]):
                value = x[g, i]
                code = np.rint(value / scale) + zero
                code = least if code < least else code
                code = most if code > most else code
                error = np.float64(value - (code - zero) * scale)
                lanes[i - whole] += error * error
            total = 0.0
            for j in range(LANES):
                total += lanes[j]
            out[g, k] = total


@jit
def minifloat_losses(x, scales, r, out):  # type: ignore[no-untyped-def]
    """Squared error of each group of ``x`` with each of its trials (groups, trials)."""
    lanes = np.empty(LANES, np.float64)
    whole = x.shape[1] // LANES * LANES
    for g in range(x.shape[0]):
        for k in range(scales.shape[1]):
            scale = scales[g, k]
            lanes[:] = 0
            for start in range(0, whole, LANES):
                for j in range(LANES):
                    value = x[g, start + j]
                    error = np.float64(value - nearest_value(value / scale, r) * scale)
                    lanes[j] += error * error
            for i in range(whole, x.shape[1]):
                value = x[g, i]
                error = np.float64(value - nearest_value(value / scale, r) * scale)
                lanes[i - whole] += error * error
            total = 0.0
            for j in range(LANES):
                total += lanes[j]
            out[g, k] = total
