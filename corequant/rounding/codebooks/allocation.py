"""Widths of codebooks within a budget of bits."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import SpecError

__all__ = ["hull_choice", "nonconvex_rows", "step_choice"]

Array = npt.NDArray[Any]


def step_choice(losses: Array, costs: Array, budget: float) -> npt.NDArray[np.int64]:
    """Return a choice for each entry, found by a greedy search.

    Each step moves one entry, that whose loss falls most for the cost, to its next choice. An entry
    stops when the budget can't pay for its next step.

    Parameters
    ----------
    losses : array (entries, choices)
        Loss of each choice, the cheapest choice first.
    costs : array (choices,)
        Cost of each choice, ascending.
    budget : float
        Upper limit of the total cost of all entries.

    Returns
    -------
    array (entries,), int64
        Index of each entry's choice. The choices are optimal if the losses of every entry are
        convex in the costs and all steps cost the same.

    Raises
    ------
    SpecError
        If the budget doesn't pay for the cheapest choices.
    """
    everything = np.ones(losses.shape, np.bool_)
    return _climb(losses, costs, budget, everything, least_gain=-np.inf)


def hull_choice(losses: Array, costs: Array, budget: float) -> npt.NDArray[np.int64]:
    """Return a choice for each entry, found by greedy steps along the lower hull of its losses.

    A choice that lies above the line between two others is skipped, so that it doesn't hide the
    gain of later ones. The rest of the budget is then spent by ``step_choice``'s rule, as long as
    losses fall.
    """
    on_hull = _on_hull(losses, costs)
    chosen = _climb(losses, costs, budget, on_hull)
    return _climb(losses, costs, budget, np.ones(losses.shape, np.bool_), chosen)


def nonconvex_rows(losses: Array, costs: Array) -> int:
    """Return how many entries have losses that aren't convex in their costs."""
    slopes = np.diff(losses, axis=1) / np.diff(costs)
    slack = 1e-9 * np.abs(losses).max(axis=1, keepdims=True, initial=0)
    return int((np.diff(slopes, axis=1) < -slack).any(axis=1).sum())


def _climb(
    losses: Array,
    costs: Array,
    budget: float,
    allowed: npt.NDArray[np.bool_],
    start: npt.NDArray[np.int64] | None = None,
    least_gain: float = 0.0,
) -> npt.NDArray[np.int64]:
    entries = len(losses)
    chosen = np.zeros(entries, np.int64) if start is None else start.copy()
    left = budget - float(costs[chosen].sum())
    if left < -1e-9 * budget:
        least, most = entries * float(costs[0]), entries * float(costs[-1])
        raise SpecError(f"budget must be {least:g} to {most:g} bits, got {budget:g}")
    following = [np.flatnonzero(row) for row in allowed]

    def offer(e: int) -> tuple[float, int, int] | None:
        later = following[e][following[e] > chosen[e]]
        if not len(later):
            return None
        to, now = int(later[0]), int(chosen[e])
        gain = float(losses[e, now] - losses[e, to])
        return -gain / float(costs[to] - costs[now]), e, to

    heap = [found for e in range(entries) if (found := offer(e)) is not None]
    heapq.heapify(heap)
    while heap:
        rate, e, to = heapq.heappop(heap)
        cost = float(costs[to] - costs[chosen[e]])
        if -rate <= least_gain or cost > left + 1e-9 * budget:
            continue
        chosen[e] = to
        left -= cost
        found = offer(e)
        if found is not None:
            heapq.heappush(heap, found)
    return chosen


def _on_hull(losses: Array, costs: Array) -> npt.NDArray[np.bool_]:
    """Return which choices lie on the lower convex hull of an entry's losses over costs."""
    found = np.zeros(losses.shape, np.bool_)
    for e, row in enumerate(losses):
        hull: list[int] = []
        for k in range(len(row)):
            while len(hull) > 1 and _above(costs, row, hull[-2], hull[-1], k):
                hull.pop()
            hull.append(k)
        found[e, hull] = True
    return found


def _above(costs: Array, row: Array, a: int, b: int, c: int) -> bool:
    """Return whether point b is not below the line from a to c."""
    one = (row[b] - row[a]) * (costs[c] - costs[a])
    other = (row[c] - row[a]) * (costs[b] - costs[a])
    return bool(one >= other)
