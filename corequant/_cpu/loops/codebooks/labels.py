"""Rounding to the nearest of an entry's own levels."""

from __future__ import annotations

from corequant._cpu.loops.codebook_grid import nearest_code
from corequant._cpu.loops.jit import jit

__all__ = ["label_entries"]


@jit
def label_entries(first, last, values, middles, counts, labels):  # type: ignore[no-untyped-def]
    """Write the index of the level nearest to each value of entries ``first..last-1``.

    ``middles`` (entries, K-1) holds, in its first ``counts[e]`` numbers, the smallest float that
    takes the next level; ``values`` and ``labels`` are (entries, length).
    """
    for e in range(first, last):
        own = middles[e, : counts[e]]
        for i in range(values.shape[1]):
            labels[e, i] = nearest_code(values[e, i], own)
