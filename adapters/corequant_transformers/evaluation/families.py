"""Rows of tokens that begin alike, found so that the fewest tokens are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Family", "families"]

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


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return with how many equal elements both begin."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))
