"""Balanced partition of channels by a matrix that says how much two of them cost in one block.

``load[j, c]`` is the sum of ``C[k, c]`` over the members k of block j.
"""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["exchange", "spread"]


@jit
def spread(C, order, blocks):  # type: ignore[no-untyped-def]
    """Put channels, in the given order, into the open block that they cost the least in."""
    d = C.shape[0]
    room = d // blocks
    load = np.zeros((blocks, d), np.float32)
    count = np.zeros(blocks, np.int64)
    block_of = np.empty(d, np.int64)
    for c in order:
        best = -1
        for j in range(blocks):
            if count[j] < room and (best < 0 or load[j, c] < load[best, c]):
                best = j
        block_of[c] = best
        count[best] += 1
        for k in range(d):
            load[best, k] += C[c, k]
    return block_of, load


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
