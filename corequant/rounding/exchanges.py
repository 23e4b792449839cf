"""Improvement of a choice of formats by changing the format of one unit, or of two at once."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["improve"]

Array = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]

_PASSES = 256
"""Limit of the number of exchanges."""

_CLOSE = 1e-9
"""Gap, relative to the bound, at which the search ends."""


def improve(
    objective: Array, constraint: Array, limit: float, choices: Choice, bound: float
) -> Choice:
    """Return a choice that is at least as good, found by exchanges within a limit.

    Parameters
    ----------
    objective, constraint : numpy.ndarray (units, formats)
        Values whose total is minimized, and values whose total is limited.
    limit : float
    choices : numpy.ndarray (units,), int64
        A choice within the limit.
    bound : float
        Lower bound of the total objective.
    """
    choices, rows = choices.copy(), np.arange(len(choices))
    for _ in range(_PASSES):
        left = limit - math.fsum(constraint[rows, choices])
        now = math.fsum(objective[rows, choices])
        if now - bound <= _CLOSE * abs(bound):
            break
        with np.errstate(invalid="ignore"):
            needs = constraint - constraint[rows, choices][:, None]
            gains = objective[rows, choices][:, None] - objective
        usable = np.isfinite(needs) & np.isfinite(gains)
        pair = _best_pair(np.where(usable, needs, np.inf), np.where(usable, gains, -np.inf), left)
        trial = choices.copy()
        for unit, format_ in pair:
            trial[unit] = format_
        # The differences are rounded.
        better = math.fsum(objective[rows, trial]) < now
        if not better or math.fsum(constraint[rows, trial]) > limit:
            break
        choices = trial
    return choices


def _best_pair(needs: Array, gains: Array, left: float) -> list[tuple[int, int]]:
    """Return the one or two changes, of different units, that fit and gain most together."""
    units, formats = np.nonzero(gains > 0)
    order = np.argsort(needs[units, formats], kind="stable")
    units, formats = units[order], formats[order]
    wanted, gained = needs[units, formats], gains[units, formats]
    if not len(wanted):
        return []
    first, second = _best_so_far(gained, units)
    best: tuple[float, list[tuple[int, int]]] = (0.0, [])
    reach = int(np.searchsorted(wanted, left, side="right"))
    if reach:
        k = first[reach - 1]
        best = (float(gained[k]), [(int(units[k]), int(formats[k]))])
    givers, smaller = np.nonzero(np.isfinite(needs) & (needs < 0) & (gains <= 0))
    reaches = np.searchsorted(wanted, left - needs[givers, smaller], side="right")
    for giver, format_, reach in zip(givers, smaller, reaches, strict=True):
        if not reach:
            continue
        k = first[reach - 1]
        if units[k] == giver:
            k = second[reach - 1]
        if k < 0:
            continue
        total = float(gained[k] + gains[giver, format_])
        if total > best[0]:
            best = (total, [(int(giver), int(format_)), (int(units[k]), int(formats[k]))])
    return best[1]


def _best_so_far(gained: Array, units: Choice) -> tuple[list[int], list[int]]:
    """Return the best change of each prefix, and the best of another unit, -1 if there is none."""
    first: list[int] = []
    second: list[int] = []
    one = two = -1
    for k, (gain, unit) in enumerate(zip(gained.tolist(), units.tolist(), strict=True)):
        if one < 0 or gain > gained[one]:
            if one >= 0 and units[one] != unit:
                two = one
            one = k
        elif unit != units[one] and (two < 0 or gain > gained[two]):
            two = k
        first.append(one)
        second.append(two)
    return first, second
