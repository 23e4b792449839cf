"""The scale of least squared error of a group, exactly, where levels are equally spaced.

At a scale s each entry takes the nearest level Q times s. With A = ΣQ² and B = ΣQw the error is
less than that of zeros by ``2sB - s²A = 2s h(s)``; the same codes gain ``B²/A`` at their best, B/A.
h is a sum of functions ``max(|w| - t, 0)`` at thresholds t in proportion to s, as `gain_table`
says, so it falls and is convex: between two scales it lies below its chord, and the gain below that
of the chord, a parabola whose top is known. That is off by the square of the scales' distance, so
that a few evaluations of h leave a narrow interval. Only the entries that change their level in it
are sorted, by the scale where they do, and swept.

h comes from one pass over a group, without a branch, or, where entries are many, from a table that
has an upper bound of it.

Source: the sweep as in PiSO, arXiv 2606.10890, for an identity Hessian; the bounds are our own.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.gain_table import CUT, look_up, tabulate
from corequant._cpu.loops.jit import jit, jit_reordered
from corequant._cpu.loops.level_sweep import CHUNK, exact_sums, level_of, room_for_sweeps, sweep

__all__ = ["exact_scales_uniform"]

COARSE, MIDDLE = 1.5, 1.15
"""Ratios of an interval's ends: well above the scale that covers the range, and below it."""

FINE = 1.006, 1.001
FEW = 24, 8
"""Where splitting stops and sweeping begins, without a table and with one: the ratio of an
interval's ends, and the fall of A and so the number of changes. With the other constants these were
the fastest of those tried."""

PROMISING = 1e-3
"""By how much of itself the least error must fall, by the table, to be worth a pass."""

SLACK = 8e-6, 5e-7
"""What float32 may make of 2sB, relative to Σw², which sB does not exceed near the best scale: 2⁻²⁴
for each addition in a chunk, twice. In a table only entries are rounded, by 2⁻²³ with what is cut
off, and sB is at most 2Σw² anywhere."""

INTERVALS = 4096
"""Room for intervals that are waiting."""


@jit_reordered
def _normalize(row, inverse, lowest, x):  # type: ignore[no-untyped-def]
    """Write the entries in units of the largest; returns the sums of squares and of magnitudes."""
    total = 0.0
    magnitude = 0.0
    for k in range(row.shape[0]):
        w = max(np.float64(row[k]) * inverse, lowest)
        x[k] = np.float32(w)
        total += w * w
        magnitude += abs(w)
    return total, magnitude


