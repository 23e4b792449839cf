"""Projections onto the ℓ1 ball and the proximal map of the largest magnitude that they give."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["clip_rows", "soft_threshold"]


@jit
def soft_threshold(magnitudes, radius):  # type: ignore[no-untyped-def]
    """Return θ with ``Σ max(m - θ, 0) = radius``, or 0 where the sum is within the radius.

    Michelot's method: drop what is below the mean excess until nothing is.
    """
    threshold = -1.0
    count = -1
    while True:
        total = 0.0
        kept = 0
        for m in magnitudes:
            if m > threshold:
                total += m
                kept += 1
        if kept == 0 or kept == count:
            return max(threshold, 0.0)
        count = kept
        threshold = (total - radius) / kept


@jit
def clip_rows(first, last, x, radius, limits, out):  # type: ignore[no-untyped-def]
    """Minimize ``½‖v - x‖² + radius · max|v|`` for rows ``first..last-1``: x clipped to ±limit.

    What is clipped off is the projection of x onto the ℓ1 ball, by Moreau's identity.
    """
    magnitudes = np.empty(x.shape[1])
    for r in range(first, last):
        total = 0.0
        for i in range(x.shape[1]):
            magnitudes[i] = abs(x[r, i])
            total += magnitudes[i]
        limit = 0.0
        if total > radius:
            limit = soft_threshold(magnitudes, radius)
        limits[r] = limit
        for i in range(x.shape[1]):
            out[r, i] = min(max(x[r, i], -limits[r]), limits[r])
