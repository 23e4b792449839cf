"""Upper bounds on what the nearest codes gain at a scale, from a table instead of the entries.

At a scale s the nearest codes have a squared error that is smaller than that of zeros by

    Σw² - E(s) = 2s Σ_l F((l - ½)s),  F(t) = Σ max(|w| - t, 0),

with a term for each level l > 0 that entries can take: those beyond its threshold ``(l - ½)s``. F
is convex. The table has it at the edges of equal bins, whose chords ``c - kt`` are nowhere below
it. So Σc and Σ(2l - 1)k, a look-up a level, stand for ΣQ|w| and ΣQ² of the codes Q: what they say
is gained is never too little, and too much only by what F is below its chord in one bin a level.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from corequant._cpu.loops.jit import jit, jit_reordered

__all__ = ["CUT", "look_up", "room_for", "tabulate"]

BITS = 30
"""Magnitudes up to 1 are counted as integers of so many bits, cut off below."""

PIECE = 1 << 15
NUMBER = 47
"""So many entries at most are counted at once: a word holds their number from this bit on, and
their sum below."""

CUT = 2.0**-28
"""What cutting off may take from a gain, relative to Σ|w|: 2⁻³⁰ times 2s for each level that an
entry takes, where Qs is at most 2|w|. Of an entry of 1 it takes 2⁻²⁴, as float32 does."""

BINS = 1024
SHIFT = 20
"""Equal bins, told by the highest bits of a magnitude, those from this one on."""

LEAST = 2048
"""From so many entries on a table is faster than passes; with 3 levels from half as many."""


def room_for(entries: int) -> tuple[Any, Any]:
    """Return room for a table: bins, and F at their edges, of both signs and of the longer one.

    Two Nones where passes are faster. F is 0 at the last edge, and at one beyond.
    """
    if entries < LEAST:
        return None, None
    return np.zeros(2 * BINS, np.int64), np.zeros((2, BINS + 2))


@jit_reordered
def _to_words(x, longer, words):  # type: ignore[no-untyped-def]
    """Write magnitudes as integers, with a bit above them for entries of the sign ``longer``."""
    one = np.float32(1 << BITS)
    most = one - np.float32(64)
    for k in range(x.shape[0]):
        magnitude = abs(x[k]) * one
        magnitude = most if magnitude > most else magnitude
        words[k] = np.uint32(magnitude) | (np.uint32(x[k] * longer > 0) << np.uint32(BITS))


@jit
def _count(words, bins):  # type: ignore[no-untyped-def]
    """Add numbers and sums of words to their bins."""
    one = np.int64(1 << NUMBER)
    for k in range(words.shape[0]):
        # Unsigned, an index needs no test for places from the end.
        bins[words[k] >> np.uint32(SHIFT)] += one + np.int64(words[k])


@jit
def _sum_up(bins):  # type: ignore[no-untyped-def]
    """Add to each bin all that are above."""
    above = np.int64(0)
    for b in range(bins.shape[0] - 1, -1, -1):
        above += bins[b]
        bins[b] = above


@jit_reordered
def _take_out(bins, first, edges):  # type: ignore[no-untyped-def]
    """Add F at the lower edges of bins, which number and sum the words above, and empty them.

    ``first`` is the first bin's place among those of both signs, and so the bit for the sign.
    """
    mask = np.int64((1 << NUMBER) - 1)
    for b in range(bins.shape[0]):
        above = (bins[b] & mask) - ((first + b) << SHIFT) * (bins[b] >> NUMBER)
        edges[b] += np.float64(above) * 2.0**-BITS
        bins[b] = 0


@jit
def tabulate(x, longer, words, bins, edges):  # type: ignore[no-untyped-def]
    """Write F at the edges of empty bins.

    ``x`` are float32 from -1 to 1; ``longer`` is the sign of the entries that can take more levels,
    0 if both can take as many; ``words`` is room for as many uint32.
    """
    edges[:] = 0
    _to_words(x, longer, words)
    for start in range(0, x.shape[0], PIECE):
        _count(words[start : start + PIECE], bins)
        if longer != 0:
            _sum_up(bins[BINS:])
            _take_out(bins[BINS:], BINS, edges[1])
        _sum_up(bins[:BINS])
        _take_out(bins[:BINS], 0, edges[0])
    if longer != 0:
        for b in range(edges.shape[1]):
            edges[0, b] += edges[1, b]


@jit_reordered
def look_up(edges, scale, both, most):  # type: ignore[no-untyped-def]
    """Return what stands for ΣQ|w| and ΣQ² at a scale.

    All entries can take levels up to ``both``, those of the longer side up to ``most``.
    """
    step = scale * BINS
    reach = int(min(BINS / step + 0.5, most))
    product = 0.0
    square = 0.0
    for side in range(2):
        below, above = edges[side], edges[side, 1:]
        for level in range(both * side, reach if side else min(reach, both)):
            place = (level + 0.5) * step
            b = np.uint32(place)
            fall = below[b] - above[b]
            product += below[b] + np.floor(place) * fall
            square += (2 * level + 1) * fall
    return product, square * BINS
