"""Coded weights some of whose values are kept in float16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._validation import check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    Description,
    Tensors,
    as_inner,
    check_shape,
    check_weight,
    half,
    load_inner,
    take_tensor,
    whole,
)
from corequant.rounding.codebooks.streams import (
    bits_for,
    pack_stream,
    stream_bytes,
    unpack_stream,
)

__all__ = ["KeptOutliers", "SparseOutliers"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SparseOutliers:
    """Some weights of a matrix, in float16 times a power of two.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns of the matrix.
    positions : numpy.ndarray (n,), int64
        Column-major positions ``column * rows + row``, ascending.
    values : numpy.ndarray (n,), float32
        Float16 numbers times ``2**exponent``.
    exponent : int

    Notes
    -----
    Positions are stored as a bitmap, or as the number in each column and the row of each one,
    whichever is smaller. ``nbytes`` includes them.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.5, 8.0, -0.25, 0.125], [0.5, 0.25, -0.5, -9.0]])
    >>> kept = cq.SparseOutliers.of(W, np.abs(W) > 1)
    >>> kept.values, kept.nbytes
    (array([ 8., -9.], dtype=float32), 5)
    """

    shape: tuple[int, int]
    positions: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    exponent: int = 0

    @classmethod
    def of(cls, W: Any, mask: Any) -> SparseOutliers:
        """Keep the weights of a matrix at which a mask of the same shape is true.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError
            If an argument breaks its rule.
        """
        W = check_weight("W", W)
        check_numpy("mask", mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"mask must have dtype bool, got {mask.dtype}")
        if mask.shape != W.shape:
            raise ShapeError(f"mask must have W's shape {W.shape}, got {mask.shape}")
        positions = np.flatnonzero(mask.T)
        stored, exponent = half(W.T.reshape(-1)[positions])
        shape = int(W.shape[0]), int(W.shape[1])
        return cls(shape, positions, whole(stored, exponent), exponent)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Mask of the weights that are kept (rows, columns)."""
        found = np.zeros(math.prod(self.shape), np.bool_)
        found[self.positions] = True
        return np.ascontiguousarray(found.reshape(self.shape[::-1]).T)

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return 2 * len(self.values) + min(self._bitmap, self._listed)

    def place(self, matrix: Array) -> Array:
        """Return a copy of a matrix (rows, columns) with the kept weights at their positions."""
        if matrix.shape != self.shape:
            raise ShapeError(f"matrix must have shape {self.shape}, got {matrix.shape}")
        flat = matrix.T.flatten()
        flat[self.positions] = self.values
        return np.ascontiguousarray(flat.reshape(self.shape[::-1]).T)

    def to_tensors(self) -> dict[str, Array]:
        """Return the values, and the positions in the smaller of two forms."""
        tensors: dict[str, Array] = {
            "values": np.ldexp(self.values, -self.exponent).astype(np.float16)
        }
        if self._bitmap <= self._listed:
            bits = self.mask.T.reshape(-1)
            return {**tensors, "bitmap": np.packbits(bits, bitorder="little")}
        rows, columns = self.shape
        counts = np.bincount(self.positions // rows, minlength=columns)
        tensors["counts"] = pack_stream(counts, bits_for(rows + 1))
        tensors["rows"] = pack_stream(self.positions % rows, bits_for(rows))
        return tensors

    def describe(self) -> dict[str, Any]:
        """Return shape, number and exponent."""
        return {
            "shape": list(self.shape),
            "count": len(self.values),
            "exponent": self.exponent,
        }

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> SparseOutliers:
        """Return the outliers with these tensors and this description, or raise CheckpointError."""
        shape, count = check_shape(description), description.get("count")
        exponent = description.get("exponent")
        if not isinstance(count, int) or not isinstance(exponent, int) or count < 0:
            raise CheckpointError(
                f"count and exponent of outliers must be integers, got {count!r} and {exponent!r}"
            )
        stored = take_tensor(tensors, "values", np.float16, count)
        rows, columns = shape
        if "bitmap" in tensors:
            size = rows * columns
            packed = take_tensor(tensors, "bitmap", np.uint8, stream_bytes(size, 1))
            positions = np.flatnonzero(np.unpackbits(packed, count=size, bitorder="little"))
        else:
            width = bits_for(rows + 1)
            packed = take_tensor(tensors, "counts", np.uint8, stream_bytes(columns, width))
            counts = unpack_stream(packed, width, columns)
            if counts.sum() != count:
                raise CheckpointError(f"counts must add up to {count}, got {counts.sum()}")
            width = bits_for(rows)
            packed = take_tensor(tensors, "rows", np.uint8, stream_bytes(count, width))
            column = np.repeat(np.arange(columns), counts)
            positions = column * rows + unpack_stream(packed, width, count)
        if len(positions) != count or (np.diff(positions) <= 0).any():
            raise CheckpointError(f"positions must be {count} distinct ones in ascending order")
        return cls(shape, positions.astype(np.int64), whole(stored, exponent), exponent)

    @property
    def _bitmap(self) -> int:
        return stream_bytes(math.prod(self.shape), 1)

    @property
    def _listed(self) -> int:
        rows, columns = self.shape
        counts = stream_bytes(columns, bits_for(rows + 1))
        return counts + stream_bytes(len(self.values), bits_for(rows))


@dataclass(frozen=True, eq=False)
class KeptOutliers(CodedWeight):
    """A coded weight some of whose values are replaced by kept ones.

    Attributes
    ----------
    base : CodedWeight
    outliers : SparseOutliers
        Kept values, of the same shape as ``base``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.5, 8.0, -0.5, 0.5], [0.5, 0.5, -0.5, -9.0]])
    >>> coded = cq.KeptOutliers(
    ...     cq.Codebook.fit(W.clip(-0.5, 0.5), 1), cq.SparseOutliers.of(W, np.abs(W) > 1)
    ... )
    >>> coded.dequantize()
    array([[ 0.5,  8. , -0.5,  0.5],
           [ 0.5,  0.5, -0.5, -9. ]], dtype=float32)
    """

    kind: ClassVar[str] = "kept outliers"

    base: CodedWeight
    outliers: SparseOutliers

    def __post_init__(self) -> None:
        """Refuse a base that isn't a coded weight, and parts of different shapes."""
        if not isinstance(self.base, CodedWeight):
            raise TypeError(f"base must be a CodedWeight, got {type(self.base).__name__}")
        if tuple(self.base.shape) != tuple(self.outliers.shape):
            raise ShapeError(
                f"outliers must have base's shape {self.base.shape}, got {self.outliers.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return self.outliers.shape

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""
        return self.outliers.place(self.base.dequantize())

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.base.nbytes + self.outliers.nbytes

    def to_tensors(self) -> dict[str, Array]:
        """Return the tensors of both parts."""
        return {**self.outliers.to_tensors(), **as_inner(self.base)}

    def describe(self) -> dict[str, Any]:
        """Return the descriptions of both parts."""
        return {"kind": self.kind, "base": self.base.describe(), **self.outliers.describe()}

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> KeptOutliers:
        """Return the weight with these tensors and this description."""
        outliers = SparseOutliers.from_tensors(tensors, description)
        return cls(load_inner(tensors, description), outliers)
