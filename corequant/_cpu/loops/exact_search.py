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

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["exact_scales"]

COARSE, MIDDLE, FINE = 1.4, 1.05, 1.004
"""Ratios of an interval's ends: well above the scale that covers the range, below it, and where
splitting stops and sweeping begins. These were the fastest of those tried."""

PARTS = 3
FEW, MANY = 96, 128
"""Uncertain entries that are swept at once instead of splitting their interval; breakpoints from
which on a general sort is faster."""


@jit
def _fill(magnitudes, amax, buckets, counts, sums, squares, order):  # type: ignore[no-untyped-def]
    """Write running sums before each bucket, and the entries sorted by bucket."""
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
    """Sort by falling place; insertion is faster than any other sort for a few dozen."""
    for k in range(1, n):
        place = places[k]
        product = products[k]
        square = squares[k]
        i = k - 1
        while i >= 0 and places[i] < place:
            places[i + 1] = places[i]
            products[i + 1] = products[i]
            squares[i + 1] = squares[i]
            i -= 1
        places[i + 1] = place
        products[i + 1] = product
        squares[i + 1] = square


@jit
def _side(levels, middles, small, big, inverse, buckets, counts, sums, squares, low, high):  # type: ignore[no-untyped-def]
    """Sum over the entries of one sign, for the scales [small, big].

    Returns Σlw, Σl² and Σw² of the entries whose level is certain, the least error of the others,
    Σlw and Σl² of the others with their lower levels, and how many they are. ``low[j]`` and
    ``high[j]`` become the buckets around threshold j.
    """
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
def _walk(levels, middles, big, small, counts, order, low, high, places, products, squares, n):  # type: ignore[no-untyped-def]
    """Exact Σlw and Σl² of the uncertain entries at the scale ``big``, and their breakpoints."""
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
def exact_scales(x, up_levels, up_middles, down_levels, down_middles, scales):  # type: ignore[no-untyped-def]
    """Write the scale of least squared error of each group, 0 where none beats all zeros.

    ``up_levels`` are what entries above zero can become, ascending from the level nearest to zero;
    ``up_middles[j]`` lies between levels j and j + 1. ``down_levels`` likewise for magnitudes of
    entries below zero.
    """
    size = x.shape[1]
    buckets = max(16, size // 2)
    ups = np.empty(size + 1)
    downs = np.empty(size + 1)
    counts = np.empty((2, buckets + 2), np.int64)
    sums = np.empty((2, buckets + 1))
    energies = np.empty((2, buckets + 1))
    order = np.empty((2, size))
    steps = max(up_middles.shape[0], down_middles.shape[0])
    low = np.empty((2, max(steps, 1)), np.int64)
    high = np.empty((2, max(steps, 1)), np.int64)
    room = size * max(steps, 1)
    places = np.empty(room)
    products = np.empty(room)
    squares = np.empty(room)
    ends = np.empty((4096, 4))
    for g in range(x.shape[0]):
        up = 0
        down = 0
        amax = 0.0
        total = 0.0
        for value in x[g]:
            w = np.float64(value)
            total += w * w
            amax = max(amax, abs(w))
            # Without a branch, which the signs of weights would mispredict half the time.
            ups[up] = w
            downs[down] = -w
            up += int(w >= 0)
            down += int(w < 0)
        scales[g] = 0
        if amax == 0:
            continue
        inverse = _fill(ups[:up], amax, buckets, counts[0], sums[0], energies[0], order[0])
        _fill(downs[:down], amax, buckets, counts[1], sums[1], energies[1], order[1])
        # All entries at the level nearest to zero: no breakpoint lies above this scale.
        first_middle = np.inf
        if up_middles.shape[0]:
            first_middle = up_middles[0]
        if down_middles.shape[0]:
            first_middle = min(first_middle, down_middles[0])
        product = up_levels[0] * sums[0, buckets] + down_levels[0] * sums[1, buckets]
        square = up_levels[0] ** 2 * up + down_levels[0] ** 2 * down
        gain = 0.0
        if product > 0 and square > 0:
            gain = product * product / square
            scales[g] = product / square
        if first_middle == np.inf:
            continue
        big = amax / first_middle * (1 + 1e-12)
        top = max(up_levels[-1], down_levels[-1])
        cover = amax / top
        # What rounding may make of equal errors.
        slack = total * 1e-12
        bound = total - gain
        stack = 0
        # Coarse intervals from the top down, until clipping alone costs more than the best.
        while stack < 2000:
            small = big / (COARSE if big > 1.1 * cover else MIDDLE)
            a = _side(
                up_levels, up_middles, small, big, inverse, buckets,
                counts[0], sums[0], energies[0], low[0], high[0],
            )  # fmt: skip
            b = _side(
                down_levels, down_middles, small, big, inverse, buckets,
                counts[1], sums[1], energies[1], low[1], high[1],
            )  # fmt: skip
            floor, ceiling = _bounds(a, b, small, big, total)
            bound = min(bound, ceiling)
            ends[stack, 0] = small
            ends[stack, 1] = big
            ends[stack, 2] = floor
            ends[stack, 3] = a[6] + b[6]
            stack += 1
            big = small
            clipped = 0.0
            for side in range(2):
                reach = (up_levels[-1] if side == 0 else down_levels[-1]) * big
                if reach < amax:
                    edge = min(int(reach * inverse) + 1, buckets)
                    count = counts[side, buckets] - counts[side, edge]
                    part = sums[side, buckets] - sums[side, edge]
                    clipped += (
                        energies[side, buckets]
                        - energies[side, edge]
                        - 2 * reach * part
                        + reach * reach * count
                    )
            if clipped > bound + slack or big < cover * 1e-9:
                break
        # Split what may still hold the best scale.
        while stack > 0:
            stack -= 1
            small = ends[stack, 0]
            big = ends[stack, 1]
            if ends[stack, 2] > bound + slack:
                continue
            if big > small * FINE and ends[stack, 3] > FEW and stack < 4000:
                ratio = (big / small) ** (1 / PARTS)
                edge = big
                for part in range(PARTS):
                    inner = small if part == PARTS - 1 else edge / ratio
                    a = _side(
                        up_levels, up_middles, inner, edge, inverse, buckets,
                        counts[0], sums[0], energies[0], low[0], high[0],
                    )  # fmt: skip
                    b = _side(
                        down_levels, down_middles, inner, edge, inverse, buckets,
                        counts[1], sums[1], energies[1], low[1], high[1],
                    )  # fmt: skip
                    floor, ceiling = _bounds(a, b, inner, edge, total)
                    bound = min(bound, ceiling)
                    if floor <= bound + slack:
                        ends[stack, 0] = inner
                        ends[stack, 1] = edge
                        ends[stack, 2] = floor
                        ends[stack, 3] = a[6] + b[6]
                        stack += 1
                    edge = inner
                continue
            a = _side(
                up_levels, up_middles, small, big, inverse, buckets,
                counts[0], sums[0], energies[0], low[0], high[0],
            )  # fmt: skip
            b = _side(
                down_levels, down_middles, small, big, inverse, buckets,
                counts[1], sums[1], energies[1], low[1], high[1],
            )  # fmt: skip
            product = a[0] + b[0]
            square = a[1] + b[1]
            p, q, n = _walk(
                up_levels, up_middles, big, small, counts[0], order[0], low[0], high[0],
                places, products, squares, 0,
            )  # fmt: skip
            product += p
            square += q
            p, q, n = _walk(
                down_levels, down_middles, big, small, counts[1], order[1], low[1], high[1],
                places, products, squares, n,
            )  # fmt: skip
            product += p
            square += q
            if n <= MANY:
                _sort(places, products, squares, n)
            else:
                ranks = np.argsort(-places[:n])
                products[:n] = products[ranks]
                squares[:n] = squares[ranks]
            for k in range(n + 1):
                if k > 0:
                    product += products[k - 1]
                    square += squares[k - 1]
                if product > 0 and square > 0 and product * product > gain * square:
                    gain = product * product / square
                    scales[g] = product / square
            bound = min(bound, total - gain)


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
