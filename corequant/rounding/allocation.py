"""Joint choice of formats for a model's layers, with the least loss within a total size.

Each unit, a layer or a group of rows, takes one of several formats, each with a loss and a size.
The choice of least total loss within a total size, or of least total size within a total loss, is
the multiple-choice knapsack problem. Its relaxation is solved exactly by following the lower convex
hull of each unit, always taking the steepest step of all units. If the last step fits, this is the
optimum, the well-known case of convex losses. Otherwise the problem is solved exactly by dynamic
programming if sizes are small integer multiples of a common divisor; if they aren't, the choice is
improved by exchanges between units, and the relaxation bounds what is left to gain.

Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems", Springer 2004, chapter 11. Shoham and
Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Transactions on
Acoustics, Speech, and Signal Processing 36 (1988), is the same for quantizers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_number, is_floating
from corequant.errors import BudgetError, NonFiniteError, ShapeError
from corequant.rounding.exchanges import improve

__all__ = ["Allocation", "allocate_bits"]

Array = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]

_MOST_WORK = 1 << 28
"""Limit of the table entries that dynamic programming computes."""

_MOST_STATES = 1 << 27
"""Limit of the table entries that it keeps, one byte each."""

_WHOLE = float(1 << 53)
"""Integers below this limit are exact in float64."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """Result of ``allocate_bits``.

    Attributes
    ----------
    choices : numpy.ndarray (units,), int64
        Index of each unit's format.
    loss, size : float
        Total loss and total size.
    gap : float
        Upper bound of what any other choice could gain, in loss if the size is limited, in size if
        the loss is. It is 0 if the choice is proven to be optimal.
    """

    choices: npt.NDArray[np.int64]
    loss: float
    size: float
    gap: float


def allocate_bits(
    losses: Any, sizes: Any, budget: float | None = None, *, loss: float | None = None
) -> Allocation:
    """Choose a format for each of several units, with the least total loss within a size.

    Losses of units must be additive, such as squared errors of layers' outputs, weighted by their
    effect on the model.

    Parameters
    ----------
    losses : array (units, formats)
        Loss of each unit in each format; infinity if the unit can't have that format.
    sizes : array (units, formats) or (formats,)
        Non-negative sizes in bits or bytes. If they are integers with a large common divisor, the
        choice is always optimal.
    budget : float, optional
        Total size that the choice must not exceed.
    loss : float, optional
        Total loss that the choice must not exceed, instead of ``budget``; the size is minimized
        then.

    Returns
    -------
    Allocation
        The choice; ties are resolved deterministically.

    Raises
    ------
    BudgetError
        If no choice is within the budget; the message states the possible range.
    NonFiniteError
        If a loss is NaN or minus infinity, or a size isn't finite.
    ShapeError, TypeError, ValueError
        If the arrays don't match, a size is negative, a unit has no format, or not exactly one of
        ``budget`` and ``loss`` is given.

    Examples
    --------
    >>> import corequant as cq
    >>> losses = [[9.0, 2.0, 0.5], [4.0, 1.0, 0.2]]
    >>> found = cq.allocate_bits(losses, sizes=[2, 3, 4], budget=6)
    >>> found.choices, found.loss, found.gap
    (array([1, 1]), 3.0, 0.0)
    >>> cq.allocate_bits(losses, [2, 3, 4], loss=2.0).size
    7.0
    """
    cost, weight = _checked(losses, sizes)
    if (budget is None) == (loss is None):
        given = "none" if budget is None else "both"
        raise ValueError(f"exactly one of budget and loss must be given, got {given}")
    if budget is not None:
        limit = _checked_limit("budget", budget, weight, cost)
    else:
        limit = _checked_limit("loss", loss, cost, weight)
    by_size = budget is not None
    objective, constraint = (cost, weight) if by_size else (weight, cost)
    choices, bound = _follow_hulls(objective, constraint, limit)
    gap = _total(objective, choices) - bound
    if gap > 0:
        better = _by_programming(cost, weight, limit, choices, by_size=by_size)
        if better is None:
            choices = improve(objective, constraint, limit, choices, bound)
            gap = max(0.0, _total(objective, choices) - bound)
        else:
            choices, gap = better, 0.0
    return Allocation(choices, _total(cost, choices), _total(weight, choices), max(float(gap), 0.0))


def _checked(losses: Any, sizes: Any) -> tuple[Array, Array]:
    """Return losses and sizes (units, formats), infinite for formats that a unit can't have."""
    cost, weight = _as_floats("losses", losses), _as_floats("sizes", sizes)
    if cost.ndim != 2 or cost.size == 0:
        raise ShapeError(f"losses must be (units, formats), got shape {cost.shape}")
    if weight.shape not in (cost.shape, cost.shape[1:]):
        raise ShapeError(
            f"sizes must have shape {cost.shape} or {cost.shape[1:]} to match losses, got "
            f"{weight.shape}"
        )
    for name, values, bad in (
        ("losses", cost, np.isnan(cost) | (cost == -np.inf)),
        ("sizes", weight, ~np.isfinite(weight)),
    ):
        if bad.any():
            index = tuple(int(k) for k in np.argwhere(bad)[0])
            raise NonFiniteError(name, int(bad.sum()), index, float(values[index]))
    if (weight < 0).any():
        raise ValueError(f"sizes must not be negative, got {weight.min()}")
    possible = np.isfinite(cost)
    if not possible.any(1).all():
        unit = int(np.argmin(possible.any(1)))
        raise ValueError(f"each unit must have a format with a finite loss, got none for {unit}")
    return cost, np.where(possible, weight, np.inf)


