"""The scale of least squared error of a group, exactly, where levels are equally spaced.

At a scale s each entry takes the nearest level Q times s. With A = ΣQ² and B = ΣQw the error is
``E(s) = Σw² - 2sB + s²A``, and the least that the same codes have is ``Σw² - B²/A``, at B/A. One
pass over a group, without a branch, gives A and B at one scale. Between two scales a < b some
entries go to lower levels. One that does so at t adds ``s(l'² - l²)(s - t)`` to what its level at a
gains at s, and the like with its level at b; averaged with weights in proportion to the distances
from a and b all t cancel:

    E(s) ≥ [(b - s) E_a(s) + (s - a) E_b(s)] / (b - a) - s (s - a)(b - s) / (b - a) (A_a - A_b),

where E_a and E_b are the errors of the codes at the ends. So the bound is off by the square of the
distance of the ends, and a few passes leave a narrow interval. Only the entries that change their
level in it are sorted, by the scale where they do, and swept.

Source: the sweep as in PiSO, arXiv 2606.10890, for an identity Hessian; the bound is our own.
"""

from __future__ import annotations

import numpy as np

from corequant._numba.bits import to_float
from corequant._numba.jit import jit, jit_reordered
from corequant._numba.quantize import row_magnitude

__all__ = ["exact_scales_uniform"]

COARSE, MIDDLE, FINE = 1.5, 1.15, 1.006
"""Ratios of an interval's ends: well above the scale that covers the range, below it, and where
splitting stops and sweeping begins. These were the fastest of those tried."""

FEW = 24
"""Largest ``A_a - A_b``, and so number of changes, that is swept at once."""

CHUNK = 64
"""Entries that are added in float32, in any order; sums of these are in float64."""

SLACK = 8e-6
"""What float32 may make of 2sB, relative to Σw², which sB does not exceed near the best scale: 2⁻²⁴
for each addition in a chunk, twice. The rounding of entries and scales is far below that."""

INTERVALS = 4096
"""Room for intervals that are waiting."""


@jit_reordered
def _level(value, least, most):  # type: ignore[no-untyped-def]
    """Return the nearest level; without a branch."""
    level = np.rint(value)
    level = least if level < least else level
    return most if level > most else level


@jit_reordered
def _normalize(row, inverse, x):  # type: ignore[no-untyped-def]
    """Write the entries in units of the largest, and return the sum of their squares."""
    total = 0.0
    for k in range(row.shape[0]):
        w = np.float64(row[k]) * inverse
        x[k] = np.float32(w)
        total += w * w
    return total


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
            q = _level(w * inverse, least, most)
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


@jit_reordered
def _exact_sums(row, inverse, finer, least, most):  # type: ignore[no-untyped-def]
    """Return ΣQw and ΣQ² at the scale 1 / finer of entries in units of the largest."""
    product = 0.0
    square = 0.0
    low = np.float64(least)
    high = np.float64(most)
    for k in range(row.shape[0]):
        w = np.float64(row[k]) * inverse
        q = _level(w * finer, low, high)
        product += q * w
        square += q * q
    return product, square


@jit_reordered
def _flag(x, above, below, least, most, flags):  # type: ignore[no-untyped-def]
    """Mark the entries that have another level at one inverse scale than at the other.

    Returns how many levels lie between in all.
    """
    number = np.int64(0)
    for k in range(x.shape[0]):
        changes = _level(x[k] * above, least, most) - _level(x[k] * below, least, most)
        flags[k] = np.int16(changes)
        number += np.int64(abs(changes))
    return number


@jit
def _sort(breaks, n, small, big):  # type: ignore[no-untyped-def]
    """Return the first n columns by falling scale: into as many buckets, and then by insertion."""
    ordered = np.empty((3, n))
    starts = np.zeros(n + 1, np.int64)
    factor = n / (big - small) * (1 - 1e-12)
    for k in range(n):
        starts[int(max((big - breaks[0, k]) * factor, 0.0)) + 1] += 1
    for b in range(n):
        starts[b + 1] += starts[b]
    for k in range(n):
        b = int(max((big - breaks[0, k]) * factor, 0.0))
        at = starts[b]
        starts[b] += 1
        for i in range(3):
            ordered[i, at] = breaks[i, k]
    for k in range(1, n):
        place, product, square = ordered[0, k], ordered[1, k], ordered[2, k]
        i = k - 1
        while i >= 0 and ordered[0, i] < place:
            for j in range(3):
                ordered[j, i + 1] = ordered[j, i]
            i -= 1
        ordered[0, i + 1], ordered[1, i + 1], ordered[2, i + 1] = place, product, square
    return ordered


@jit
def _sweep(row, x, inverse, small, big, least, most, flags, best):  # type: ignore[no-untyped-def]
    """Take into ``best`` (gain, scale) all sets of codes from the scale ``big`` to ``small``."""
    # Entries that surely keep their level are told apart in float32.
    above = np.float32(1 / (small * (1 - 1e-6)))
    below = np.float32(1 / (big * (1 + 1e-6)))
    # The scale, the change of B and that of A of each change of a level.
    breaks = np.empty((3, _flag(x, above, below, least, most, flags)))
    finer = 1 / big
    product, square = _exact_sums(row, inverse, finer, least, most)
    n = 0
    four = flags.view(np.int64)
    for chunk in range(four.shape[0]):
        if four[chunk] == 0:
            continue
        for k in range(4 * chunk, 4 * chunk + 4):
            if flags[k] == 0:
                continue
            w = np.float64(row[k]) * inverse
            level = abs(np.rint(w * finer))
            top = np.float64(most) if w > 0 else -np.float64(least)
            w = abs(w)
            level = min(level, top)
            while level < top and w > (level + 0.5) * small:
                breaks[0, n] = min(w / (level + 0.5), big)
                breaks[1, n] = w
                breaks[2, n] = 2 * level + 1
                level += 1
                n += 1
    ordered = _sort(breaks, n, small, big)
    for k in range(n + 1):
        if k > 0:
            product += ordered[1, k - 1]
            square += ordered[2, k - 1]
        if product > 0 and square > 0 and product * product > best[0] * square:
            best[0] = product * product / square
            best[1] = product / square


