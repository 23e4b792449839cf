"""Scales and zero points as torch operations, for any device.

Bit-exact twin: `corequant._cpu.loops.scales`, `corequant._cpu.scales`.
"""

from __future__ import annotations

from typing import SupportsFloat

import numpy as np
import torch

from corequant._cpu.grids import rounder_for, rule_for
from corequant._cpu.loops.scales import Power, Rule
from corequant._cpu.scales import FOUR_OVER_SIX_TOP, SHRINKS, SQUARED, SWEEP
from corequant.errors import BackendError
from corequant.formats import formats
from corequant.specs import POWERS_OF_TWO, QuantSpec, ScaleFormat, ScaleSearch
from corequant_torch.device.grids import (
    Grid,
    integers_of,
    nearest_code,
    nearest_value,
    numpy_dtype,
    table_of,
)
from corequant_torch.device.tables import device_table

__all__ = ["choose", "effective", "global_scale_for", "ranges"]

Tensor = torch.Tensor


def ranges(panel: Tensor, symmetric: bool, skip: bool) -> tuple[Tensor, Tensor]:
    """Return the range of each group and zero; NaN and Inf propagate unless ``skip``."""
    if skip:
        panel = torch.where(panel.isfinite(), panel, 0)
    if symmetric:
        high = panel.abs().amax(1)
        return torch.zeros_like(high), high
    return panel.amin(1).clamp(max=0), panel.amax(1).clamp(min=0)


def global_scale_for(largest: Tensor, spec: QuantSpec) -> Tensor:
    """Return the global scale of a largest magnitude, float32 (1,)."""
    top = formats["float8_e4m3fn"].maximum
    if spec.scale_search is ScaleSearch.FOUR_OVER_SIX:
        top = FOUR_OVER_SIX_TOP
    limit = float(np.finfo(np.float32).max) * (1 - 2.0**-20)
    capped = largest.double().clamp(max=limit).float().reshape(1)
    quotient = torch.full_like(capped, top * spec.format.maximum) / capped
    bounded = quotient.clamp(2.0**-126, 2.0**127)
    return torch.where(largest.reshape(1) == 0, torch.ones_like(bounded), bounded)


