"""What fused kernels do with a row: one task for many shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from corequant._cpu.codegen.narrowing import TOGETHER

__all__ = ["Task", "index_dtype"]

_LINE = 16
"""Numbers gathered in one turn, at most. Rows are whole vectors: 8 numbers each in float64."""

_MOST_COUNTED = 16
"""Vectors of a group up to which their number is part of the code: loops over a few vectors that
LLVM can't count cost more than the work in them."""


def index_dtype(length: int) -> np.dtype[Any]:
    """Return the dtype of permutations: the narrower, the more of the cache is left."""
    return np.dtype(np.uint16 if length <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Task:
    """What to do with a row besides rotating it.

    The length of a row and that of a large group are told at run time: there are as many kernels as
    there are ways to work, not as many as there are shapes. ``of`` finds the task of a shape.

    Attributes
    ----------
    group : int
        Numbers that share a scale, in whole vectors; 0 where that is told at run time.
    whole : bool
        A row is one group.
    together : int
        Vectors of a group that are worked on side by side; divides their number.
    line : int
        Numbers that are gathered in one turn; divides a row.
    wide : bool
        Indices take 32 bits instead of 16.
    grid : {"codes", "values", "float4"}
        Write int8 codes of an affine grid, the values they stand for, or codes of float4_e2m1fn,
        one a byte, with a scale of float8_e8m0fnu for each group.
    symmetric : bool
        Without zero points.
    permuted : bool
        Gather the channels first.
    streamed : bool
        Values bypass the cache; they start on a line of it.
    """

    group: int
    whole: bool
    together: int
    line: int
    wide: bool
    grid: str
    symmetric: bool
    permuted: bool
    streamed: bool = False

    @classmethod
    def of(
        cls,
        lanes: int,
        length: int,
        group: int,
        grid: str,
        symmetric: bool = True,
        permuted: bool = False,
        streamed: bool = False,
    ) -> Task:
        """Return the task of rows of ``length`` numbers in groups, both whole vectors of lanes."""
        vectors = group // lanes
        return cls(
            group if vectors <= _MOST_COUNTED and group < length else 0,
            group == length,
            next(n for n in (TOGETHER, 3, 2, 1) if vectors % n == 0),
            math.gcd(_LINE, length) if permuted else 0,
            permuted and index_dtype(length).itemsize == 4,
            grid,
            symmetric,
            permuted,
            streamed,
        )
