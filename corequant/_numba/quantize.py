"""Affine integer grids on groups: ``x`` is (groups, size), one scale and zero point each.

Rounding is half to even and division is true division.
"""

from __future__ import annotations

import numpy as np

from corequant._numba.bits import like, to_bits, to_float
from corequant._numba.jit import jit

__all__ = ["decode", "encode", "fake", "look_up", "magnitudes", "pack_nibbles", "ranges"]


@jit
def magnitudes(x, mask, limit, skip, largest):  # type: ignore[no-untyped-def]
    """Largest |x| of each group, as bits: integers compare as magnitudes do, NaN above infinity.

    ``limit`` holds infinity's bits; where ``skip``, what isn't finite counts as zero.
    """
    for g in range(x.shape[0]):
        most = like(0, mask)
        if skip:
            for i in range(x.shape[1]):
                b = like(to_bits(x[g, i]) & mask, mask)
                b = b if b < limit else like(0, mask)
                most = max(most, b)
        else:
            for i in range(x.shape[1]):
                most = max(most, like(to_bits(x[g, i]) & mask, mask))
        largest[g] = to_float(most)


@jit
def ranges(x, mask, limit, skip, low, high):  # type: ignore[no-untyped-def]
    """Smallest and largest entry of each group, zero included, as magnitudes of each sign."""
    for g in range(x.shape[0]):
        above = like(0, mask)
        below = like(0, mask)
        for i in range(x.shape[1]):
            bits = to_bits(x[g, i])
            b = like(bits & mask, mask)
            if skip:
                b = b if b < limit else like(0, mask)
            negative = bits > mask
            above = max(above, like(0, mask) if negative else b)
            below = max(below, b if negative else like(0, mask))
        low[g] = -to_float(below)
        high[g] = to_float(above)


@jit
def encode(x, scales, zeros, least, most, codes):  # type: ignore[no-untyped-def]
    """Integer codes of ``x``."""
    for g in range(x.shape[0]):
        scale = scales[g]
        zero = zeros[g]
        for i in range(x.shape[1]):
            code = np.rint(x[g, i] / scale) + zero
            code = least if code < least else code
            codes[g, i] = np.int16(most if code > most else code)


@jit
def fake(x, scales, zeros, least, most, out):  # type: ignore[no-untyped-def]
    """Encode and decode ``x``."""
    for g in range(x.shape[0]):
        scale = scales[g]
        zero = zeros[g]
        for i in range(x.shape[1]):
            code = np.rint(x[g, i] / scale) + zero
            code = least if code < least else code
            out[g, i] = ((most if code > most else code) - zero) * scale


@jit
def decode(codes, scales, zeros, out):  # type: ignore[no-untyped-def]
    """Numbers that integer codes stand for."""
    for g in range(codes.shape[0]):
        scale = scales[g]
        zero = zeros[g]
        for i in range(codes.shape[1]):
            out[g, i] = (codes[g, i] - zero) * scale


@jit
def look_up(codes, scales, table, out):  # type: ignore[no-untyped-def]
    """Numbers that codes stand for by a table of 256."""
    for g in range(codes.shape[0]):
        scale = scales[g]
        for i in range(codes.shape[1]):
            out[g, i] = table[codes[g, i]] * scale


@jit
def pack_nibbles(codes, packed):  # type: ignore[no-untyped-def]
    """Two 4-bit codes to a byte, the even one in the low nibble; vectors of even length."""
    for i in range(packed.shape[0]):
        packed[i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))
