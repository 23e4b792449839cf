"""Local searches of permutations and signs.

*Partition* of channels into blocks by a matrix C that says how much two of them cost in one block:
``load[j, c]`` is the sum of ``C[k, c]`` over the members k of block j.

*Range*: what a rotated token's quantizer has to cover. ``y`` (tokens, blocks, b) is rotated,
``high`` and ``low`` (tokens, blocks) its extremes. A token costs its squared range: max - min over
all blocks, or twice the largest magnitude where the quantizer is symmetric. ``h`` (b, b) is the
rotation of a block.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["exchange", "extremes", "search_exchanges", "search_flips", "spread"]


@jit
def spread(C, order, count, block_of, load):  # type: ignore[no-untyped-def]
    """Put channels, in the given order, into the open block that they cost the least in.

    ``count`` (blocks,) and ``load`` (blocks, d), the sums of a block's rows of C, start at zero.
    """
    d = C.shape[0]
    blocks = load.shape[0]
    room = d // blocks
    for c in order:
        best = -1
        for j in range(blocks):
            if count[j] < room and (best < 0 or load[j, c] < load[best, c]):
                best = j
        block_of[c] = best
        count[best] += 1
        for k in range(d):
            load[best, k] += C[c, k]


@jit
def exchange(C, order, block_of, load):  # type: ignore[no-untyped-def]
    """Exchange each channel with the one that lowers the objective most; return how many."""
    d = C.shape[0]
    own = np.empty(d, np.float32)
    for k in range(d):
        own[k] = load[block_of[k], k]
    done = 0
    for i in order:
        a = block_of[i]
        best = np.float32(0)
        partner = -1
        for k in range(d):
            b = block_of[k]
            if b != a:
                # Half the change of the objective when i and k change places.
                change = (
                    load[a, k] - own[i] + load[b, i] - own[k]
                    + C[i, i] + C[k, k] - np.float32(2) * C[i, k]
                )  # fmt: skip
                if change < best:
                    best = change
                    partner = k
        # Rounding of the running sums must not be mistaken for a gain.
        if partner >= 0 and best < np.float32(-1e-6) * own[i]:
            b = block_of[partner]
            for k in range(d):
                moved = C[partner, k] - C[i, k]
                load[a, k] += moved
                load[b, k] -= moved
            block_of[i] = b
            block_of[partner] = a
            for k in range(d):
                own[k] = load[block_of[k], k]
            done += 1
    return done


@jit
def _cost(high, low, symmetric):  # type: ignore[no-untyped-def]
    if symmetric:
        top = max(high, -low)
        return np.float64(4) * top * top
    span = np.float64(high) - low
    return span * span


@jit
def extremes(y, high, low):  # type: ignore[no-untyped-def]
    """Fill the extremes of every block."""
    for t in range(y.shape[0]):
        for j in range(y.shape[1]):
            top = y[t, j, 0]
            bottom = top
            for value in y[t, j]:
                top = max(top, value)
                bottom = min(bottom, value)
            high[t, j] = top
            low[t, j] = bottom


@jit
def _others(high, low, t, first, second):  # type: ignore[no-untyped-def]
    top = np.float32(-np.inf)
    bottom = np.float32(np.inf)
    for j in range(high.shape[1]):
        if j not in (first, second):
            top = max(top, high[t, j])
            bottom = min(bottom, low[t, j])
    return top, bottom


@jit
def _shifted(y, t, block, step, row):  # type: ignore[no-untyped-def]
    """Extremes of a block to which ``step · row`` is added."""
    top = y[t, block, 0] + step * row[0]
    bottom = top
    for c in range(1, row.shape[0]):
        value = y[t, block, c] + step * row[c]
        top = max(top, value)
        bottom = min(bottom, value)
    return top, bottom


@jit
def search_exchanges(x, y, high, low, cost, h, draws, symmetric, position):  # type: ignore[no-untyped-def]
    """Try exchanges of two channels of different blocks; keep those that lower the total cost.

    ``x`` (tokens, d) and ``position`` (d,) are in the current order and follow it. ``draws``
    (proposals, 4) are random integers: a token, whose widest block gives a channel, the channel's
    slot, another block and a slot there. Returns the number of exchanges kept.
    """
    tokens, blocks, b = y.shape
    kept = 0
    new = np.empty((tokens, 4), np.float32)
    trial = np.empty(tokens, np.float64)
    for n in range(draws.shape[0]):
        t = draws[n, 0] % tokens
        first = 0
        for j in range(blocks):
            if max(high[t, j], -low[t, j]) > max(high[t, first], -low[t, first]):
                first = j
        second = (first + 1 + draws[n, 2] % (blocks - 1)) % blocks
        slot = draws[n, 1] % b
        other = draws[n, 3] % b
        i = first * b + slot
        k = second * b + other
        gain = np.float64(0)
        for t in range(tokens):
            step = x[t, k] - x[t, i]
            new[t, 0], new[t, 1] = _shifted(y, t, first, step, h[slot])
            new[t, 2], new[t, 3] = _shifted(y, t, second, -step, h[other])
            top, bottom = _others(high, low, t, first, second)
            top = max(top, max(new[t, 0], new[t, 2]))
            bottom = min(bottom, min(new[t, 1], new[t, 3]))
            trial[t] = _cost(top, bottom, symmetric)
            gain += cost[t] - trial[t]
        if gain > 0:
            kept += 1
            for t in range(tokens):
                step = x[t, k] - x[t, i]
                for c in range(b):
                    y[t, first, c] += step * h[slot, c]
                    y[t, second, c] -= step * h[other, c]
                high[t, first], low[t, first] = new[t, 0], new[t, 1]
                high[t, second], low[t, second] = new[t, 2], new[t, 3]
                x[t, i], x[t, k] = x[t, k], x[t, i]
                cost[t] = trial[t]
            position[i], position[k] = position[k], position[i]
    return kept


@jit
def search_flips(x, y, high, low, cost, h, symmetric, signs):  # type: ignore[no-untyped-def]
    """Flip the sign of each channel in turn where that lowers the total cost; return how many.

    ``x`` (tokens, d) carries the signs already; it and ``signs`` (d,) follow the flips.
    """
    tokens, _, b = y.shape
    kept = 0
    new = np.empty((tokens, 2), np.float32)
    trial = np.empty(tokens, np.float64)
    for i in range(x.shape[1]):
        block = i // b
        row = h[i % b]
        gain = np.float64(0)
        for t in range(tokens):
            step = np.float32(-2) * x[t, i]
            new[t, 0], new[t, 1] = _shifted(y, t, block, step, row)
            top, bottom = _others(high, low, t, block, block)
            top = max(top, new[t, 0])
            bottom = min(bottom, new[t, 1])
            trial[t] = _cost(top, bottom, symmetric)
            gain += cost[t] - trial[t]
        if gain > 0:
            kept += 1
            for t in range(tokens):
                step = np.float32(-2) * x[t, i]
                for c in range(b):
                    y[t, block, c] += step * row[c]
                high[t, block], low[t, block] = new[t, 0], new[t, 1]
                x[t, i] = -x[t, i]
                cost[t] = trial[t]
            signs[i] = -signs[i]
    return kept
