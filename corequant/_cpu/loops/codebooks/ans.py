"""Entropy coding by asymmetric numeral systems (rANS): symbols of known frequencies, in few bits.

The state is a number in [2**30, 2**62). A symbol of frequency f out of 2**14 turns it into about
``state · 2**14 / f``; where it would leave the range, its low 32 bits go out first. Symbols are
coded from the last to the first, so that they come back from the first on.

Source: Duda, "Asymmetric numeral systems", arXiv 1311.2540.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["LEAST", "PRECISION", "decode_symbols", "encode_symbols"]

PRECISION = 14
"""Frequencies of a table add up to 2**14."""

LEAST = 1 << 30
"""Smallest state."""


@jit
def encode_symbols(symbols, rows, columns, frequencies, starts, words):  # type: ignore[no-untyped-def]
    """Write the words of ``symbols`` (rows, columns) to the end of ``words``; return how many.

    The table of a symbol is ``rows[i] + columns[j]``; ``frequencies`` and ``starts`` (tables, K)
    are what a symbol has, and what those before it have together.
    """
    state = np.int64(LEAST)
    place = words.shape[0]
    for i in range(symbols.shape[0] - 1, -1, -1):
        for j in range(symbols.shape[1] - 1, -1, -1):
            table = rows[i] + columns[j]
            symbol = symbols[i, j]
            frequency = np.int64(frequencies[table, symbol])
            if state >= frequency << 48:
                place -= 1
                words[place] = np.uint32(state & 0xFFFFFFFF)
                state >>= 32
            state = (
                ((state // frequency) << PRECISION)
                + state % frequency
                + np.int64(starts[table, symbol])
            )
    place -= 2
    words[place] = np.uint32(state >> 32)
    words[place + 1] = np.uint32(state & 0xFFFFFFFF)
    return words.shape[0] - place


@jit
def decode_symbols(words, rows, columns, frequencies, starts, slots, symbols):  # type: ignore[no-untyped-def]
    """Write the symbols (rows, columns) of ``words``; return 0 if the words end where they do.

    ``slots`` (tables, 2**14) says which symbol each slot of a table belongs to.
    """
    state = (np.int64(words[0]) << 32) | np.int64(words[1])
    place = 2
    for i in range(symbols.shape[0]):
        for j in range(symbols.shape[1]):
            table = rows[i] + columns[j]
            slot = state & ((1 << PRECISION) - 1)
            symbol = slots[table, slot]
            symbols[i, j] = symbol
            state = (
                np.int64(frequencies[table, symbol]) * (state >> PRECISION)
                + slot
                - np.int64(starts[table, symbol])
            )
            if state < LEAST:
                if place >= words.shape[0]:
                    return 1
                state = (state << 32) | np.int64(words[place])
                place += 1
    return 0 if place == words.shape[0] and state == LEAST else 1
