"""Scales and zero points of panels of groups: ranges, rules and searches.

Bit-exact twin: `corequant_torch.device.scales`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.grids import grid_for, levels_of, rounder_for, rule_for, unsigned
from corequant._cpu.loops import (
    exact_search,
    exact_uniform,
    gain_table,
    hqo,
    integer_grid,
    lanes,
    minifloat_grid,
)
from corequant._cpu.loops import scales as rules
from corequant.formats import FormatKind, NumberFormat, formats
from corequant.specs import POWERS_OF_TWO, QuantSpec, ScaleFormat, ScaleSearch

__all__ = [
    "SQUARED",
    "choose",
    "effective",
    "global_scale_for",
    "magnitude_mask",
    "percentile",
    "ranges",
]

Array = npt.NDArray[Any]

SHRINKS = np.linspace(0.2, 1.0, 100)
"""Fractions of the full range that the grid search tries; 0.2 suffices for INT2 on heavy tails."""

SWEEP = np.array([0, *(s * k for k in range(1, 9) for s in (-1, 1))], np.int64)
"""Neighbours of an E4M3 code to try: an octave each way. Twice the scale that covers the range
loses to it, since its numbers in the range are among the other's; half the scale halves the
largest magnitude."""

SQUARED = 400
"""Exponents of float64 up to which sums of squares neither overflow nor vanish."""

_FEW = 32
"""Number of entries beyond a percentile up to which a group isn't sorted to find it."""

FOUR_OVER_SIX_TOP = 256.0
"""The largest block scale that maps to 6, so that 1.5 times as much, for 4, is still in E4M3."""


def ranges(panel: Array, symmetric: bool, skip: bool) -> tuple[Array, Array]:
    """Return the smallest and the largest entry of each group, zero included.

    Where ``symmetric``, only the larger of the magnitudes is right: it is returned as ``high``.
    NaN counts as larger than infinity; where ``skip``, neither counts.
    """
    low, high = np.zeros(len(panel), panel.dtype), np.zeros(len(panel), panel.dtype)
    if skip:
        panel = np.where(np.isfinite(panel), panel, panel.dtype.type(0))
    mask = magnitude_mask(panel.dtype)
    if symmetric and panel.dtype == np.float32 and panel.shape[1] in (lanes.HALF, lanes.LANES):
        integer_grid.all_magnitudes(panel, high)
    elif symmetric:
        integer_grid.magnitudes(panel, mask, high)
    else:
        integer_grid.ranges(panel, mask, low, high)
    return low, high


@lru_cache
def magnitude_mask(dtype: np.dtype[Any]) -> Any:
    """Return all bits but the sign."""
    u = unsigned(dtype).type
    return u(np.iinfo(u).max >> 1)


def global_scale_for(largest: float, spec: QuantSpec) -> Array:
    """Return the divisor G, float32 (1,), with which the largest scale is the top of E4M3.

    ``w = element * (scale / G)``: what compressed-tensors stores as ``weight_global_scale``.
    """
    top = formats["float8_e4m3fn"].maximum
    if spec.scale_search is ScaleSearch.FOUR_OVER_SIX:
        top = FOUR_OVER_SIX_TOP
    if largest == 0:
        return np.ones(1, np.float32)
    limit = float(np.finfo(np.float32).max) * (1 - 2.0**-20)
    # In float32 as elsewhere: the quotient of two float32 numbers, rounded once.
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        quotient = np.float32(top * spec.format.maximum) / np.float32(min(largest, limit))
    return np.clip(quotient, np.float32(2.0**-126), np.float32(2.0**127)).reshape(1)


def effective(scales: Array, global_scale: Array | None) -> Array:
    """Return what codes are multiplied by: the scales, divided by the tensor's where it has one."""
    if global_scale is None:
        return scales
    quotient: Array = scales / global_scale.astype(scales.dtype)
    return quotient


