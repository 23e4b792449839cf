"""Little-endian bit streams of codes."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["pack_row", "pack_rows", "unpack_row", "unpack_rows"]


@jit
def pack_row(codes, bits, packed):  # type: ignore[no-untyped-def]
    """Write the stream of a row's codes; bytes past its end stay as they are."""
    d = codes.shape[0]
    if bits == 4:
        for i in range(d // 2):
            packed[i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))
        if d % 2 == 1:
            packed[d // 2] = codes[d - 1]
    elif bits == 8:
        for i in range(d):
            packed[i] = codes[i]
    else:
        window = np.uint32(0)
        held = 0
        place = 0
        for i in range(d):
            window = np.uint32(window | np.uint32(np.uint32(codes[i]) << np.uint32(held)))
            held += bits
            if held >= 8:
                packed[place] = np.uint8(window & np.uint32(255))
                window = np.uint32(window >> np.uint32(8))
                held -= 8
                place += 1
        if held > 0:
            packed[place] = np.uint8(window)


@jit
def unpack_row(packed, bits, codes):  # type: ignore[no-untyped-def]
    """Read a row's codes from its stream."""
    d = codes.shape[0]
    if bits == 4:
        for i in range(d // 2):
            codes[2 * i] = packed[i] & 15
            codes[2 * i + 1] = packed[i] >> 4
        if d % 2 == 1:
            codes[d - 1] = packed[d // 2] & 15
    elif bits == 8:
        for i in range(d):
            codes[i] = packed[i]
    else:
        mask = np.uint32((1 << bits) - 1)
        window = np.uint32(0)
        held = 0
        place = 0
        for i in range(d):
            if held < bits:
                window = np.uint32(window | (np.uint32(packed[place]) << np.uint32(held)))
                held += 8
                place += 1
            codes[i] = np.uint8(window & mask)
            window = np.uint32(window >> np.uint32(bits))
            held -= bits


@jit
def pack_rows(codes, bits, packed):  # type: ignore[no-untyped-def]
    """Write the stream of each row of ``codes`` (rows, d)."""
    for row in range(codes.shape[0]):
        pack_row(codes[row], bits, packed[row])


@jit
def unpack_rows(packed, bits, codes):  # type: ignore[no-untyped-def]
    """Read ``d`` codes from the stream of each row."""
    for row in range(codes.shape[0]):
        unpack_row(packed[row], bits, codes[row])
