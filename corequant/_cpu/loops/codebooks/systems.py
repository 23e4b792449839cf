"""Normal equations of each row's levels, given which weights have which."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["level_systems"]


@jit
def level_systems(first, last, H, targets, labels, matrices, rights):  # type: ignore[no-untyped-def]
    """Write ``AᵀHA`` and ``Aᵀt`` of rows ``first..last-1``, A (d, K) being 1 where labels say so.

    ``H`` (d, d), ``targets`` (rows, d), ``labels`` (rows, d), ``matrices`` (rows, K, K) and
    ``rights`` (rows, K) start at zero.
    """
    d = H.shape[0]
    size = matrices.shape[1]
    gathered = np.empty((size, d), H.dtype)
    for r in range(first, last):
        gathered[:, :] = 0
        for j in range(d):
            own = gathered[labels[r, j]]
            row = H[j]
            for i in range(d):
                own[i] += row[i]
            rights[r, labels[r, j]] += targets[r, j]
        for a in range(size):
            for i in range(d):
                matrices[r, a, labels[r, i]] += gathered[a, i]
