"""Round to nearest: every entry by itself."""

from __future__ import annotations

from typing import Any

from corequant._validation import check_matrix
from corequant.quantization import QuantizedTensor, as_spec, quantize
from corequant.specs import QuantSpec

__all__ = ["round_to_nearest"]


def round_to_nearest(W: Any, spec: QuantSpec | str) -> QuantizedTensor:
    """Quantize a weight by rounding each entry to the nearest number of the grid.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Finite, of a floating dtype.
    spec : QuantSpec or str
        The quantizer, such as ``"int4:channel:symmetric:mse"``.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError
        If W is not a finite floating matrix, or the spec doesn't fit it.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> cq.round_to_nearest(W, "int4:channel:symmetric").codes
    array([[ 4, -8],
           [ 2,  7]], dtype=int8)
    """
    return quantize(check_matrix("W", W), as_spec(spec))
