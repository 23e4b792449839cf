"""Affine integer grids on groups: ``x`` is (groups, size), one scale and zero point each.

Rounding is half to even, division is true division, and ranges are halved before they are
subtracted, so that nothing overflows for any finite input.
"""

from __future__ import annotations

import numpy as np

from corequant._numba.jit import jit

__all__ = ["affine_parameters", "decode", "encode", "fake", "search_shrink"]


@jit
def _range(row):  # type: ignore[no-untyped-def]
    low = row[0] * 0
    high = low
    for value in row:
        low = min(low, value)
        high = max(high, value)
    return low, high


@jit
def _affine(low, high, least, most, symmetric, tiny):  # type: ignore[no-untyped-def]
    """Return scale and zero point that cover [low, high] ∋ 0 with codes least..most."""
    two = tiny.dtype.type(2)
    steps = (most - least) / two
    zero = tiny[0] * 0
    if symmetric:
        scale = max(-low, high) / steps
    else:
        scale = (high / two - low / two) / steps
    if low == 0 and high == 0:
        return scale + 1, zero
    scale = max(scale, tiny[0])
    if not symmetric:
        zero = min(max(np.rint(least - low / scale), least), most)
    return scale, zero


@jit
def affine_parameters(first, last, x, least, most, symmetric, tiny, scales, zeros):  # type: ignore[no-untyped-def]
    """Scales and zero points of groups ``first..last-1`` from their ranges."""
    for g in range(first, last):
        low, high = _range(x[g])
        scales[g], zeros[g] = _affine(low, high, least, most, symmetric, tiny)


@jit
def search_shrink(first, last, x, least, most, symmetric, tiny, shrinks, scales, zeros):  # type: ignore[no-untyped-def]
    """Scales and zero points of least squared error among ranges shrunk by each of ``shrinks``."""
    n = shrinks.shape[0]
    trial = np.empty(n, x.dtype)
    offset = np.empty(n, x.dtype)
    loss = np.empty(n, np.float64)
    for g in range(first, last):
        low, high = _range(x[g])
        for k in range(n):
            trial[k], offset[k] = _affine(
                low * shrinks[k], high * shrinks[k], least, most, symmetric, tiny
            )
            loss[k] = 0
        for value in x[g]:
            for k in range(n):
                code = np.rint(value / trial[k]) + offset[k]
                code = min(max(code, least), most)
                error = np.float64(value - (code - offset[k]) * trial[k])
                loss[k] += error * error
        best = np.argmin(loss)
        scales[g] = trial[best]
        zeros[g] = offset[best]


@jit
def encode(first, last, x, least, most, scales, zeros, codes):  # type: ignore[no-untyped-def]
    """Integer codes of groups ``first..last-1``."""
    for g in range(first, last):
        scale = scales[g]
        zero = zeros[g]
        for i in range(x.shape[1]):
            code = np.rint(x[g, i] / scale) + zero
            codes[g, i] = np.int8(min(max(code, least), most))


@jit
def decode(first, last, codes, scales, zeros, out):  # type: ignore[no-untyped-def]
    """Numbers that the codes of groups ``first..last-1`` stand for."""
    for g in range(first, last):
        scale = scales[g]
        zero = zeros[g]
        for i in range(codes.shape[1]):
            out[g, i] = (codes[g, i] - zero) * scale


@jit
def fake(first, last, x, least, most, symmetric, tiny, out):  # type: ignore[no-untyped-def]
    """Encode and decode groups ``first..last-1`` with parameters from their own ranges."""
    for g in range(first, last):
        low, high = _range(x[g])
        scale, zero = _affine(low, high, least, most, symmetric, tiny)
        for i in range(x.shape[1]):
            code = np.rint(x[g, i] / scale) + zero
            out[g, i] = (min(max(code, least), most) - zero) * scale
