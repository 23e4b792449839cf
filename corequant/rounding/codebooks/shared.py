"""Weights as indexes of levels that all rows share, each times a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.codebooks.codebook import MOST_BITS, Codebook, check_widths
from corequant.rounding.codebooks.coded import (
    LARGEST_STORED,
    CodedWeight,
    Description,
    Tensors,
    check_shape,
    check_weight,
    half,
    take_tensor,
    whole,
)
from corequant.rounding.codebooks.streams import bits_for, pack_stream, stream_bytes, unpack_stream

__all__ = ["SharedCodebook"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SharedCodebook(CodedWeight):
    """A weight whose rows share a table of levels for each width, and have a scale each.

    In addition to its indexes, a row takes 16 bits, whatever the number of levels.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    widths : numpy.ndarray (rows,), uint8
        Bits of a row's indexes, 0 to 8.
    tables : dict of int to numpy.ndarray (2**width,), float32
        Levels of each width in ascending order, float16 numbers times a power of two.
    scales : numpy.ndarray (rows,), float32
        Non-negative scales, float16 numbers times ``2**exponent``.
    labels : numpy.ndarray (rows, columns), uint8
        Index of each weight's level.
    exponent : int

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[1.0, -1.0, 2.0, -2.0], [4.0, 2.0, -4.0, -2.0]])
    >>> coded = cq.SharedCodebook.of(W, {2: np.array([-2.0, -1, 1, 2])}, np.array([1.0, 2.0]), 2)
    >>> coded.dequantize()
    array([[ 1., -1.,  2., -2.],
           [ 4.,  2., -4., -2.]], dtype=float32)
    >>> coded.nbytes  # two bytes of labels, two scales and four levels
    14
    """

    kind: ClassVar[str] = "shared codebook"

    shape: tuple[int, int]
    widths: npt.NDArray[np.uint8]
    tables: dict[int, npt.NDArray[np.float32]]
    scales: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    exponent: int = 0

    @classmethod
    def of(cls, W: Any, tables: Mapping[int, Any], scales: Any, widths: Any) -> SharedCodebook:
        """Assign each weight to its row's nearest level; levels and scales become float16 first.

        Parameters
        ----------
        W : numpy.ndarray (rows, columns)
            Floating.
        tables : mapping of int to numpy.ndarray (2**width,)
            Ascending levels of each width in use.
        scales : numpy.ndarray (rows,)
            Non-negative scales of the rows.
        widths : int or numpy.ndarray (rows,)
            Bits of an index, 0 to 8.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError, ValueError
            If an argument breaks its rule.
        """
        W = check_weight("W", W)
        widths = check_widths("widths", widths, len(W))
        check_numpy("scales", scales)
        check_floating("scales", scales)
        if scales.shape != (len(W),):
            raise ShapeError(f"scales must be one for each of {len(W)} rows, got {scales.shape}")
        if scales.size and not 0 <= scales.min() <= scales.max() < np.inf:
            raise ValueError(f"scales must be finite and not negative, got {scales.min()}")
        rounded = {}
        for width in (int(w) for w in np.unique(widths)):
            rounded[width] = whole(*half(_check_table(tables, width)))
        largest = max(float(np.abs(table).max()) for table in rounded.values())
        if largest * float(scales.max()) > LARGEST_STORED:
            raise ValueError(
                f"scales times levels must be at most {LARGEST_STORED:.4g}, got {scales.max()} "
                f"times {largest}"
            )
        stored, exponent = half(scales)
        shape = int(W.shape[0]), int(W.shape[1])
        none = np.zeros(shape, np.uint8)
        return cls(shape, widths, rounded, whole(stored, exponent), none, exponent).encode(W)

    def encode(self, values: Array) -> SharedCodebook:
        """Return a codebook with the same levels and the labels nearest to ``values``.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError
            If the values are invalid or have another shape.
        """
        return replace(self, labels=self._rows.encode(values).labels)

    def enter_block(self, columns: Array, values: Array, curvature: Array) -> None:
        """Do nothing: the levels are already chosen."""

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return the levels for column j that are nearest to ``w`` (rows,), in the dtype of w."""
        return self._rows.quantize_column(w, j)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""
        return replace(self._rows, labels=self.labels).dequantize()

    def unit_values(self) -> npt.NDArray[np.float32]:
        """Return the levels of the weights (rows, columns), without the scales of the rows."""
        found = np.empty(self.shape, np.float32)
        for width, table in self.tables.items():
            rows = self.widths == width
            found[rows] = table[self.labels[rows]]
        return found

    @property
    def levels(self) -> npt.NDArray[np.float32]:
        """Levels of each row (rows, 2**max(widths)), padded with zeros."""
        found = np.zeros((len(self.widths), 1 << int(self.widths.max(initial=0))), np.float32)
        for width, table in self.tables.items():
            rows = self.widths == width
            found[rows, : len(table)] = self.scales[rows, None] * table
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of labels, scales, tables, and widths where they differ."""
        rows, columns = self.shape
        distinct, counts = np.unique(self.widths, return_counts=True)
        pairs = [(int(w), int(n)) for w, n in zip(distinct, counts, strict=True)]
        labels = sum(stream_bytes(n * columns, w) for w, n in pairs)
        tables = sum(2 << w for w, _ in pairs)
        return labels + 2 * rows + tables + stream_bytes(rows, bits_for(len(pairs)))

    def to_tensors(self) -> dict[str, Array]:
        """Return labels by width, scales, tables by width, and which width a row has."""
        tensors: dict[str, Array] = {
            "scales": np.ldexp(self.scales, -self.exponent).astype(np.float16)
        }
        distinct = np.unique(self.widths)
        for width in (int(w) for w in distinct):
            if width:
                chosen = self.labels[self.widths == width].reshape(-1)
                tensors[f"labels.{width}"] = pack_stream(chosen, width)
            tensors[f"table.{width}"] = half(self.tables[width])[0]
        if len(distinct) > 1:
            index = np.searchsorted(distinct, self.widths)
            tensors["widths"] = pack_stream(index, bits_for(len(distinct)))
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return shape, exponents, and the widths in use."""
        distinct = [int(w) for w in np.unique(self.widths)]
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "exponent": self.exponent,
            "widths": distinct,
            "tables": [half(self.tables[w])[1] for w in distinct],
        }

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> SharedCodebook:
        """Return the weight with these tensors and this description."""
        shape, distinct = check_shape(description), description.get("widths")
        exponents, exponent = description.get("tables"), description.get("exponent")
        if (
            not isinstance(distinct, list)
            or not isinstance(exponents, list)
            or not distinct
            or len(exponents) != len(distinct)
            or not all(isinstance(n, int) for n in (*distinct, *exponents, exponent))
            or not all(0 <= w <= MOST_BITS for w in distinct)
        ):
            raise CheckpointError(
                "widths must be a list of 0 to 8 with an exponent in tables for each, and exponent "
                f"an integer, got {distinct!r}, {exponents!r} and {exponent!r}"
            )
        rows, columns = shape
        widths = np.full(rows, distinct[0], np.uint8)
        if len(distinct) > 1:
            size = bits_for(len(distinct))
            packed = take_tensor(tensors, "widths", np.uint8, stream_bytes(rows, size))
            index = unpack_stream(packed, size, rows)
            if index.max() >= len(distinct):
                raise CheckpointError(f"widths must point into {distinct}, got {index.max()}")
            widths = np.array(distinct, np.uint8)[index]
        labels, tables = np.zeros(shape, np.uint8), {}
        for width, power in zip(distinct, exponents, strict=True):
            table = take_tensor(tensors, f"table.{width}", np.float16, 1 << width)
            tables[width] = whole(table, power)
            chosen = np.flatnonzero(widths == width)
            if width:
                count = len(chosen) * columns
                size = stream_bytes(count, width)
                packed = take_tensor(tensors, f"labels.{width}", np.uint8, size)
                labels[chosen] = unpack_stream(packed, width, count).reshape(-1, columns)
        assert isinstance(exponent, int)
        scales = whole(take_tensor(tensors, "scales", np.float16, rows), exponent)
        return cls(shape, widths, tables, scales, labels, exponent)

    @cached_property
    def _rows(self) -> Codebook:
        """The same levels as a ``Codebook`` by row, with all labels zero."""
        none = np.zeros(self.shape, np.uint8)
        return Codebook(self.shape, "row", self.widths, self.levels, none)


def _check_table(tables: Mapping[int, Any], width: int) -> Array:
    """Return the levels of a width, finite and ascending."""
    if not isinstance(tables, Mapping):
        raise TypeError(f"tables must be a mapping, got {type(tables).__name__}")
    if width not in tables:
        raise ValueError(f"tables must hold levels of width {width}, got {sorted(tables)}")
    table = np.asarray(tables[width])
    if table.shape != (1 << width,):
        raise ShapeError(
            f"tables of width {width} must be {1 << width} levels, got shape {table.shape}"
        )
    check_finite(f"table of width {width}", table)
    if (np.diff(table) < 0).any():
        raise ValueError(f"tables of width {width} must ascend, got {table}")
    return table
