"""Codes of all scales of an interval, one change of a level after the other.

Where the scale falls past ``|w| / (l - ½)`` an entry's level rises to l. ΣQw then grows by |w| and
ΣQ² by 2l - 1, so that the gain of the next set of codes takes two additions.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit, jit_reordered

__all__ = ["CHUNK", "exact_sums", "level_of", "room_for_sweeps", "sweep"]

CHUNK = 64
"""Entries that are added in float32, in any order; sums of these are in float64."""


@jit_reordered
def level_of(value, least, most):  # type: ignore[no-untyped-def]
    """Return the nearest level; without a branch."""
    level = np.rint(value)
    level = least if level < least else level
    return most if level > most else level


@jit_reordered
def exact_sums(row, inverse, finer, least, most):  # type: ignore[no-untyped-def]
    """Return ΣQw and ΣQ² at the scale 1 / finer of entries in units of the largest."""
    product = 0.0
    square = 0.0
    low = np.float64(least)
    high = np.float64(most)
    for k in range(row.shape[0]):
        w = np.float64(row[k]) * inverse
        q = level_of(w * finer, low, high)
        product += q * w
        square += q * q
    return product, square


@jit_reordered
def _flag(x, above, below, least, most, flags):  # type: ignore[no-untyped-def]
    """Mark the entries that have another level at one inverse scale than at the other.

    Returns how many levels lie between in all.
    """
    number = 0.0
    for chunk in range(x.shape[0] // CHUNK):
        part = np.float32(0)
        for k in range(chunk * CHUNK, (chunk + 1) * CHUNK):
            changes = abs(level_of(x[k] * above, least, most) - level_of(x[k] * below, least, most))
            flags[k] = np.uint8(changes > 0)
            part += changes
        number += np.float64(part)
    return int(number)


@jit
def _find(flags, eights, places):  # type: ignore[no-untyped-def]
    """Write where flags are set, without a branch for each; returns how many are."""
    words = flags.view(np.int64)
    number = 0
    for k in range(words.shape[0]):
        eights[number] = k
        number += words[k] != 0
    found = 0
    for i in range(number):
        for k in range(8 * eights[i], 8 * eights[i] + 8):
            places[found] = k
            found += flags[k]
    return found


@jit
def _collect(row, inverse, small, big, least, most, places, breaks):  # type: ignore[no-untyped-def]
    """Write where levels change, and the changes of ΣQw and ΣQ²; returns how many there are."""
    finer = 1 / big
    n = 0
    for i in range(places.shape[0]):
        w = np.float64(row[places[i]]) * inverse
        level = abs(np.rint(w * finer))
        top = np.float64(most) if w > 0 else -np.float64(least)
        w = abs(w)
        level = min(level, top)
        while level < top and w > (level + 0.5) * small:
            breaks[n, 0] = min(w / (level + 0.5), big)
            breaks[n, 1] = w
            breaks[n, 2] = 2 * level + 1
            level += 1
            n += 1
    return n


@jit
def _sort(breaks, n, small, big, ordered, starts):  # type: ignore[no-untyped-def]
    """Write the first n rows by falling scale: into as many buckets, and then by insertion."""
    starts[: n + 1] = 0
    factor = n / (big - small) * (1 - 1e-12)
    for k in range(n):
        starts[int(max((big - breaks[k, 0]) * factor, 0.0)) + 1] += 1
    for b in range(n):
        starts[b + 1] += starts[b]
    for k in range(n):
        b = int(max((big - breaks[k, 0]) * factor, 0.0))
        at = starts[b]
        starts[b] += 1
        for i in range(3):
            ordered[at, i] = breaks[k, i]
    for k in range(1, n):
        place, product, square = ordered[k, 0], ordered[k, 1], ordered[k, 2]
        i = k - 1
        while i >= 0 and ordered[i, 0] < place:
            for j in range(3):
                ordered[i + 1, j] = ordered[i, j]
            i -= 1
        ordered[i + 1, 0], ordered[i + 1, 1], ordered[i + 1, 2] = place, product, square


@jit
def room_for_sweeps(entries):  # type: ignore[no-untyped-def]
    """Return what a sweep works in; it finds more room where levels change more than once."""
    return (
        np.zeros(entries, np.uint8),
        np.empty(entries // 8 + 1, np.int64),
        np.empty(entries + 1, np.int64),
        np.empty((entries, 3)),
        np.empty((entries, 3)),
        np.empty(entries + 1, np.int64),
    )


@jit
def sweep(row, x, inverse, small, big, least, most, room, best):  # type: ignore[no-untyped-def]
    """Take into ``best`` (gain, scale) all sets of codes from the scale ``big`` to ``small``."""
    flags, eights, places, breaks, ordered, starts = room
    # Entries that surely keep their level are told apart in float32.
    above = np.float32(1 / (small * (1 - 1e-6)))
    below = np.float32(1 / (big * (1 + 1e-6)))
    most_changes = _flag(x, above, below, least, most, flags)
    if most_changes > breaks.shape[0]:
        breaks = np.empty((most_changes, 3))
        ordered = np.empty((most_changes, 3))
        starts = np.empty(most_changes + 1, np.int64)
    product, square = exact_sums(row, inverse, 1 / big, least, most)
    found = _find(flags, eights, places)
    n = _collect(row, inverse, small, big, least, most, places[:found], breaks)
    _sort(breaks, n, small, big, ordered, starts)
    for k in range(n + 1):
        if k > 0:
            product += ordered[k - 1, 1]
            square += ordered[k - 1, 2]
        if product > 0 and square > 0 and product * product > best[0] * square:
            best[0] = product * product / square
            best[1] = product / square
