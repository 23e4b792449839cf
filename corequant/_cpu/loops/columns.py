"""Column after column with error diffusion, for all rows of a weight: GPTQ, GPFQ, Qronos, AXE.

Columns are kept in reverse order of their rounding, so that the factor of ``H = L Lᵀ`` is used as
it is and its inverse is never needed. With D = centers - rounded, column j is rounded at
``values_j + (Σ_{i>j} D_i M_ij + Σ_{i>j} a_i N_ij) / M_jj``, where a_i are these arguments.

Bit-exact twin: `corequant_torch.gpu.columns`, `corequant_torch.rounding.bounds`,
`corequant_torch.rounding.loop`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.bits import larger, smaller
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.projection import soft_threshold

__all__ = ["ColumnGrid", "Limits", "nearest_level", "shrink_thresholds", "solve_block"]


_ROWS = 16
"""Rows that are rounded side by side."""


class ColumnGrid(NamedTuple):
    """What values are rounded to, in units of their step, in the working dtype."""

    least: np.float32
    most: np.float32
    thresholds: npt.NDArray[np.float32]
    """Where rounding moves on to the next number of the table; empty for integers."""
    table: npt.NDArray[np.float32]


class Limits(NamedTuple):
    """An accumulator's bounds: a sum of weights times inputs in [low, high] stays in ±largest."""

    largest: float
    low: float
    high: float
    unit: float
    """The smallest difference of the grid's numbers, whose multiples are the integers summed."""
    diffuse: bool
    """Whether later columns make up for what a bound cut off, too."""


@jit
def nearest_level(v, zero, grid):  # type: ignore[no-untyped-def]
    """Return the number of the grid nearest to ``v``; an integer grid is shifted by ``zero``."""
    if grid.thresholds.shape[0] == 0:
        code = np.rint(v) + zero
        return smaller(larger(code, grid.least), grid.most) - zero
    first = 0
    last = grid.thresholds.shape[0]
    while first < last:
        middle = (first + last) // 2
        if v >= grid.thresholds[middle]:
            first = middle + 1
        else:
            last = middle
    return grid.table[first]


@jit
def _room(positive, negative, limits):  # type: ignore[no-untyped-def]
    """Return the least and the largest integer that a tile with these sums can take."""
    above = limits.largest - (limits.high * positive + limits.low * negative)
    below = limits.largest + (limits.low * positive + limits.high * negative)
    most = above / limits.high
    least = -below / limits.high
    if limits.low < 0:
        most = min(most, below / -limits.low)
        least = max(least, above / limits.low)
    return np.ceil(min(least, 0.0)), np.floor(max(most, 0.0))


@jit
def _inside(level, zero, grid, least, most):  # type: ignore[no-untyped-def]
    """Return the number of the grid between ``least`` and ``most`` (∋ 0) nearest to ``level``."""
    if least <= level <= most:
        return level
    if grid.thresholds.shape[0] == 0:
        return type(level)(min(max(level, least), most))
    result = level
    for k in range(grid.table.shape[0]):
        if level > most and grid.table[k] <= most:
            result = grid.table[k]
        if level < least and grid.table[grid.table.shape[0] - 1 - k] >= least:
            result = grid.table[grid.table.shape[0] - 1 - k]
    return result


@jit
def solve_block(  # type: ignore[no-untyped-def]
    first,
    last,
    start,
    values,
    centers,
    pull,
    mixing,
    echo,
    steps,
    zeros,
    groups,
    grid,
    limits,
    tiles,
    shrink,
    positive,
    negative,
    moved,
    errors,
):
    """Round the columns ``start..start+B-1`` of rows ``first..last-1``, from the last on.

    ``values`` (rows, d) holds what is rounded, and afterwards what was: the arguments. ``pull``
    (rows, B) holds the sums over the columns rounded before, ``mixing`` (B, B) is M, lower
    triangular, and ``echo`` is N, or has no rows. ``groups`` and ``tiles`` (d,) say which of a
    row's ``steps`` and of its accumulators a column has; ``shrink``, ``positive`` and ``negative``
    (rows, tiles) are the soft threshold and the sums of integer weights placed so far; ``moved``
    (rows,) counts what the bounds changed. ``limits`` is None without an accumulator. D is written
    to ``errors`` (rows, d).
    """
    size = mixing.shape[0]
    echoes = echo.shape[0] > 0
    # A few rows at a time: what one waits for, its quotients, the others fill.
    for top in range(first, last, _ROWS):
        bottom = smaller(top + _ROWS, last)
        for j in range(size - 1, -1, -1):
            c = start + j
            for r in range(top, bottom):
                step = steps[r, groups[c]]
                zero = zeros[r, groups[c]]
                argument = values[r, c]
                if pull[r, j] != 0:  # -0.0 stays what it is
                    argument += pull[r, j] / mixing[j, j]
                wanted = argument
                if limits is not None:
                    tile = tiles[c]
                    cut = shrink[r, tile] * step
                    if cut > 0:
                        # A product with an int would make all of it float64: another rounding
                        # than that of the codes, and sums of codes that aren't there.
                        nought = type(step)(0)
                        argument = max(argument - cut, nought) + min(argument + cut, nought)
                    unit = type(step)(limits.unit)
                    least, most = _room(positive[r, tile], negative[r, tile], limits)
                    least = least * limits.unit
                    most = most * limits.unit
                    argument = min(max(argument, type(step)(least) * step), type(step)(most) * step)
                    level = nearest_level(argument / step, zero, grid)
                    chosen = _inside(level, zero, grid, least, most)
                    if chosen != level:
                        level = chosen
                        argument = level * step
                    if argument != wanted:
                        moved[r] += 1
                    count = np.rint(np.float64(level) / unit)
                    positive[r, tile] += max(count, 0.0)
                    negative[r, tile] += min(count, 0.0)
                else:
                    level = nearest_level(argument / step, zero, grid)
                error = centers[r, c] - level * step
                if limits is not None and not limits.diffuse:
                    error -= wanted - argument
                values[r, c] = argument
                errors[r, c] = error
                for i in range(j):
                    pull[r, i] += error * mixing[j, i]
                if echoes:
                    for i in range(j):
                        pull[r, i] += argument * echo[j, i]


@jit
def shrink_thresholds(first, last, weights, radius, out):  # type: ignore[no-untyped-def]
    """Soft thresholds that bring each centred row of ``weights`` into the ℓ1 ball of ``radius``."""
    n = weights.shape[1]
    magnitudes = np.empty(n)
    for r in range(first, last):
        mean = 0.0
        for i in range(n):
            mean += weights[r, i]
        mean /= n
        total = 0.0
        for i in range(n):
            magnitudes[i] = abs(weights[r, i] - mean)
            total += magnitudes[i]
        out[r] = soft_threshold(magnitudes, radius) if total > radius else 0.0
