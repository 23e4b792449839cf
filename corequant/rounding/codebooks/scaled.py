"""A coded weight whose columns are multiplied by scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_numpy
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    Description,
    Tensors,
    as_inner,
    half,
    load_inner,
    take_tensor,
    whole,
)

__all__ = ["ColumnScaled"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ColumnScaled(CodedWeight):
    """A coded weight times a scale for each column.

    Attributes
    ----------
    base : CodedWeight
    scales : numpy.ndarray (columns,), float32
        Float16 numbers times ``2**exponent``.
    exponent : int

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> base = cq.Codebook.fit(np.array([[1.0, -1.0, 1.0, -1.0]]), 1)
    >>> cq.ColumnScaled.of(base, np.array([1.0, 2.0, 0.5, 1.0])).dequantize()
    array([[ 1. , -2. ,  0.5, -1. ]], dtype=float32)
    """

    kind: ClassVar[str] = "column scaled"

    base: CodedWeight
    scales: npt.NDArray[np.float32]
    exponent: int = 0

    @classmethod
    def of(cls, base: CodedWeight, scales: Any) -> ColumnScaled:
        """Multiply a coded weight by scales of columns, rounded to float16.

        Raises
        ------
        NonFiniteError, ShapeError, TypeError, ValueError
            If an argument breaks its rule.
        """
        if not isinstance(base, CodedWeight):
            raise TypeError(f"base must be a CodedWeight, got {type(base).__name__}")
        check_numpy("scales", scales)
        check_floating("scales", scales)
        if scales.shape != (base.shape[1],):
            raise ShapeError(
                f"scales must have one number for each of {base.shape[1]} columns, "
                f"got {scales.shape}"
            )
        check_finite("scales", scales)
        stored, exponent = half(scales)
        scaled = cls(base, whole(stored, exponent), exponent)
        with np.errstate(over="ignore"):
            if np.abs(scales).max() > 1 and not np.isfinite(scaled.dequantize()).all():
                raise ValueError(
                    f"scales must keep all values in float32's range, got up to {scales.max()}"
                )
        return scaled

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return self.base.shape

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""
        return self.base.dequantize() * self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and of its scales."""
        return self.base.nbytes + 2 * len(self.scales)

    def to_tensors(self) -> dict[str, Array]:
        """Return the tensors of the weight, and the scales."""
        stored = np.ldexp(self.scales, -self.exponent).astype(np.float16)
        return {"scales": stored, **as_inner(self.base)}

    def describe(self) -> dict[str, Any]:
        """Return the description of the weight, and the exponent."""
        return {"kind": self.kind, "exponent": self.exponent, "base": self.base.describe()}

    @classmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> ColumnScaled:
        """Return the weight with these tensors and this description."""
        base, exponent = load_inner(tensors, description), description.get("exponent")
        if not isinstance(exponent, int):
            raise CheckpointError(f"exponent must be an integer, got {exponent!r}")
        stored = take_tensor(tensors, "scales", np.float16, base.shape[1])
        return cls(base, whole(stored, exponent), exponent)