def choose(
    panel: Array,
    low: Array,
    high: Array,
    spec: QuantSpec,
    divisor: Array | None,
    scales: Array,
    zeros: Array,
    propagate: bool = False,
) -> None:
    """Write the scales and zero points of a panel's groups, whose ranges are given."""
    rule, search_kind = rule_for(spec, scales.dtype), spec.scale_search
    if not spec.format.signed and spec.symmetric and spec.format.minimum >= 0:
        low = np.zeros_like(low)
    factor = scales.dtype.type(1) if divisor is None else scales.dtype.type(divisor[0])
    if search_kind is ScaleSearch.PERCENTILE:
        low, high = _percentiles(panel, low, high, spec)
    rules.choose(low, high, rule, factor, scales, zeros)
    if search_kind in (ScaleSearch.ABSMAX, ScaleSearch.PERCENTILE):
        return
    if propagate:
        panel = np.where(np.isfinite(panel), panel, 0)
    if search_kind is ScaleSearch.HQO:
        hqo.half_quadratic(panel, rule, 2.0**-spec.format.fraction_bits, scales, zeros)
        return
    if search_kind is ScaleSearch.EXACT:
        magnitudes = np.maximum(np.abs(low), np.abs(high))
        found, covering = _exact(panel, magnitudes, spec.format), scales.copy()
        hqo.settle_all(found, rule, scales)
        # Where the best scale would be too large or too small, it may be worse than the first.
        cut = np.flatnonzero((found > 0) & (np.abs(scales - found) > found * 2.0**-20))
        if len(cut):
            trials = np.stack([scales[cut], covering[cut]], axis=1)
            losses = _losses(panel[cut], trials, np.zeros_like(trials), spec, low[cut], high[cut])
            scales[cut] = np.take_along_axis(trials, losses.argmin(1)[:, None], 1)[:, 0]
        return
    trials, offsets = _trials(low, high, spec, factor, scales, zeros)
    losses = _losses(panel, effective(trials, divisor), offsets, spec, low, high)
    best = np.argmin(losses, axis=1)
    each = np.arange(len(best))
    busy = (low != 0) | (high != 0)
    scales[busy], zeros[busy] = trials[each, best][busy], offsets[each, best][busy]


def _losses(
    panel: Array, steps: Array, offsets: Array, spec: QuantSpec, low: Array, high: Array
) -> Array:
    """Return the squared error of each group with each of its trials, up to a factor of its own."""
    if panel.dtype == np.float64:
        exponents = np.frexp(np.maximum(-low, high))[1]
        if np.abs(exponents).max(initial=0) > SQUARED:
            panel = np.ldexp(panel, -exponents[:, None])
            steps = np.ldexp(steps, -exponents[:, None])
    return grid_for(spec.format, panel.dtype).losses(panel, steps, offsets)


def _exact(panel: Array, magnitudes: Array, form: NumberFormat) -> Array:
    """Return the scale of least squared error of each group, float64."""
    found = np.empty(len(panel))
    exponents = None
    if panel.dtype == np.float64:
        magnitudes, exponents = np.frexp(magnitudes)
        panel = np.ldexp(panel, -exponents[:, None])
    if form.kind is not FormatKind.INTEGER:
        exact_search.exact_scales(panel, *levels_of(form), found)
        return found if exponents is None else np.ldexp(found, exponents)
    unit = 2.0**-form.fraction_bits
    least, most = (np.float32(v / unit) for v in form.finite_values[[0, -1]])
    room = gain_table.room_for(panel.shape[1])
    exact_uniform.exact_scales_uniform(panel, magnitudes, least, most, *room, found)
    found /= unit
    return found if exponents is None else np.ldexp(found, exponents)


