"""Levels of least weighted squared error, exactly, for every number of levels up to a limit.

The values of a row ascend, so a level's values are neighbours. With G_k(m) the largest energy that
k levels can explain of the first m values,

    G_k(m) = max over j < m of G_{k-1}(j) + (Σ_{j≤i<m} w_i x_i)² / Σ_{j≤i<m} w_i .

The place j of the maximum never falls as m or k grows, so G_k is found from the middle outwards
between places that are known already, in O(m log m) steps for each k.

Source: Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D",
arXiv 1701.07204.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["optimal_levels"]


@jit
def _gather(values, weights, distinct, points, masses, sums):  # type: ignore[no-untyped-def]
    """Merge equal values and drop those without weight; return how many are left, and the mean.

    ``distinct[i]`` becomes the i-th value, ``points[i]`` its distance from the mean; ``masses`` and
    ``sums`` run up to each point.
    """
    n = values.shape[0]
    weighted = weights.shape[0] > 0
    total = 0.0
    moment = 0.0
    for i in range(n):
        w = np.float64(weights[i]) if weighted else 1.0
        total += w
        moment += w * np.float64(values[i])
    if total > 0:
        mean = moment / total
    else:
        weighted = False
        mean = 0.0
        for i in range(n):
            mean += np.float64(values[i])
        mean /= n
    count = 0
    latest = values[0]
    masses[0] = 0.0
    sums[0] = 0.0
    for i in range(n):
        w = np.float64(weights[i]) if weighted else 1.0
        if w > 0:
            x = np.float64(values[i]) - mean
            if count == 0 or values[i] != latest:
                latest = values[i]
                distinct[count] = latest
                points[count] = x
                masses[count + 1] = masses[count]
                sums[count + 1] = sums[count]
                count += 1
            masses[count] += w
            sums[count] += w * x
    return count, mean


@jit
def _best(m, low, high, gains, masses, sums):  # type: ignore[no-untyped-def]
    """Return the place in ``low..high`` where the last level of m values begins, and the gain."""
    gain = -1.0
    place = low
    mass = masses[m]
    total = sums[m]
    for j in range(low, high + 1):
        part = total - sums[j]
        found = gains[j] + part * part / (mass - masses[j])
        if found > gain:
            gain = found
            place = j
    return place, gain


@jit
def _advance(k, count, only_last, gains, masses, sums, before, places, out):  # type: ignore[no-untyped-def]
    """Go from k - 1 levels to k: ``places[m]`` and ``out[m]`` for the first m values, m ≥ k."""
    if only_last:
        place, gain = _best(count, before[count], count - 1, gains, masses, sums)
        places[count] = place
        out[count] = gain
        return
    # Places beyond the ends are known: k values need k levels.
    step = 1
    while step <= count:
        step *= 2
    while step > 1:
        half = step // 2
        for m in range(half, count + 1, step):
            if m < k:
                continue
            low = max(k - 1, before[m])
            if m - half >= k:
                low = max(low, places[m - half])
            high = m - 1
            if m + half <= count:
                high = min(high, places[m + half])
            place, gain = _best(m, low, max(low, high), gains, masses, sums)
            places[m] = place
            out[m] = gain
        step = half


@jit
def _write(count, size, mean, distinct, points, masses, sums, places, levels):  # type: ignore[no-untyped-def]
    """Write the levels of a size, ascending; return their loss."""
    stop = count
    loss = 0.0
    for k in range(size - 1, -1, -1):
        start = places[k, stop] if k > 0 else 0
        level = (sums[stop] - sums[start]) / (masses[stop] - masses[start])
        for i in range(start, stop):
            error = points[i] - level
            loss += (masses[i + 1] - masses[i]) * error * error
        levels[k] = distinct[start] if stop - start == 1 else mean + level
        stop = start
    return loss


@jit
def optimal_levels(values, weights, sizes, starts, levels, losses):  # type: ignore[no-untyped-def]
    """Write the best levels of each of some sizes, and their losses, for each row.

    Values of a row ascend; ``weights`` are theirs, or of no columns. ``sizes`` ascend; levels of
    ``sizes[s]`` go to ``levels[r, starts[s]:]``, the last one repeated where there are fewer
    distinct values.
    """
    n = values.shape[1]
    most = sizes[sizes.shape[0] - 1]
    distinct = np.empty(n)
    points = np.empty(n)
    masses = np.empty(n + 1)
    sums = np.empty(n + 1)
    gains = np.empty((2, n + 1))
    places = np.zeros((most, n + 1), np.int32)
    for r in range(values.shape[0]):
        count, mean = _gather(values[r], weights[r], distinct, points, masses, sums)
        top = min(most, count)
        places[0, :] = 0
        gains[0, 0] = 0.0
        for m in range(1, count + 1):
            gains[0, m] = sums[m] * sums[m] / masses[m]
        for k in range(2, top + 1):
            now = (k - 1) % 2
            _advance(
                k,
                count,
                k == most,
                gains[1 - now],
                masses,
                sums,
                places[k - 2],
                places[k - 1],
                gains[now],
            )
        for s in range(sizes.shape[0]):
            size = sizes[s]
            fewer = min(size, count)
            own = levels[r, starts[s] : starts[s] + size]
            loss = _write(count, fewer, mean, distinct, points, masses, sums, places, own)
            for k in range(fewer, size):
                own[k] = own[fewer - 1]
            losses[r, s] = 0.0 if count <= size else loss