@jit_reordered
def _sums(x, inverse, least, most):  # type: ignore[no-untyped-def]
    """Return ΣQw and ΣQ² at a scale; x is a whole number of chunks."""
    product = 0.0
    square = 0.0
    for chunk in range(x.shape[0] // CHUNK):
        part = np.float32(0)
        energy = np.float32(0)
        for k in range(CHUNK):
            w = x[chunk * CHUNK + k]
            q = level_of(w * inverse, least, most)
            part += q * w
            energy += q * q
        product += np.float64(part)
        square += np.float64(energy)
    return product, square


@jit_reordered
def _clipped(x, reach_down, reach_up):  # type: ignore[no-untyped-def]
    """Return the error of the entries beyond the last levels, to some millionths of itself."""
    error = 0.0
    zero = np.float32(0)
    for chunk in range(x.shape[0] // CHUNK):
        part = zero
        for k in range(CHUNK):
            over = x[chunk * CHUNK + k] - reach_up
            under = reach_down - x[chunk * CHUNK + k]
            over = under if under > over else over
            over = zero if over < zero else over
            part += over * over
        error += np.float64(part)
    return error


@jit
def _measure(x, edges, scale, least, most):  # type: ignore[no-untyped-def]
    """Return ΣQw and ΣQ² at a scale or, from a table, what gains no less."""
    if edges is None:
        return _sums(x, np.float32(1 / scale), least, most)
    low = np.int64(-least)
    high = np.int64(most)
    return look_up(edges, scale, min(low, high), max(low, high))


@jit
def _gain(product, square):  # type: ignore[no-untyped-def]
    """Return what codes gain at their best scale, B / A."""
    return product * product / square if product > 0 else 0.0


@jit
def _most_gain(small, low, big, high):  # type: ignore[no-untyped-def]
    """Return an upper bound of the gain at the scales between two, from h there: its chord's."""
    width = big - small
    fall = low - high
    middle = low * width + small * fall
    if 2 * fall * small < middle < 2 * fall * big:
        return middle * middle / (2 * fall * width)
    return 2 * max(small * low, big * high)


@jit
def _put(intervals, at, small, low, low_square, big, high, high_square):  # type: ignore[no-untyped-def]  # fmt: skip
    intervals[at, 0] = small
    intervals[at, 1] = low
    intervals[at, 2] = low_square
    intervals[at, 3] = big
    intervals[at, 4] = high
    intervals[at, 5] = high_square


@jit
def _reached(row, inverse, scale, least, most):  # type: ignore[no-untyped-def]
    """Return what the codes that are nearest at a scale gain."""
    product, square = exact_sums(row, inverse, 1 / scale, least, most)
    return _gain(product, square)


@jit
def _cover(row, inverse, x, edges, total, magnitude, least, most, intervals):  # type: ignore[no-untyped-def]  # fmt: skip
    """Write intervals of all scales that may be best, with h and A of their ends, from the top.

    Returns their number, and a gain that is reached.
    """
    top = max(np.float64(most), -np.float64(least))
    promised = 0.0
    candidate = 1.0
    reached = np.inf
    # All entries become zero at the first scale.
    big = 2.0
    high = 0.0
    high_square = 0.0
    number = 0
    while True:
        small = big / (COARSE if big * top > 1.2 else MIDDLE)
        product, square = _measure(x, edges, small, least, most)
        gain = _gain(product, square)
        if gain > promised:
            promised = gain
            candidate = product / square
        low = product - 0.5 * small * square
        _put(intervals, number, small, low, square, big, high, high_square)
        number += 1
        big = small
        high = low
        high_square = square
        over = big * top < 1e-9 or number > INTERVALS // 2
        if big * top < 1:
            if edges is None:
                # Clipping alone costs more than the best.
                error = _clipped(x, np.float32(least * big), np.float32(most * big))
                over = over or error > total - promised + SLACK[0] * total
            else:
                # A level gains at most 2s for each unit of the entries.
                over = over or 2 * big * top * magnitude < min(promised, reached)
        if over and edges is None:
            return number, promised
        if over and reached < np.inf:
            return number, reached
        if over:
            # What a table promises bounds nothing before it is reached.
            reached = _reached(row, inverse, candidate, least, most)


@jit
def _narrow(row, inverse, x, edges, total, slack, least, most, intervals, number, reached, narrow):  # type: ignore[no-untyped-def]  # fmt: skip
    """Split intervals and drop what cannot hold the best scale.

    Writes scale, scale and largest gain of the intervals that are left, from the smallest scale up,
    and returns how many there are and a gain that is reached.
    """
    found = 0
    fine, few = FINE[int(edges is not None)], FEW[int(edges is not None)]
    promised = reached
    while number > 0:
        number -= 1
        small = intervals[number, 0]
        low = intervals[number, 1]
        low_square = intervals[number, 2]
        big = intervals[number, 3]
        high = intervals[number, 4]
        high_square = intervals[number, 5]
        most_gain = _most_gain(small, low, big, high)
        if most_gain < reached - slack:
            continue
        full = number + found + 2 > INTERVALS
        if big <= small * fine or low_square - high_square <= few or full:
            narrow[found, 0] = small
            narrow[found, 1] = big
            narrow[found, 2] = most_gain
            found += 1
            continue
        middle = np.sqrt(small * big)
        product, square = _measure(x, edges, middle, least, most)
        gain = _gain(product, square)
        if edges is None:
            reached = max(reached, gain)
        elif gain > promised + PROMISING * (total - reached):
            promised = gain
            reached = max(reached, _reached(row, inverse, product / square, least, most))
        at_middle = product - 0.5 * middle * square
        _put(intervals, number, middle, at_middle, square, big, high, high_square)
        _put(intervals, number + 1, small, low, low_square, middle, at_middle, square)
        number += 2
    return found, reached


@jit
def exact_scales_uniform(panel, magnitudes, least, most, bins, edges, scales):  # type: ignore[no-untyped-def]
    """Write the scale of least squared error of each group, 0 where none beats all zeros.

    No entry may be a subnormal number of float64. ``magnitudes`` are the largest of each group.
    Levels are the integers from ``least`` to ``most``, float32, at least one of them not zero.
    ``bins``, empty, and ``edges`` are room for a table, or None where passes are faster.
    """
    size = panel.shape[1]
    # Zeros at the end add nothing.
    padded = (size + CHUNK - 1) // CHUNK * CHUNK
    x = np.zeros(padded, np.float32)
    words = np.zeros(padded, np.uint32)
    longer = np.float32(0 if most == -least else (1 if most > -least else -1))
    # What can't take any level counts as zero.
    lowest = -np.inf if least < 0 else 0.0
    room = room_for_sweeps(padded)
    intervals = np.empty((INTERVALS, 6))
    narrow = np.empty((INTERVALS, 3))
    best = np.empty(2)
    for g in range(panel.shape[0]):
        row = panel[g]
        scales[g] = 0
        amax = np.float64(magnitudes[g])
        if amax == 0:
            continue
        inverse = 1 / amax
        total, magnitude = _normalize(row, inverse, lowest, x)
        slack = SLACK[int(edges is not None)] * total
        if edges is not None:
            tabulate(x, longer, words, bins, edges)
            slack += CUT * magnitude
        number, reached = _cover(row, inverse, x, edges, total, magnitude, least, most, intervals)
        found, reached = _narrow(
            row, inverse, x, edges, total, slack, least, most, intervals, number, reached, narrow
        )
        wanted = reached - slack
        best[:] = 0
        f = 0
        while f < found:
            if narrow[f, 2] < wanted:
                f += 1
                continue
            # Neighbours are swept as one.
            small = narrow[f, 0]
            while f + 1 < found and narrow[f + 1, 0] == narrow[f, 1] and narrow[f + 1, 2] >= wanted:
                f += 1
            sweep(row, x, inverse, small, narrow[f, 1], least, most, room, best)
            f += 1
        scales[g] = best[1] * amax
