"""One pass over activations for the sums that everything else is built on."""

from __future__ import annotations

import numpy as np

from corequant._cpu.loops.jit import jit

__all__ = ["channel_moments"]


@jit
def channel_moments(x, sum_abs, sum_square, largest):  # type: ignore[no-untyped-def]
    """Add |x| and x² of each channel of ``x`` (tokens, d) to the sums, float64 (d,)."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            a = np.float64(abs(x[t, i]))
            sum_abs[i] += a
            sum_square[i] += a * a
            largest[i] = max(largest[i], a)
