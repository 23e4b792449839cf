"""Rounding to nearest, each entry on its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_matrix
from corequant.quantization import as_spec, quantize
from corequant.rounding.methods import RoundingMethod
from corequant.rounding.problem import RoundedTensor, RoundingReport, reconstruction_loss
from corequant.specs import QuantSpec

__all__ = ["round_to_nearest"]


def round_to_nearest(
    W: Any,
    spec: QuantSpec | str,
    *,
    H: Any = None,
    G: Any = None,
    global_scale: Any = None,
    name: str = "W",
) -> RoundedTensor:
    """Quantize a weight by rounding each entry to the nearest number of the grid.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype.
    spec : QuantSpec or str
        The quantizer, such as ``"int4:channel:symmetric:mse"``.
    H, G : numpy.ndarray (in_features, in_features), optional
        Moments of the inputs, for the losses of the report alone.
    global_scale : numpy.ndarray (1,), optional
        Global scale of granularity ``tensor_group``, as for ``quantize``.
    name : str
        The layer's name, for the report.

    Returns
    -------
    RoundedTensor
        A QuantizedTensor with a ``report``.

    Raises
    ------
    HessianError, NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError
        If W is not a finite floating matrix, or the spec or the moments don't fit it.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> cq.round_to_nearest(W, "int4:channel:symmetric").codes
    array([[ 4, -8],
           [ 2,  7]], dtype=int8)
    """
    if is_elsewhere(W):
        arguments = {"W": W, "spec": spec, "H": H, "G": G, "global_scale": global_scale}
        result: RoundedTensor = round_elsewhere("round_to_nearest", name=name, **arguments)
        return result
    quantized = quantize(check_matrix("W", W), as_spec(spec), global_scale=global_scale)
    report = RoundingReport("nearest", name)
    if H is not None:
        loss = reconstruction_loss(W, quantized, H, G)
        dead = tuple(int(j) for j in np.flatnonzero(np.diagonal(H) == 0))
        report = RoundingReport("nearest", name, loss, loss, dead_columns=dead)
    return RoundedTensor.of(quantized, report)


METHOD = RoundingMethod("nearest", None, needs_moments=False)