def _as_floats(name: str, values: Any) -> Array:
    """Return real numbers, as arrays or nested sequences, as float64."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ShapeError(f"{name} must be rows of equal lengths, got rows that differ") from None
    masked = isinstance(values, np.ma.MaskedArray)
    if masked or not (array.dtype.kind in "iu" or is_floating(array.dtype)):
        got = type(values).__name__ if masked else array.dtype
        raise TypeError(f"{name} must be real numbers, got {got}")
    return array.astype(np.float64)


def _checked_limit(name: str, value: Any, constraint: Array, objective: Array) -> float:
    limit = check_number(name, value)
    # The best of several formats that need the same.
    least = _total(constraint, np.argmin(constraint, 1))
    best = np.lexsort((constraint, objective))[:, 0]
    if not limit >= least:
        raise BudgetError(
            f"{name} must be at least {least:.10g}, what all units take in their smallest format, "
            f"and more than {_total(constraint, best):.10g} gains nothing, got {value}"
            if name == "budget"
            else f"{name} must be at least {least:.10g}, that of all units in their best format, "
            f"and more than {_total(constraint, best):.10g} saves nothing, got {value}"
        )
    return limit


def _total(values: Array, choices: Choice) -> float:
    return math.fsum(values[np.arange(len(values)), choices])


def _follow_hulls(objective: Array, constraint: Array, limit: float) -> tuple[Choice, float]:
    """Return the choice reached by steps along the convex hulls, and a bound of the optimum.

    The bound is the optimum of the relaxation, which takes a part of the first step that doesn't
    fit.
    """
    start, owners, ends, needs, gains = _steps(objective, constraint)
    choices = start.copy()
    ratios = gains / needs
    for k in range(1, len(owners)):
        if owners[k] == owners[k - 1]:
            # Rounding might order a step before the one that leads to it.
            ratios[k] = min(ratios[k], ratios[k - 1])
    order = np.argsort(-ratios, kind="stable")
    spent, reached = _total(constraint, choices), _total(objective, choices)
    needed = spent + np.cumsum(needs[order])
    fitting = int(np.searchsorted(needed, limit, side="right"))
    for k in order[:fitting]:
        choices[owners[k]] = ends[k]
    spent, reached = _total(constraint, choices), _total(objective, choices)
    while spent > limit:
        # The running sum was rounded.
        fitting -= 1
        k = order[fitting]
        choices[owners[k]] = ends[k - 1] if k and owners[k - 1] == owners[k] else start[owners[k]]
        spent, reached = _total(constraint, choices), _total(objective, choices)
    bound = reached
    if fitting < len(order):
        k = order[fitting]
        bound -= gains[k] * (limit - spent) / needs[k]
    return choices, bound


def _steps(objective: Array, constraint: Array) -> tuple[Choice, Choice, Choice, Array, Array]:
    """Return each unit's cheapest format, and the steps from vertex to vertex of its hull.

    Steps are given by their unit, the index of the format that they lead to, their need and their
    gain. Steps of a unit are consecutive, with falling ratios of gain to need.
    """
    start, owners, ends, needs, gains = [], [], [], [], []
    for unit, (y, x) in enumerate(zip(objective, constraint, strict=True)):
        hull: list[int] = []
        for k in np.lexsort((y, x)):
            if not np.isfinite(x[k]) or not np.isfinite(y[k]) or (hull and y[k] >= y[hull[-1]]):
                continue
            while len(hull) > 1 and _is_above(hull[-2], hull[-1], int(k), x, y):
                hull.pop()
            hull.append(int(k))
        start.append(hull[0])
        for before, after in itertools.pairwise(hull):
            owners.append(unit)
            ends.append(after)
            needs.append(x[after] - x[before])
            gains.append(y[before] - y[after])
    indices = [np.array(values, np.int64) for values in (start, owners, ends)]
    return indices[0], indices[1], indices[2], np.array(needs), np.array(gains)


def _is_above(first: int, middle: int, last: int, x: Array, y: Array) -> bool:
    """Return whether the middle of three points is on or above the line through the others."""
    here = (y[first] - y[middle]) * (x[last] - x[middle])
    return bool(here <= (y[middle] - y[last]) * (x[middle] - x[first]))


def _by_programming(
    cost: Array, weight: Array, limit: float, found: Choice, *, by_size: bool
) -> Choice | None:
    """Return the best choice by dynamic programming over the size; None if that is too expensive.

    Parameters
    ----------
    cost, weight : numpy.ndarray (units, formats)
        Losses and sizes.
    limit : float
        Limit of the size, or of the loss unless ``by_size``.
    found : numpy.ndarray (units,)
        A choice within the limit. If the loss is limited, no size above this choice's is searched.
    by_size : bool
        Whether the size is limited.
    """
    possible = np.isfinite(weight)
    whole = weight[possible]
    if (whole != np.floor(whole)).any() or whole.max() >= _WHOLE / len(weight):
        return None
    least = np.where(possible, weight, np.inf).min(1)
    more = np.where(possible, weight - least[:, None], 0).astype(np.int64)
    unit = int(np.gcd.reduce(more, axis=None)) or 1
    steps = more // unit
    room = limit if by_size else _total(weight, found)
    most = int(steps.max(1).sum())
    room = min(most, int((room - math.fsum(least)) // unit))
    if room < 0 or len(cost) * (room + 1) > _MOST_STATES or cost.size * (room + 1) > _MOST_WORK:
        return None
    taken = np.empty((len(cost), room + 1), np.uint8 if cost.shape[1] < 256 else np.int64)
    reached = np.zeros(room + 1)
    for index in range(len(cost)):
        following = np.full(room + 1, np.inf)
        for k in np.argsort(steps[index], kind="stable"):
            first = int(steps[index, k])
            if first > room or not possible[index, k]:
                continue
            offered = reached[: room + 1 - first] + cost[index, k]
            better = offered < following[first:]
            np.copyto(following[first:], offered, where=better)
            np.copyto(taken[index, first:], taken.dtype.type(k), where=better)
        reached = following
    state = room
    if not by_size:
        fits = reached <= limit
        # Sums in another order may differ in their last bits from the sum that is known to fit.
        state = int(np.argmax(fits)) if fits.any() else room
    choices = np.empty(len(cost), np.int64)
    for index in reversed(range(len(cost))):
        choices[index] = taken[index, state]
        state -= int(steps[index, choices[index]])
    held, allowed = (weight, limit) if by_size else (cost, limit)
    return choices if _total(held, choices) <= allowed else None
