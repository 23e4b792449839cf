"""Weights that are not on a grid: their common interface, and results of quantizing to them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from corequant._validation import check_matrix, check_numpy, working_dtype
from corequant.errors import CheckpointError, ShapeError
from corequant.rounding.hessian import Damping

__all__ = [
    "LARGEST_STORED",
    "CodedWeight",
    "CodingReport",
    "RoundedWeight",
    "as_inner",
    "check_shape",
    "check_values",
    "check_weight",
    "half",
    "load_coded",
    "load_inner",
    "take_tensor",
    "whole",
]

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Description = Mapping[str, Any]

_PACKAGE = "corequant.rounding"
_KINDS = {
    "additive": "binary.additive:Additive",
    "codebook": "codebooks.codebook:Codebook",
    "column scaled": "codebooks.scaled:ColumnScaled",
    "entropy coded": "codebooks.entropy:EntropyCoded",
    "kept outliers": "codebooks.outliers:KeptOutliers",
    "shared codebook": "codebooks.shared:SharedCodebook",
}
"""Module and class of each kind of coded weight."""

_INNER = "base."

_TOP = 15
"""Float16 numbers reach up to 2**16; the largest of an array is brought below 2**15."""

LARGEST_STORED = 65504.0 * 2.0**112
"""Largest float16 number times a power of two that float32 can hold."""


class CodedWeight(ABC):
    """A weight (rows, columns) that isn't on a grid, with everything needed to restore it.

    Subclasses are frozen dataclasses. Their tensors hold everything that a file stores for the
    weight, except for the description, a few plain values.
    """

    kind: ClassVar[str]
    """Name of the kind in a description."""

    shape: tuple[int, int]
    """Rows and columns."""

    @abstractmethod
    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the values (rows, columns)."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Array]:
        """Return the packed arrays that a file holds, by name."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the tensors don't contain, as plain JSON values."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Tensors, description: Description) -> CodedWeight:
        """Return the weight with these tensors and this description.

        Raises
        ------
        CheckpointError
            If they don't belong together.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors together."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors together over the number of weights."""
        return 8 * self.nbytes / math.prod(self.shape)


def load_coded(tensors: Tensors, description: Description) -> CodedWeight:
    """Return the coded weight with these tensors and this description.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray
        Result of ``to_tensors``.
    description : mapping of str
        Result of ``describe``.

    Returns
    -------
    CodedWeight

    Raises
    ------
    CheckpointError
        If the kind is unknown, or tensors and description don't belong together.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.random.default_rng(0).normal(size=(4, 16))
    >>> coded = cq.Codebook.fit(W, 2)
    >>> again = cq.load_coded(coded.to_tensors(), coded.describe())
    >>> np.array_equal(again.dequantize(), coded.dequantize())
    True
    """
    kind = description.get("kind")
    if kind not in _KINDS:
        raise CheckpointError(f"kind must be one of {', '.join(sorted(_KINDS))}, got {kind!r}")
    module, name = _KINDS[kind].split(":")
    found: CodedWeight = getattr(import_module(f"{_PACKAGE}.{module}"), name).from_tensors(
        tensors, description
    )
    return found


@dataclass(frozen=True)
class CodingReport:
    """How a method coded a weight.

    Attributes
    ----------
    method : str
        Name of the method, such as ``"skim"``.
    name : str
        Name of the layer, as passed.
    bits_per_weight : float
        Everything that is stored, in bits, over the number of weights.
    loss : float or None
        ``reconstruction_loss`` of the result; None if it wasn't requested.
    nearest_loss : float or None
        Loss if each weight takes the nearest value instead.
    damping : Damping or None
        Addition to the diagonal of H; None for methods without damping.
    dead_columns : tuple of int
        Columns that no input reached: H_jj = 0.
    shrinkage : float
        Addition to the diagonals of H and G for lack of tokens, divided by the mean of H's.
    """

    method: str
    name: str
    bits_per_weight: float
    loss: float | None = None
    nearest_loss: float | None = None
    damping: Damping | None = None
    dead_columns: tuple[int, ...] = ()
    shrinkage: float = 0.0


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A coded weight with the report of the method that made it.

    Attributes
    ----------
    weight : CodedWeight
    report : CodingReport
    """

    weight: CodedWeight
    report: CodingReport

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the weight's values (rows, columns)."""
        return self.weight.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return self.weight.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits that the weight takes over the number of its entries."""
        return self.weight.bits_per_weight


def half(values: Array) -> tuple[npt.NDArray[np.float16], int]:
    """Return ``values`` as float16 numbers times one power of two, and its exponent.

    The largest magnitude is brought close to the top of float16's range, so that numbers down to
    2**-29 of it keep their eleven bits.

    Raises
    ------
    ValueError
        If a magnitude is above ``LARGEST_STORED``, so that it could not be restored.
    """
    largest = float(np.abs(values).max(initial=0))
    if largest > LARGEST_STORED:
        raise ValueError(f"stored numbers must be at most {LARGEST_STORED:.4g}, got {largest:g}")
    exponent = math.frexp(largest)[1] - _TOP if largest else 0
    return np.ldexp(values, -exponent).astype(np.float16), exponent


def whole(stored: npt.NDArray[np.float16], exponent: int) -> npt.NDArray[np.float32]:
    """Return float16 numbers times ``2**exponent`` as float32, the inverse of ``half``."""
    return np.ldexp(stored.astype(np.float32), exponent)


def check_weight(name: str, W: Any) -> Array:
    """Return a weight (rows, columns), not empty, in native float32 or float64."""
    W = check_matrix(name, W)
    if not W.size:
        raise ShapeError(f"{name} must hold at least one weight, got shape {W.shape}")
    native: Array = W.astype(working_dtype(W), copy=False)
    return native


def check_values(name: str, values: Any, shape: tuple[int, int]) -> Array:
    """Return finite values (rows, columns) of this shape in native float32 or float64."""
    if check_numpy(name, values).shape != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {values.shape}")
    return check_weight(name, values)


def as_inner(base: CodedWeight) -> dict[str, Array]:
    """Return the tensors of a wrapped weight under prefixed names."""
    return {f"{_INNER}{name}": array for name, array in base.to_tensors().items()}


def load_inner(tensors: Tensors, description: Description) -> CodedWeight:
    """Return the wrapped weight, or raise CheckpointError."""
    base, size = description.get("base"), len(_INNER)
    if not isinstance(base, dict):
        raise CheckpointError(f"base must be a description, got {base!r}")
    own = {name[size:]: array for name, array in tensors.items() if name.startswith(_INNER)}
    return load_coded(own, base)


def check_shape(description: Description) -> tuple[int, int]:
    """Return the shape in a description, or raise CheckpointError."""
    shape = description.get("shape")
    good = isinstance(shape, list | tuple) and len(shape) == 2
    if not good or not all(isinstance(n, int) and n > 0 for n in shape or ()):
        raise CheckpointError(f"shape must be two positive integers, got {shape!r}")
    assert shape is not None
    return int(shape[0]), int(shape[1])


def take_tensor(tensors: Tensors, name: str, dtype: npt.DTypeLike, length: int) -> Array:
    """Return the tensor (length,) of a name and dtype, or raise CheckpointError."""
    if name not in tensors:
        raise CheckpointError(f"tensors must hold {name!r}, got {', '.join(sorted(tensors))}")
    found = tensors[name]
    if found.dtype != dtype or found.shape != (length,):
        raise CheckpointError(
            f"{name} must be {np.dtype(dtype).name} of shape ({length},), "
            f"got {found.dtype.name} of shape {found.shape}"
        )
    return found
