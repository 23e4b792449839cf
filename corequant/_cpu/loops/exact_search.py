"""The scale of least squared error of a group, exactly, without visiting most breakpoints.

For a scale s each entry takes the nearest level times s, and the error is piecewise quadratic in s
with a piece for each set of codes. With Q the entries' levels, the least error of a piece is
``Σw² - (ΣQw)²/ΣQ²``, at ``s = ΣQw/ΣQ²``. Entries are counted into equal buckets with running sums,
which gives for any interval of scales, in time that doesn't depend on the number of entries,

* a lower bound of the error: entries that keep their level over the whole interval count exactly,
  those in the buckets near a threshold with the least error that they can have;
* an upper bound: the error of one choice of codes.

Intervals whose lower bound is above the best upper bound are dropped, others split, and the last
ones swept breakpoint by breakpoint.

Where levels are equally spaced, ``exact_uniform`` finds the same scale sooner.

Source: the sweep as in PiSO, arXiv 2606.10890, for an identity Hessian; the bounds are our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["exact_scales"]

COARSE, MIDDLE, FINE = 1.4, 1.05, 1.004
"""Ratios of an interval's ends: well above the scale that covers the range, below it, and where
splitting stops and sweeping begins. These were the fastest of those tried."""

PARTS = 3
FEW, MANY = 96, 128
"""Uncertain entries that are swept at once instead of splitting their interval; breakpoints up to
which nothing sorts faster than insertion."""

SLACK = 1e-12
"""What rounding may make of equal errors, over the energy of the group."""


class Side(NamedTuple):
    """What entries of one sign can become, and a group's entries of that sign in buckets.

    ``levels`` ascend from the level nearest to zero, ``middles[j]`` lies between levels j and
    j + 1; for entries below zero both are magnitudes. ``counts``, ``sums`` and ``squares`` run up
    to each bucket, ``order`` holds the entries bucket by bucket, and ``low`` and ``high`` the
    buckets around each middle.
    """

    levels: Any
    middles: Any
    counts: Any
    sums: Any
    squares: Any
    order: Any
    low: Any
    high: Any


class Breaks(NamedTuple):
    """Breakpoints of an interval, and what changes there: see ``_walk``."""

    places: Any
    products: Any
    squares: Any


@jit
def _fill(magnitudes, amax, side):  # type: ignore[no-untyped-def]
    """Write running sums before each bucket, and the entries sorted by bucket.

    Returns the number of buckets over the largest magnitude.
    """
    counts, sums, squares, order = side.counts, side.sums, side.squares, side.order
    buckets = sums.shape[0] - 1
    inverse = buckets / amax
    counts[:] = 0
    sums[:] = 0
    squares[:] = 0
    for k in range(magnitudes.shape[0]):
        w = magnitudes[k]
        b = min(int(w * inverse), buckets - 1)
        counts[b] += 1
        sums[b] += w
        squares[b] += w * w
    count = 0
    total = 0.0
    energy = 0.0
    for b in range(buckets + 1):
        here = counts[b]
        counts[b] = count
        count += here
        part = sums[b]
        sums[b] = total
        total += part
        part = squares[b]
        squares[b] = energy
        energy += part
    for k in range(magnitudes.shape[0]):
        w = magnitudes[k]
        b = min(int(w * inverse), buckets - 1)
        order[counts[b]] = w
        counts[b] += 1
    # Each count moved up by its bucket's size.
    for b in range(buckets, 0, -1):
        counts[b] = counts[b - 1]
    counts[0] = 0
    return inverse


@jit
def _sort(places, products, squares, n):  # type: ignore[no-untyped-def]
    """Sort by falling place: a few dozen by insertion, more by Shell's method."""
    gap = n if n > MANY else 2
    while gap > 1:
        gap = max(gap * 4 // 9, 1)
        for k in range(gap, n):
            place = places[k]
            product = products[k]
            square = squares[k]
            i = k - gap
            while i >= 0 and places[i] < place:
                places[i + gap] = places[i]
                products[i + gap] = products[i]
                squares[i + gap] = squares[i]
                i -= gap
            places[i + gap] = place
            products[i + gap] = product
            squares[i + gap] = square


@jit
def _side(side, inverse, small, big):  # type: ignore[no-untyped-def]
    """Sum over the entries of one sign, for the scales [small, big].

    Returns Σlw, Σl² and Σw² of the entries whose level is certain, the least error of the others,
    Σlw and Σl² of the others with their lower levels, and how many they are. ``low[j]`` and
    ``high[j]`` become the buckets around threshold j.
    """
    levels, middles, low, high = side.levels, side.middles, side.low, side.high
    counts, sums, squares = side.counts, side.sums, side.squares
    buckets = sums.shape[0] - 1
    last = middles.shape[0]
    for j in range(last):
        low[j] = min(int(middles[j] * small * inverse), buckets)
        high[j] = min(int(middles[j] * big * inverse) + 1, buckets)
    product = 0.0
    square = 0.0
    energy = 0.0
    least = 0.0
    loose_product = 0.0
    loose_square = 0.0
    loose = 0
    start = 0
    for j in range(last + 1):
        stop = low[j] if j < last else buckets
        level = levels[j]
        if stop > start:
            product += level * (sums[stop] - sums[start])
            square += level * level * (counts[stop] - counts[start])
            energy += squares[stop] - squares[start]
        if j == last:
            break
        first = max(start, stop)
        after = max(first, high[j])
        number = counts[after] - counts[first]
        if number > 0:
            loose += number
            loose_product += level * (sums[after] - sums[first])
            loose_square += level * level * number
            apart = (j == 0 or high[j - 1] <= low[j]) and (j + 1 == last or high[j] <= low[j + 1])
            if apart:
                error = min(
                    low[j] / inverse - level * big, levels[j + 1] * small - high[j] / inverse
                )
                if error > 0:
                    # Slightly less, since the ends of buckets are rounded.
                    least += number * error * error * (1 - 1e-9)
        start = after
    return product, square, energy, least, loose_product, loose_square, loose


@jit
def _walk(side, big, small, breaks, n):  # type: ignore[no-untyped-def]
    """Exact Σlw and Σl² of the uncertain entries at the scale ``big``, and their breakpoints.

    The breakpoints down to the scale ``small`` are appended to the ``n`` that there are.
    """
    levels, middles, order = side.levels, side.middles, side.order
    places, products, squares = breaks.places, breaks.products, breaks.squares
    counts, low, high = side.counts, side.low, side.high
    product = 0.0
    square = 0.0
    start = 0
    for j in range(middles.shape[0]):
        first = max(start, low[j])
        after = max(first, high[j])
        for k in range(counts[first], counts[after]):
            w = order[k]
            level = j
            while level > 0 and w <= middles[level - 1] * big:
                level -= 1
            while level < middles.shape[0] and w > middles[level] * big:
                level += 1
            product += levels[level] * w
            square += levels[level] * levels[level]
            while level < middles.shape[0] and w > middles[level] * small:
                places[n] = w / middles[level]
                products[n] = (levels[level + 1] - levels[level]) * w
                squares[n] = levels[level + 1] ** 2 - levels[level] ** 2
                n += 1
                level += 1
        start = after
    return product, square, n


@jit
def _bounds(a, b, small, big, total):  # type: ignore[no-untyped-def]
    """Lower bound of the error over an interval of scales, and an upper bound of the least."""
    product = a[0] + b[0]
    square = a[1] + b[1]
    energy = a[2] + b[2]
    best = big
    if square > 0:
        best = min(max(product / square, small), big)
    floor = energy - 2 * best * product + best * best * square + a[3] + b[3]
    product += a[4] + b[4]
    square += a[5] + b[5]
    ceiling = total
    if product > 0 and square > 0:
        ceiling = total - product * product / square
    return floor, ceiling


@jit
def _clipping(side, inverse, big, amax):  # type: ignore[no-untyped-def]
    """Return a lower bound of the error of one sign's entries beyond their last level."""
    reach = side.levels[-1] * big
    if reach >= amax:
        return 0.0
    last = side.sums.shape[0] - 1
    edge = min(int(reach * inverse) + 1, last)
    count = side.counts[last] - side.counts[edge]
    part = side.sums[last] - side.sums[edge]
    return side.squares[last] - side.squares[edge] - 2 * reach * part + reach * reach * count


@jit
def _descend(up, down, inverse, amax, big, total, bound, ends):  # type: ignore[no-untyped-def]
    """Cut scales into coarse intervals from ``big`` down until clipping costs more than the best.

    Writes small and large end, lower bound and uncertain entries of each to ``ends``; returns how
    many there are, and the best upper bound.
    """
    cover = amax / max(up.levels[-1], down.levels[-1])
    slack = total * SLACK
    stack = 0
    while stack < 2000:
        small = big / (COARSE if big > 1.1 * cover else MIDDLE)
        a, b = _side(up, inverse, small, big), _side(down, inverse, small, big)
        floor, ceiling = _bounds(a, b, small, big, total)
        bound = min(bound, ceiling)
        _push(ends, stack, small, big, floor, a[6] + b[6])
        stack += 1
        big = small
        clipped = _clipping(up, inverse, big, amax) + _clipping(down, inverse, big, amax)
        if clipped > bound + slack or big < cover * 1e-9:
            break
    return stack, bound


@jit
def _push(ends, stack, small, big, floor, loose):  # type: ignore[no-untyped-def]
    ends[stack, 0] = small
    ends[stack, 1] = big
    ends[stack, 2] = floor
    ends[stack, 3] = loose


@jit
def _split(up, down, inverse, small, big, total, bound, ends, stack):  # type: ignore[no-untyped-def]
    """Push the parts of an interval that may hold the best scale; return as ``_descend`` does."""
    ratio = (big / small) ** (1 / PARTS)
    edge = big
    for part in range(PARTS):
        inner = small if part == PARTS - 1 else edge / ratio
        a, b = _side(up, inverse, inner, edge), _side(down, inverse, inner, edge)
        floor, ceiling = _bounds(a, b, inner, edge, total)
        bound = min(bound, ceiling)
        if floor <= bound + total * SLACK:
            _push(ends, stack, inner, edge, floor, a[6] + b[6])
            stack += 1
        edge = inner
    return stack, bound


@jit
def _sweep(up, down, inverse, small, big, breaks, gain, scale):  # type: ignore[no-untyped-def]
    """Go through the breakpoints of an interval; return the best gain so far, and its scale."""
    places, products, squares = breaks.places, breaks.products, breaks.squares
    a, b = _side(up, inverse, small, big), _side(down, inverse, small, big)
    product = a[0] + b[0]
    square = a[1] + b[1]
    p, q, n = _walk(up, big, small, breaks, 0)
    product += p
    square += q
    p, q, n = _walk(down, big, small, breaks, n)
    product += p
    square += q
    _sort(places, products, squares, n)
    for k in range(n + 1):
        if k > 0:
            product += products[k - 1]
            square += squares[k - 1]
        if product > 0 and square > 0 and product * product > gain * square:
            gain = product * product / square
            scale = product / square
    return gain, scale


@jit
def _best_scale(up, down, inverse, amax, total, above, below, breaks, ends):  # type: ignore[no-untyped-def]
    """Return the best scale of a group with numbers of entries ``above`` and ``below`` zero."""
    # All entries at the level nearest to zero: no breakpoint lies above this scale.
    product = up.levels[0] * up.sums[-1] + down.levels[0] * down.sums[-1]
    square = up.levels[0] ** 2 * above + down.levels[0] ** 2 * below
    gain = 0.0
    scale = 0.0
    if product > 0 and square > 0:
        gain = product * product / square
        scale = product / square
    first_middle = np.inf
    if up.middles.shape[0]:
        first_middle = up.middles[0]
    if down.middles.shape[0]:
        first_middle = min(first_middle, down.middles[0])
    if first_middle == np.inf:
        return scale
    big = amax / first_middle * (1 + 1e-12)
    stack, bound = _descend(up, down, inverse, amax, big, total, total - gain, ends)
    while stack > 0:
        stack -= 1
        small = ends[stack, 0]
        big = ends[stack, 1]
        if ends[stack, 2] > bound + total * SLACK:
            continue
        if big > small * FINE and ends[stack, 3] > FEW and stack < 4000:
            stack, bound = _split(up, down, inverse, small, big, total, bound, ends, stack)
            continue
        gain, scale = _sweep(up, down, inverse, small, big, breaks, gain, scale)
        bound = min(bound, total - gain)
    return scale


@jit
def _part(x, ups, downs):  # type: ignore[no-untyped-def]
    """Part entries by sign; return how many are in each, the largest magnitude, and the energy."""
    up = 0
    down = 0
    amax = 0.0
    total = 0.0
    for value in x:
        w = np.float64(value)
        total += w * w
        amax = max(amax, abs(w))
        # Without a branch, which the signs of weights would mispredict half the time.
        ups[up] = w
        downs[down] = -w
        up += int(w >= 0)
        down += int(w < 0)
    return up, down, amax, total


@jit
def _new_side(levels, middles, size, steps):  # type: ignore[no-untyped-def]
    buckets = max(16, size // 2)
    return Side(
        levels,
        middles,
        np.empty(buckets + 2, np.int64),
        np.empty(buckets + 1),
        np.empty(buckets + 1),
        np.empty(size),
        np.empty(steps, np.int64),
        np.empty(steps, np.int64),
    )


@jit
def exact_scales(x, up_levels, up_middles, down_levels, down_middles, scales):  # type: ignore[no-untyped-def]
    """Write the scale of least squared error of each group, 0 where none beats all zeros.

    ``up_levels`` are what entries above zero can become, ascending from the level nearest to zero;
    ``up_middles[j]`` lies between levels j and j + 1. ``down_levels`` likewise for magnitudes of
    entries below zero.
    """
    size = x.shape[1]
    steps = max(up_middles.shape[0], down_middles.shape[0], 1)
    up = _new_side(up_levels, up_middles, size, steps)
    down = _new_side(down_levels, down_middles, size, steps)
    ups = np.empty(size + 1)
    downs = np.empty(size + 1)
    room = size * steps
    breaks = Breaks(np.empty(room), np.empty(room), np.empty(room))
    ends = np.empty((4096, 4))
    for g in range(x.shape[0]):
        above, below, amax, total = _part(x[g], ups, downs)
        scales[g] = 0
        if amax == 0:
            continue
        inverse = _fill(ups[:above], amax, up)
        _fill(downs[:below], amax, down)
        scales[g] = _best_scale(up, down, inverse, amax, total, above, below, breaks, ends)