def _trials(
    low: Array, high: Array, spec: QuantSpec, factor: Any, scales: Array, zeros: Array
) -> tuple[Array, Array]:
    """Return the scales and zero points to try, (groups, trials)."""
    dtype = scales.dtype
    if spec.scale_format in POWERS_OF_TWO:
        rule = rule_for(spec.replace(scale_rounding="floor"), dtype)
        first = np.empty_like(scales)
        rules.choose(low, high, rule, factor, first, zeros)
        assert rule.power is not None  # by the scale format
        exponents = np.frexp(first)[1][:, None] - 1 + np.array([0, -1, 1])
        exponents = np.clip(exponents, rule.power.lowest, rule.power.highest)
        trials = np.ldexp(dtype.type(1), exponents)
        return trials.astype(dtype), np.zeros(trials.shape, dtype)
    rule = rule_for(spec, dtype)
    if spec.scale_search is ScaleSearch.FOUR_OVER_SIX:
        four = np.empty_like(scales)
        rules.choose(low, high, rule, factor * dtype.type(1.5), four, zeros)
        trials = np.stack([scales, four], axis=1)
        return trials, np.zeros_like(trials)
    if spec.scale_format is ScaleFormat.E4M3:
        form = formats["float8_e4m3fn"]
        codes = np.empty((1, len(scales)), np.uint8)
        rounder = rounder_for(form, dtype)
        minifloat_grid.encode(scales[None], np.ones(1, dtype), rounder, codes)
        near = np.clip(codes[0].astype(np.int64)[:, None] + SWEEP, 1, form.magnitudes - 1)
        trials = form.values.astype(dtype)[near]
        return trials, np.zeros_like(trials)
    shrinks = SHRINKS.astype(dtype)
    trials = np.empty((len(low), len(shrinks)), dtype)
    offsets = np.empty_like(trials)
    rules.choose(
        (low[:, None] * shrinks).reshape(-1),
        (high[:, None] * shrinks).reshape(-1),
        rule,
        factor,
        trials.reshape(-1),
        offsets.reshape(-1),
    )
    return trials, offsets


def _percentiles(panel: Array, low: Array, high: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Return ranges that leave out the largest magnitudes; the full ones where nothing is left."""
    good = np.isfinite(panel)
    largest = np.maximum(-low, high)
    if good.all() and largest.max(initial=0) <= np.finfo(panel.dtype).max / 4:
        return _whole_percentiles(panel, low, high, spec)
    low, high = low.copy(), high.copy()
    # Entries that aren't finite have no part in it: what is left of their groups is shorter.
    for k in np.flatnonzero(good.any(1)):
        one = slice(k, k + 1)
        # Differences of neighbours stay finite in a quarter of the unit.
        unit = panel.dtype.type(0.25 if largest[k] > 1 else 1)
        rest = panel[one, good[k]] * unit
        ends = _whole_percentiles(rest, low[one] * unit, high[one] * unit, spec)
        low[one], high[one] = (end / unit for end in ends)
    return low, high


def _whole_percentiles(
    finite: Array, low: Array, high: Array, spec: QuantSpec
) -> tuple[Array, Array]:
    q = float(spec.percentile or 100)
    if spec.symmetric:
        most = percentile(np.abs(finite), q)
        return low * 0, np.where(most > 0, most, np.maximum(high, -low))
    least = np.minimum(percentile(finite, 100 - q), 0)
    most = np.maximum(percentile(finite, q), 0)
    nothing = (least == 0) & (most == 0)
    return np.where(nothing, low, least), np.where(nothing, high, most)


def percentile(finite: Array, q: float) -> Array:
    """Return what ``np.percentile`` does of each row, to the bit, in the rows' dtype."""
    last = finite.shape[1] - 1
    position = np.float64(q) / 100 * last
    below = int(np.floor(position))
    above, t = min(below + 1, last), position - below
    if above < _FEW:
        ordered = _smallest(finite, above + 1)
    elif last - below < _FEW:
        # The largest, in descending order.
        ordered = -_smallest(-finite, last - below + 1)
        below, above = last - below, last - above
    else:
        ordered = np.sort(finite, axis=1)
    a, b = ordered[:, below], ordered[:, above]
    step = (b - a).astype(np.float64)
    found: Array = b - step * (1 - t) if t >= 0.5 else a + step * t
    return found.astype(finite.dtype)


def _smallest(finite: Array, count: int) -> Array:
    kept = np.full((len(finite), count), np.inf, finite.dtype)
    integer_grid.smallest(finite, kept)
    return kept
