"""The layout of the digits and scales of an additive weight in its arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.partition import Partition
from corequant.rounding.binary.streams import pack_digits, plane_bytes, unpack_digits

__all__ = ["Layout"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layout:
    """The planes of a weight's columns and the slots of its scales.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    orders : tuple of int
        Number of planes of non-salient columns, and of salient ones.
    base : int
        Number of values of a digit.
    partition : Partition or None
    """

    shape: tuple[int, int]
    orders: tuple[int, int]
    base: int
    partition: Partition | None

    def slots(self) -> Iterator[tuple[int, int, int]]:
        """Yield whether columns are salient, the part within them, and the plane."""
        split = (1, 1) if self.partition is None else self.partition.variants()
        kinds = (0,) if self.partition is None or self.partition.columns is None else (0, 1)
        for kind in kinds:
            for variant in range(split[kind]):
                for k in range(self.orders[kind]):
                    yield kind, variant, k

    def parts(self) -> int:
        """Return the number of parts."""
        return sum(k == 0 for _, _, k in self.slots())

    def sides(self) -> tuple[Array, Array]:
        """Return the indices of non-salient and of salient columns."""
        if self.partition is None:
            return np.arange(self.shape[1]), np.empty(0, np.intp)
        salient = self.partition.salient()
        return np.flatnonzero(~salient), np.flatnonzero(salient)

    def having(self) -> list[Array]:
        """Return the columns that have each plane, in ascending order."""
        sides = self.sides()
        return [
            np.sort(np.concatenate([s for s, n in zip(sides, self.orders, strict=True) if n > k]))
            for k in range(max(self.orders))
        ]

    def ends(self) -> list[int]:
        """Return the offsets of each slot's column scales, and the end of the last one's."""
        sides, ends = self.sides(), [0]
        for kind, _, _ in self.slots():
            ends.append(ends[-1] + len(sides[kind]))
        return ends

    def plane_bytes(self) -> int:
        """Return the bytes of all planes."""
        count = sum(len(side) * n for side, n in zip(self.sides(), self.orders, strict=True))
        return plane_bytes(self.shape[0] * count, self.base)

    def pack(self, digits: Array) -> npt.NDArray[np.uint8]:
        """Return the planes of digits (planes, rows, columns)."""
        pieces = [digits[k][:, side].reshape(-1) for k, side in enumerate(self.having())]
        return pack_digits(np.concatenate(pieces), self.base)

    def unpack(self, planes: Array) -> npt.NDArray[np.int8]:
        """Return the digits as numbers (planes, rows, columns), zero in absent planes."""
        rows, d = self.shape
        columns = self.having()
        found = np.zeros((len(columns), rows, d), np.int8)
        flat = unpack_digits(planes, self.base, rows * sum(map(len, columns)))
        values = flat.astype(np.int8) * (2 if self.base == 2 else 1) - 1
        start = 0
        for k, side in enumerate(columns):
            stop = start + rows * len(side)
            found[k][:, side] = values[start:stop].reshape(rows, len(side))
            start = stop
        return found
