"""The smallest entries of groups, in order: what percentiles near an end are made of."""

from __future__ import annotations

from corequant._cpu.loops.jit import jit

__all__ = ["smallest"]


@jit
def smallest(x, kept):  # type: ignore[no-untyped-def]
    """Write the smallest entries of each group, ascending, to ``kept``, which holds infinity.

    There are as many as it has columns. Most entries are compared with the last of them only.
    """
    last = kept.shape[1] - 1
    for g in range(x.shape[0]):
        bound = kept[g, last]
        for i in range(x.shape[1]):
            value = x[g, i]
            if value < bound:
                k = last
                while k > 0 and kept[g, k - 1] > value:
                    kept[g, k] = kept[g, k - 1]
                    k -= 1
                kept[g, k] = value
                bound = kept[g, last]
