"""Families of rows of tokens with a common prefix, found so that the fewest tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Family", "divide", "families"]

_MOST = 64
"""Largest number of rows in a family, which bounds the search time."""


@dataclass(frozen=True)
class Family:
    """Rows with a common prefix.

    Attributes
    ----------
    members : tuple of int
        Indices of the rows.
    shared : int
        Number of tokens in the common prefix; 0 for a single row.
    """

    members: tuple[int, ...]
    shared: int


def families(rows: Sequence[tuple[int, ...]]) -> list[Family]:
    """Divide rows into families, so that reading each common prefix once saves the most tokens.

    Parameters
    ----------
    rows : sequence of tuple of int

    Returns
    -------
    list of Family
        Families that together have each row once. A family has at most 64 rows, which are
        consecutive in lexicographic order.

    Examples
    --------
    >>> from corequant_transformers.evaluation.families import families
    >>> rows = [(1, 2, 3), (5,), (1, 2, 4), (1, 6)]
    >>> [(family.members, family.shared) for family in families(rows)]
    [((0, 2), 2), ((3,), 0), ((1,), 0)]
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    # The most tokens that the rows from each start can save, and the size of the first family then.
    saved, sizes = [0] * (len(rows) + 1), [1] * len(rows)
    for start in reversed(range(len(rows))):
        saved[start] = saved[start + 1]
        least = len(rows[order[start]])
        for end in range(start + 2, min(start + _MOST, len(rows)) + 1):
            least = min(least, common[end - 2])
            if not least:
                break
            gain = (end - start - 1) * least + saved[end]
            if gain > saved[start]:
                saved[start], sizes[start] = gain, end - start
    found, start = [], 0
    while start < len(rows):
        end = start + sizes[start]
        shared = min(common[start : end - 1], default=0)
        found.append(Family(tuple(order[start:end]), shared))
        start = end
    return found


def divide(count: int, cost: Callable[[int, int], int | None]) -> list[tuple[int, int]]:
    """Divide a sequence into parts with the least total cost.

    Parameters
    ----------
    count : int
    cost : callable
        Returns the cost of the part from ``start`` to before ``end``; None if this part, and any
        with an earlier start, is too large. A single element is always allowed.

    Returns
    -------
    list of (int, int)
        Start and end of each part, in order.

    Examples
    --------
    >>> from corequant_transformers.evaluation.families import divide
    >>> widths = [9, 8, 2, 2, 2]
    >>> divide(5, lambda start, end: (end - start) * widths[start] + 4)
    [(0, 2), (2, 5)]
    """
    # Least cost of the first elements, and the start of their last part.
    least, starts = [0] * (count + 1), [0] * (count + 1)
    for end in range(1, count + 1):
        least[end], starts[end] = least[end - 1] + (cost(end - 1, end) or 0), end - 1
        for start in range(end - 2, -1, -1):
            own = cost(start, end)
            if own is None:
                break
            if least[start] + own < least[end]:
                least[end], starts[end] = least[start] + own, start
    parts, end = [], count
    while end:
        parts.append((starts[end], end))
        end = starts[end]
    return parts[::-1]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return the length of the common prefix."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))
