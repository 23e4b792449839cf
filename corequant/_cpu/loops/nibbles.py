"""Codes of 4 bits, 32 at a time: packed bytes to numbers and back.

``intrinsics`` has what works on 32 codes as vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from corequant._cpu.loops.bits import HALF, LANES, primitive
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.lanes import ask_for
from corequant._cpu.loops.minifloat_grid import nearest_code, value_of

__all__ = [
    "decode_integers",
    "decode_nibbles",
    "decode_row",
    "encode_nibbles",
    "encode_row",
    "integers_row",
]


@primitive
def encode_nibbles(x: Any, at: Any, low: Any, high: Any, r: Any, packed: Any) -> None:
    """Write ``packed[at/2:]`` from ``x[at:at + 32]``, whose halves have steps ``low``, ``high``."""
    steps = (low,) * HALF + (high,) * HALF
    codes = [nearest_code(x[at + i] / steps[i], r) for i in range(LANES)]
    for i in range(HALF):
        packed[at // 2 + i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))


@primitive
def decode_nibbles(packed: Any, at: Any, low: Any, high: Any, r: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``; the halves have steps ``low``, ``high``."""
    steps = (low,) * HALF + (high,) * HALF
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = value_of(r.one.dtype.type(code), r) * steps[i]


@primitive
def decode_integers(packed: Any, at: Any, step: Any, zero: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``, whose codes count from zero."""
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = (code - zero) * step


@jit
def encode_row(x, size, steps, r, packed):  # type: ignore[no-untyped-def]
    """Packed codes of a row in groups of 16 or of multiples of 32, each with its step.

    What follows the row in memory is asked for.
    """
    d = x.shape[0]
    if size < LANES:
        for g in range(0, steps.shape[0], 2):
            ask_for(x, d + g * HALF)
            encode_nibbles(x, g * HALF, steps[g], steps[g + 1], r, packed)
    else:
        for g in range(steps.shape[0]):
            for at in range(g * size, (g + 1) * size, LANES):
                ask_for(x, d + at)
                encode_nibbles(x, at, steps[g], steps[g], r, packed)


@jit
def decode_row(packed, size, stored, table, r, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row in groups of 16 or of multiples of 32.

    ``table`` has the step of each byte of ``stored`` scales, one for each group.
    """
    if size < LANES:
        for g in range(0, stored.shape[0], 2):
            low, high = table[stored[g]], table[stored[g + 1]]
            decode_nibbles(packed, g * HALF, low, high, r, out)
    else:
        for g in range(stored.shape[0]):
            step = table[stored[g]]
            for at in range(g * size, (g + 1) * size, LANES):
                decode_nibbles(packed, at, step, step, r, out)


@jit
def integers_row(packed, size, steps, zeros, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row of integers in groups of multiples of 32."""
    for g in range(steps.shape[0]):
        for at in range(g * size, (g + 1) * size, LANES):
            decode_integers(packed, at, steps[g], zeros[g], out)