def effective(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return the step sizes: the scales, divided by the global scale if there is one."""
    return scales if global_scale is None else scales / global_scale.to(scales.dtype)


def _power_of_two(exponent: Tensor, power: Power, like: Tensor) -> Tensor:
    field = exponent + power.bias
    normal = field.clamp(min=0) << power.fraction
    small = torch.ones_like(field) << (power.fraction + field - 1).clamp(min=0)
    return torch.where(field > 0, normal, small).to(integers_of(like).dtype).view(like.dtype)


def _exponent_for(largest: Tensor, power: Power) -> Tensor:
    small = largest < float(power.least_normal)
    scaled = torch.where(small, largest * float(power.lift), largest)
    bits = integers_of(scaled).long()
    exponent = (bits >> power.fraction) - power.bias - power.offset
    exponent = exponent - small * power.fraction
    exponent = exponent + ((bits & ((1 << power.fraction) - 1)) >= power.threshold)
    return exponent.clamp(power.lowest, power.highest)


def _number(value: SupportsFloat, like: Tensor) -> Tensor:
    # Filled on the device: a copy from the host would synchronize.
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def choose_by_rule(low: Tensor, high: Tensor, rule: Rule, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales, multiplied by ``factor`` before rounding, and zero points of ranges."""
    a, b = -low, high
    largest = torch.maximum(a, b)
    none = torch.zeros_like(largest)
    idle = _number(rule.idle, low)
    steps, tiny = _number(rule.steps, low), float(rule.tiny)
    if rule.power is not None:
        scale = _power_of_two(_exponent_for(largest, rule.power), rule.power, low)
        return torch.where(largest == 0, idle, scale), none
    if rule.symmetric:
        with np.errstate(over="ignore"):
            top = float(rule.huge / rule.span)
        scale = (largest / steps * factor).clamp(max=top)
        if rule.rounder is not None:
            scale = nearest_value(scale, rule.rounder)
        return torch.where(largest == 0, idle, scale.clamp(min=tiny)), none
    least, most = float(rule.least), float(rule.most)
    scale = ((b * 0.5 + a * 0.5) / steps).clamp(min=tiny)
    zero = torch.round(least + a / scale).clamp(least, most)
    widest = torch.maximum(zero - least, most - zero)
    scale = torch.minimum(scale, _number(rule.huge, low) / widest)
    if rule.rounder is not None:
        scale = nearest_value(scale, rule.rounder).clamp(min=tiny)
        moved = torch.round(least + a / scale).clamp(least, most)
        # A zero point farther from the middle may make the largest value infinite.
        fits = scale * torch.maximum(moved - least, most - moved) <= float(rule.huge)
        zero = torch.where(fits, moved, zero)
    return torch.where(largest == 0, idle, scale), torch.where(largest == 0, none, zero)


def choose(
    panel: Tensor,
    low: Tensor,
    high: Tensor,
    spec: QuantSpec,
    divisor: Tensor | None,
    propagate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of a panel's groups by the spec's search.

    Parameters
    ----------
    panel : torch.Tensor (groups, size)
    low, high : torch.Tensor (groups,)
        Ranges of the groups, as returned by ``ranges``.
    spec : QuantSpec
    divisor : torch.Tensor (1,) or None
        Global scale.
    propagate : bool
        Whether entries that aren't finite are left out of the search.
    """
    rule, kind = rule_for(spec, numpy_dtype(panel.dtype)), spec.scale_search
    if kind in (ScaleSearch.HQO, ScaleSearch.EXACT):
        raise BackendError(
            f"scale_search {kind.value!r} must run on the CPU, got a tensor on {panel.device}; "
            "choose scales from x.cpu() and pass them"
        )
    if not spec.format.signed and spec.symmetric and spec.format.minimum >= 0:
        low = torch.zeros_like(low)
    factor = panel.new_ones(()) if divisor is None else divisor[0].to(panel.dtype)
    if kind is ScaleSearch.PERCENTILE:
        low, high = _percentiles(panel, low, high, spec)
    scales, zeros = choose_by_rule(low, high, rule, factor)
    if kind in (ScaleSearch.ABSMAX, ScaleSearch.PERCENTILE):
        return scales, zeros
    if propagate:
        panel = torch.where(panel.isfinite(), panel, 0)
    trials, offsets = _trials(low, high, spec, factor, scales)
    grid = Grid(spec.format, panel.dtype, panel.device)
    steps = effective(trials, divisor)
    if panel.dtype == torch.float64:
        exponents = torch.frexp(torch.maximum(-low, high))[1][:, None]
        if int(exponents.abs().max()) > SQUARED:
            panel, steps = torch.ldexp(panel, -exponents), torch.ldexp(steps, -exponents)
    losses = grid.losses(panel, steps, offsets)
    # The first minimum, like NumPy; torch's argmin doesn't say which.
    least = losses.amin(1, keepdim=True)
    order = torch.arange(losses.shape[1], device=losses.device)
    best = torch.where(losses == least, order, losses.shape[1]).amin(1, keepdim=True)
    best = best.clamp(max=losses.shape[1] - 1)
    busy = (low != 0) | (high != 0)
    return (
        torch.where(busy, trials.gather(1, best)[:, 0], scales),
        torch.where(busy, offsets.gather(1, best)[:, 0], zeros),
    )


def _trials(
    low: Tensor, high: Tensor, spec: QuantSpec, factor: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, device = numpy_dtype(scales.dtype), scales.device
    if spec.scale_format in POWERS_OF_TWO:
        power = rule_for(spec.replace(scale_rounding="floor"), dtype).power
        assert power is not None  # by the scale format
        exponents = _exponent_for(torch.maximum(-low, high), power)
        exponents = torch.where((low == 0) & (high == 0), power.lowest, exponents)
        exponents = torch.stack([exponents, exponents - 1, exponents + 1], 1)
        trials = _power_of_two(exponents.clamp(power.lowest, power.highest), power, scales)
        return trials, torch.zeros_like(trials)
    rule = rule_for(spec, dtype)
    if spec.scale_search is ScaleSearch.FOUR_OVER_SIX:
        four, _ = choose_by_rule(low, high, rule, factor * 1.5)
        trials = torch.stack([scales, four], 1)
        return trials, torch.zeros_like(trials)
    if spec.scale_format is ScaleFormat.E4M3:
        form = formats["float8_e4m3fn"]
        codes = nearest_code(scales, rounder_for(form, dtype)).long()
        near = codes[:, None] + device_table(SWEEP, scales)
        trials = table_of(form, scales.dtype, device)[near.clamp(1, form.magnitudes - 1)]
        return trials, torch.zeros_like(trials)
    shrinks = device_table(SHRINKS.astype(dtype), scales)
    return choose_by_rule(low[:, None] * shrinks, high[:, None] * shrinks, rule, factor)


def _percentile(sorted_rows: Tensor, q: float) -> Tensor:
    """Return NumPy's linearly interpolated percentile of sorted rows, in their dtype."""
    last = sorted_rows.shape[1] - 1
    position = np.float64(q) / 100 * last
    below = int(np.floor(position))
    t = float(position - below)
    a, b = sorted_rows[:, below], sorted_rows[:, min(below + 1, last)]
    step = (b - a).double()
    found = b.double() - step * (1 - t) if t >= 0.5 else a.double() + step * t
    return found.to(sorted_rows.dtype)


def _percentiles(
    panel: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    good = panel.isfinite()
    largest = torch.maximum(-low, high)
    if bool(good.all()) and float(largest.max()) <= torch.finfo(panel.dtype).max / 4:
        return _whole_percentiles(panel, low, high, spec)
    low, high = low.clone(), high.clone()
    # Entries that aren't finite are left out of their groups.
    for k in good.any(1).nonzero()[:, 0].tolist():
        one = slice(k, k + 1)
        # Scaled by a quarter, differences of neighbours stay finite.
        unit = 0.25 if float(largest[k]) > 1 else 1.0
        rest = panel[one, good[k]] * unit
        ends = _whole_percentiles(rest, low[one] * unit, high[one] * unit, spec)
        low[one], high[one] = (end / unit for end in ends)
    return low, high


def _whole_percentiles(
    finite: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    q = float(spec.percentile or 100)
    if spec.symmetric:
        most = _percentile(finite.abs().sort(1).values, q)
        full = torch.maximum(high, -low)
        return torch.zeros_like(low), torch.where(most > 0, most, full)
    ordered = finite.sort(1).values
    least, most = _percentile(ordered, 100 - q).clamp(max=0), _percentile(ordered, q).clamp(min=0)
    nothing = (least == 0) & (most == 0)
    return torch.where(nothing, low, least), torch.where(nothing, high, most)
