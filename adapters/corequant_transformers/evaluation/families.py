"""Rows of tokens that begin alike, found so that the fewest tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Family", "divide", "families"]

_MOST = 64
"""Rows of a family at most, which bounds the time to find them."""


@dataclass(frozen=True)
class Family:
    """Rows that begin alike.

    Attributes
    ----------
    members : tuple of int
        Their indices.
    shared : int
        Tokens with which all of them begin; 0 for one that is alone.
    """

    members: tuple[int, ...]
    shared: int


def families(rows: Sequence[tuple[int, ...]]) -> list[Family]:
    """Divide rows into families, so that reading once what each one shares saves most tokens.

    Parameters
    ----------
    rows : sequence of tuple of int

    Returns
    -------
    list of Family
        Each row is in one of them. Rows of a family are next to each other in lexicographic
        order, at most 64.

    Examples
    --------
    >>> from corequant_transformers.evaluation.families import families
    >>> rows = [(1, 2, 3), (5,), (1, 2, 4), (1, 6)]
    >>> [(family.members, family.shared) for family in families(rows)]
    [((0, 2), 2), ((3,), 0), ((1,), 0)]
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    # The most tokens that can be saved among the last rows, and the first family's size for that.
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
    """Divide a sequence into parts that cost least together.

    Parameters
    ----------
    count : int
    cost : callable
        Returns what the part from ``start`` to before ``end`` costs; None where it, and any with an
        earlier start, is too large. One element is a part whatever it costs.

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
    # What the first elements cost at least, and where their last part begins.
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
    """Return with how many equal elements both begin."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))