@jit
def _least_error(total, product, square, small, big):  # type: ignore[no-untyped-def]
    """Return the least error of one set of codes at the scales between two."""
    s = big
    if square > 0:
        s = min(max(product / square, small), big)
    return total - 2 * s * product + s * s * square


@jit
def _put(intervals, at, small, low_product, low_square, big, high_product, high_square):  # type: ignore[no-untyped-def]  # fmt: skip
    intervals[at, 0] = small
    intervals[at, 1] = low_product
    intervals[at, 2] = low_square
    intervals[at, 3] = big
    intervals[at, 4] = high_product
    intervals[at, 5] = high_square


@jit
def _cover(x, total, least, most, intervals):  # type: ignore[no-untyped-def]
    """Write intervals of all scales that may be best, with B and A of their ends, from the top.

    Returns their number and the least error that is known to be reached.
    """
    top = max(np.float64(most), -np.float64(least))
    bound = total
    # All entries become zero at the first scale.
    big = 2.0
    high_product = 0.0
    high_square = 0.0
    number = 0
    while True:
        small = big / (COARSE if big * top > 1.2 else MIDDLE)
        product, square = _sums(x, np.float32(1 / small), least, most)
        if product > 0:
            bound = min(bound, total - product * product / square)
        _put(intervals, number, small, product, square, big, high_product, high_square)
        number += 1
        big = small
        high_product = product
        high_square = square
        # Below, clipping alone costs more than the best.
        if big * top < 1 and (
            _clipped(x, np.float32(least * big), np.float32(most * big)) > bound + SLACK * total
            or big * top < 1e-9
            or number > INTERVALS // 2
        ):
            return number, bound


@jit
def _narrow(x, total, least, most, intervals, number, bound, narrow):  # type: ignore[no-untyped-def]  # fmt: skip
    """Split intervals and drop what cannot hold the best scale.

    Writes scale, scale and bound of the intervals that are left, from the smallest scale up, and
    returns how many there are and the least error that is known to be reached.
    """
    found = 0
    while number > 0:
        number -= 1
        small = intervals[number, 0]
        low_product = intervals[number, 1]
        low_square = intervals[number, 2]
        big = intervals[number, 3]
        high_product = intervals[number, 4]
        high_square = intervals[number, 5]
        changes = low_square - high_square
        floor = min(
            _least_error(total, low_product, low_square, small, big),
            _least_error(total, high_product, high_square, small, big),
        )
        floor -= big * (big - small) / 4 * changes
        if floor > bound + SLACK * total:
            continue
        if big <= small * FINE or changes <= FEW or number + found + 2 > INTERVALS:
            narrow[found, 0] = small
            narrow[found, 1] = big
            narrow[found, 2] = floor
            found += 1
            continue
        middle = np.sqrt(small * big)
        product, square = _sums(x, np.float32(1 / middle), least, most)
        if product > 0:
            bound = min(bound, total - product * product / square)
        _put(intervals, number, middle, product, square, big, high_product, high_square)
        _put(intervals, number + 1, small, low_product, low_square, middle, product, square)
        number += 2
    return found, bound


@jit
def exact_scales_uniform(panel, least, most, mask, scales):  # type: ignore[no-untyped-def]
    """Write the scale of least squared error of each group, 0 where none beats all zeros.

    No entry may be a subnormal number of float64. Levels are the integers from ``least`` to
    ``most``, float32, at least one of them not zero; ``mask`` is that of a magnitude's bits.
    """
    size = panel.shape[1]
    # Zeros at the end add nothing.
    x = np.zeros((size + CHUNK - 1) // CHUNK * CHUNK, np.float32)
    flags = np.zeros(x.shape[0], np.int16)
    intervals = np.empty((INTERVALS, 6))
    narrow = np.empty((INTERVALS, 3))
    best = np.empty(2)
    for g in range(panel.shape[0]):
        row = panel[g]
        scales[g] = 0
        amax = np.float64(to_float(row_magnitude(row, mask)))
        if amax == 0:
            continue
        inverse = 1 / amax
        total = _normalize(row, inverse, x)
        number, bound = _cover(x, total, least, most, intervals)
        found, bound = _narrow(x, total, least, most, intervals, number, bound, narrow)
        highest = bound + SLACK * total
        best[:] = 0
        f = 0
        while f < found:
            if narrow[f, 2] > highest:
                f += 1
                continue
            # Neighbours are swept as one.
            small = narrow[f, 0]
            while (
                f + 1 < found and narrow[f + 1, 0] == narrow[f, 1] and narrow[f + 1, 2] <= highest
            ):
                f += 1
            _sweep(row, x, inverse, small, narrow[f, 1], least, most, flags, best)
            f += 1
        scales[g] = best[1] * amax
