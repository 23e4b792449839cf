"""The parts of a matrix that weights belong to, as a bit per column, per weight, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index, check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.codebooks.coded import check_shape, take_tensor

__all__ = ["Partition"]

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Partition:
    """A matrix in up to four parts, as bitmaps.

    Parts are numbered ``2 * salient + large``. One bit per column marks salient columns. One bit
    per weight marks large weights, in all columns or only in those that aren't salient.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    columns : numpy.ndarray (ceil(columns/8),), uint8, or None
        Bitmap of salient columns; None if there are none.
    elements : numpy.ndarray (bytes,), uint8, or None
        Bitmap of large weights, row by row; None if weights aren't divided by magnitude.
    everywhere : bool
        Whether ``elements`` includes salient columns.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.1, 0.9, 2.0], [0.8, -0.2, 3.0]])
    >>> parts = cq.Partition.of(np.array([False, False, True]), abs(W) > 0.5)
    >>> parts.parts()
    array([[0, 1, 2],
           [1, 0, 2]], dtype=uint8)
    >>> parts.nbytes
    2
    """

    shape: tuple[int, int]
    columns: npt.NDArray[np.uint8] | None = None
    elements: npt.NDArray[np.uint8] | None = None
    everywhere: bool = False

    @classmethod
    def of(
        cls, salient: Any, large: Any = None, *, rows: int | None = None, everywhere: bool = False
    ) -> Partition:
        """Return the partition with these salient columns and large weights.

        Parameters
        ----------
        salient : numpy.ndarray (columns,), bool
            Mask of the salient columns.
        large : numpy.ndarray (rows, columns), bool, optional
            Mask of the large weights; in salient columns it counts only with ``everywhere``.
        rows : int, optional
            Number of rows of the matrix; required without ``large``.
        everywhere : bool
            Whether the large weights of salient columns form a separate part.

        Raises
        ------
        ShapeError, TypeError
            If an array is empty, has another shape, or a dtype other than bool.
        ValueError
            If ``rows`` isn't positive.
        """
        _check_bools("salient", salient, 1)
        if large is None:
            if rows is None:
                raise TypeError("rows must be an integer where large is None, got None")
            shape = check_index("rows", rows), len(salient)
            bits = None
        else:
            _check_bools("large", large, 2)
            shape = large.shape
            if shape[1] != len(salient):
                raise ShapeError(
                    f"large must have {len(salient)} columns as salient does, got {shape}"
                )
            if rows is not None and rows != shape[0]:
                raise ShapeError(f"rows must be {shape[0]} as in large, got {rows}")
            covered = large if everywhere else large[:, ~salient]
            bits = np.packbits(covered.reshape(-1), bitorder="little")
        columns = np.packbits(salient, bitorder="little") if salient.any() else None
        return cls(shape, columns, bits, bool(everywhere and bits is not None))

    def salient(self) -> Bools:
        """Return which columns are salient (columns,)."""
        if self.columns is None:
            return np.zeros(self.shape[1], np.bool_)
        return np.unpackbits(self.columns, count=self.shape[1], bitorder="little").astype(np.bool_)

    def large(self) -> Bools:
        """Return which weights are large (rows, columns); none outside of ``elements``."""
        found = np.zeros(self.shape, np.bool_)
        if self.elements is not None:
            covered = self._covered()
            size = self.shape[0] * int(covered.sum())
            bits = np.unpackbits(self.elements, count=size, bitorder="little")
            found[:, covered] = bits.reshape(self.shape[0], -1).astype(np.bool_)
        return found

    def large_of(self, j: int) -> Bools:
        """Return which weights of column j are large (rows,), without unpacking the others."""
        covered = self._covered()
        if self.elements is None or not covered[j]:
            return np.zeros(self.shape[0], np.bool_)
        bits = np.arange(self.shape[0]) * int(covered.sum()) + int(covered[:j].sum())
        found: Bools = (self.elements[bits >> 3] >> (bits & 7).astype(np.uint8) & 1) > 0
        return found

    def parts(self) -> npt.NDArray[np.uint8]:
        """Return each weight's part (rows, columns)."""
        return 2 * self.salient().astype(np.uint8) + self.large().astype(np.uint8)

    def variants(self) -> tuple[int, int]:
        """Return the number of parts of non-salient columns, and of salient ones."""
        split = 1 if self.elements is None else 2
        return split, split if self.everywhere else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the bitmaps."""
        return sum(a.nbytes for a in (self.columns, self.elements) if a is not None)

    def to_tensors(self) -> dict[str, Array]:
        """Return the bitmaps in use, by name."""
        found = {"columns": self.columns, "elements": self.elements}
        return {name: array for name, array in found.items() if array is not None}

    def describe(self) -> dict[str, Any]:
        """Return what the bitmaps don't contain, as plain values."""
        return {"shape": list(self.shape), "everywhere": self.everywhere}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Array], description: Mapping[str, Any]
    ) -> Partition:
        """Return the partition with these bitmaps and this description.

        Raises
        ------
        CheckpointError
            If they don't belong together.
        """
        shape, everywhere = check_shape(description), description.get("everywhere")
        if not isinstance(everywhere, bool):
            raise CheckpointError(f"everywhere must be true or false, got {everywhere!r}")
        columns = elements = None
        if "columns" in tensors:
            columns = take_tensor(tensors, "columns", np.uint8, -(-shape[1] // 8))
        found = cls(shape, columns, None, everywhere)
        if "elements" in tensors:
            size = shape[0] * int(found._covered().sum())
            elements = take_tensor(tensors, "elements", np.uint8, -(-size // 8))
        return cls(shape, columns, elements, everywhere)

    def _covered(self) -> Bools:
        return np.ones(self.shape[1], np.bool_) if self.everywhere else ~self.salient()


def _check_bools(name: str, value: Any, ndim: int) -> None:
    check_numpy(name, value)
    if value.dtype != np.bool_:
        raise TypeError(f"{name} must have dtype bool, got {value.dtype}")
    if value.ndim != ndim or not value.size:
        expected = ("(columns,)", "(rows, columns)")[ndim - 1]
        raise ShapeError(f"{name} must be {expected}, not empty, got shape {value.shape}")
