"""The running state of an accumulator's bounds while columns are rounded, on any device.

Bit-exact twin: `corequant.rounding.bounds`, `corequant._cpu.loops.columns`.
"""

from __future__ import annotations

import torch

from corequant.exact import integer_unit
from corequant.formats import FormatKind
from corequant.rounding.accumulators import AccumulatorSpec, check_tile
from corequant_torch.device.levels import Levels, TensorScales

__all__ = ["Tiles", "excess_thresholds", "soft_thresholds"]

Tensor = torch.Tensor


def soft_thresholds(weights: Tensor, radius: float) -> Tensor:
    """Return θ of each row with ``Σ max(|w - mean| - θ, 0) = radius``, or 0 within the radius."""
    return excess_thresholds((weights - weights.mean(1, keepdim=True)).abs(), radius)


def excess_thresholds(magnitudes: Tensor, radius: float) -> Tensor:
    """Return θ of each row with ``Σ max(m - θ, 0) = radius``, or 0 within the radius."""
    ordered = magnitudes.sort(1, descending=True).values
    count = torch.arange(1, ordered.shape[1] + 1, device=ordered.device, dtype=ordered.dtype)
    trials = (ordered.cumsum(1) - radius) / count
    kept = (ordered > trials).sum(1, keepdim=True).clamp(min=1)
    return trials.gather(1, kept - 1)[:, 0].clamp(min=0)


def _most(a: Tensor, b: Tensor) -> Tensor:
    # Of two zeros the first, as in the compiled loop: its sign is the code's.
    return torch.where(a >= b, a, b)


def _least(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a <= b, a, b)


class Tiles:
    """Limits, soft thresholds and sums of each tile of each row."""

    def __init__(
        self, accumulator: AccumulatorSpec, W: Tensor, scales: TensorScales, dtype: torch.dtype
    ) -> None:
        rows, d = W.shape
        spec, form = scales.spec, scales.spec.format
        self.tile = min(accumulator.tile or d, max(1, d))
        check_tile(accumulator, self.tile, spec)
        self.accumulator = accumulator
        self.diffuse = accumulator.diffuse
        self._least, self._most = accumulator.range
        self._largest = accumulator.limit
        self._unit = 1.0 if form.kind is FormatKind.INTEGER else integer_unit(form)
        count = -(-d // self.tile)
        sums = torch.zeros(2, rows, count, dtype=torch.float64, device=W.device)
        self._positive, self._negative = sums[0], sums[1]
        self._moved = torch.zeros((), dtype=torch.int64, device=W.device)
        self._shrink = torch.zeros(rows, count, dtype=dtype, device=W.device)
        radius = 2.0 * accumulator.limit / (self._most - self._least)
        steps, _ = scales.steps(rows, dtype)
        most = max(-form.minimum, form.maximum) / integer_unit(form)
        for t in range(count):
            start = t * self.tile
            step = steps[:, start // scales.group, None].double() * self._unit
            weights = W[:, start : start + self.tile].double() / step
            if spec.symmetric:
                weights = weights.clamp(-most, most)
            self._shrink[:, t] = soft_thresholds(weights, radius) * self._unit

    def moved_share(self, entries: int) -> float:
        """Return the share of weights that the bounds moved."""
        return int(self._moved) / max(1, entries)

    def place(
        self, column: int, wanted: Tensor, step: Tensor, zero: Tensor, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        """Return a column's arguments and numbers within the bounds, and add them to the sums."""
        tile, kind = column // self.tile, wanted.dtype
        cut = self._shrink[:, tile] * step
        nothing = torch.zeros_like(wanted)
        shrunk = _most(wanted - cut, nothing) + _least(wanted + cut, nothing)
        argument = torch.where(cut > 0, shrunk, wanted)
        least, most = self._room(tile)
        least, most = least * self._unit, most * self._unit
        argument = torch.minimum(
            torch.maximum(argument, least.to(kind) * step), most.to(kind) * step
        )
        level = levels.nearest(argument / step, zero)
        chosen = self._inside(level, least, most, levels)
        argument = torch.where(chosen == level, argument, chosen * step)
        self._moved += (argument != wanted).sum()
        count = torch.round(chosen.double() / self._unit)
        self._positive[:, tile] += count.clamp(min=0)
        self._negative[:, tile] += count.clamp(max=0)
        return argument, chosen

    def _room(self, tile: int) -> tuple[Tensor, Tensor]:
        """Return the least and the largest integer that a tile with these sums can take."""
        low, high, positive, negative = (
            self._least,
            self._most,
            self._positive[:, tile],
            self._negative[:, tile],
        )
        above = self._largest - (high * positive + low * negative)
        below = self._largest + (low * positive + high * negative)
        most, least = above / high, -below / high
        if low < 0:
            most = torch.minimum(most, below / -low)
            least = torch.maximum(least, above / low)
        return least.clamp(max=0).ceil(), most.clamp(min=0).floor()

    def _inside(self, level: Tensor, least: Tensor, most: Tensor, levels: Levels) -> Tensor:
        """Return the numbers of the grid between ``least`` and ``most`` nearest to ``level``."""
        if levels.whole:
            wide = level.double()
            cut = torch.minimum(torch.maximum(wide, least), most)
            return torch.where(cut == wide, level, cut.to(level.dtype))
        table = levels.table.double()
        top = torch.bucketize(most, table, right=True).clamp(min=1) - 1
        bottom = torch.bucketize(least, table).clamp(max=len(table) - 1)
        level = torch.where(level.double() > most, levels.table[top], level)
        return torch.where(level.double() < least, levels.table[bottom], level)
