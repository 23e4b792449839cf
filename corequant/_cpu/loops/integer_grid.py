"""Affine integer grids on groups: ``x`` is (groups, size), one scale and zero point each.

Rounding is half to even and division is true division.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.bits import larger, like, to_bits, to_float
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.lanes import largest_bits

__all__ = [
    "all_magnitudes",
    "decode",
    "encode",
    "fake",
    "look_up",
    "losses",
    "magnitudes",
    "magnitudes_of_row",
    "ranges",
    "row_magnitude",
    "row_range",
    "smallest",
]


@jit
def row_magnitude(row, mask):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude: integers compare as magnitudes do, NaN above infinity."""
    most = like(0, mask)
    for i in range(row.shape[0]):
        most = larger(most, like(to_bits(row[i]) & mask, mask))
    return most


@jit
def row_range(row, mask):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitudes below and above zero."""
    above = like(0, mask)
    below = like(0, mask)
    for i in range(row.shape[0]):
        bits = to_bits(row[i])
        b = like(bits & mask, mask)
        # Products, for a branch would keep this loop from becoming vectors.
        above = larger(above, like(b * like(bits <= mask, mask), mask))
        below = larger(below, like(b * like(bits > mask, mask), mask))
    return below, above


@jit
def magnitudes(x, mask, high):  # type: ignore[no-untyped-def]
    """Largest |x| of each group."""
    for g in range(x.shape[0]):
        high[g] = to_float(row_magnitude(x[g], mask))


@jit
def magnitudes_of_row(x, size, high):  # type: ignore[no-untyped-def]
    """Largest magnitudes of a row's groups of multiples of 16."""
    for g in range(high.shape[0]):
        high[g] = to_float(largest_bits(x, g * size, size))


@jit
def all_magnitudes(x, high):  # type: ignore[no-untyped-def]
    """Largest magnitude of each row, whose length is a multiple of 16."""
    for row in range(x.shape[0]):
        high[row] = to_float(largest_bits(x[row], 0, x.shape[1]))


@jit
def ranges(x, mask, low, high):  # type: ignore[no-untyped-def]
    """Smallest and largest entry of each group, zero included."""
    for g in range(x.shape[0]):
        below, above = row_range(x[g], mask)
        low[g] = -to_float(below)
        high[g] = to_float(above)


@jit
def smallest(x, kept):  # type: ignore[no-untyped-def]
    """Write the smallest entries of each group, ascending, to ``kept``, which holds infinity.

    There are as many as it has columns. Most entries are compared with the last of them only.
    """
    last = kept.shape[1] - 1
    for g in range(x.shape[0]):
        bound = kept[g, last]
        for i in range(x.shape[1]):
            value = x[g, i]
            if value < bound:
                k = last
                while k > 0 and kept[g, k - 1] > value:
                    kept[g, k] = kept[g, k - 1]
                    k -= 1
                kept[g, k] = value
                bound = kept[g, last]


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
def losses(x, scales, zeros, least, most, lanes, out):  # type: ignore[no-untyped-def]
    """Write the squared error of each group with each of its trials (groups, trials), float64.

    It is summed over lanes in a fixed order. Their number is the length of ``lanes``, which the
    compiler doesn't know: known lengths are unrolled before they can become vectors, which made
    this seven times slower.
    """
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
