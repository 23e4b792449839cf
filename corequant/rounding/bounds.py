"""The bounds of an accumulator, before any column is rounded.

Bit-exact twin: `corequant_torch.rounding.bounds`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.columns import Limits, shrink_thresholds
from corequant._cpu.threads import for_rows
from corequant.exact import integer_unit
from corequant.formats import FormatKind
from corequant.rounding.accumulators import AccumulatorSpec, check_tile
from corequant.rounding.loop import Budget, Scales

__all__ = ["budget_for"]

Array = npt.NDArray[Any]


def budget_for(
    accumulator: AccumulatorSpec, W: Array, scales: Scales, dtype: np.dtype[Any]
) -> Budget:
    """Return fresh bounds for W, whose columns are in their own order."""
    rows, d = W.shape
    tile = min(accumulator.tile or d, max(1, d))
    check_tile(accumulator, tile, scales.spec)
    low, high = accumulator.range
    form = scales.spec.format
    unit = 1.0 if form.kind is FormatKind.INTEGER else integer_unit(form)
    limits = Limits(float(accumulator.limit), float(low), float(high), unit, accumulator.diffuse)
    count = -(-d // tile)
    shrink = np.zeros((rows, count))
    radius = 2.0 * accumulator.limit / (high - low)
    steps, _ = scales.steps(rows, dtype)
    most = max(-form.minimum, form.maximum) / integer_unit(form)
    for t in range(count):
        columns = slice(t * tile, min((t + 1) * tile, d))
        step = steps[:, t * tile // scales.group, None]
        weights = W[:, columns].astype(np.float64) / (step.astype(np.float64) * unit)
        if scales.spec.symmetric:
            weights = np.clip(weights, -most, most)
        part = np.empty(rows)

        def work(first: int, last: int, w: Array = weights, out: Array = part) -> None:
            shrink_thresholds(first, last, w, radius, out)

        for_rows(rows, 8 * weights.shape[1], work)
        shrink[:, t] = part * unit
    sums = np.zeros((2, rows, count))
    return Budget(limits, tile, shrink.astype(dtype), sums[0], sums[1], accumulator)
