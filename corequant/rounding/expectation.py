"""Expected losses of rounding a weight in several formats, without actually rounding it.

A method with error feedback rounds column j at ``w_j + Σ_{i>j} D_i L_ij / L_jj``, with columns in
reverse order of rounding and ``H = L Lᵀ``. Its loss is ``Σ_j L_jj² e_j²``, where e are the
distances to the grid at that moment. They are about as large as in rounding to nearest, where they
are known. The methods differ only in the factors ``L_jj²`` of the columns, the variance of an input
that the others don't predict. One factorization is enough for all formats and all weights with the
same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_matrix, check_numpy
from corequant.errors import ShapeError
from corequant.quantization import as_spec, dequantize, quantize
from corequant.rounding.hessian import (
    check_hessian,
    check_tokens,
    column_order,
    damped_factor,
    mean_diagonal,
    shrunk,
)
from corequant.rounding.problem import losses_of
from corequant.specs import QuantSpec

__all__ = ["expected_losses", "unpredicted"]

Array = npt.NDArray[Any]

_ROWS = 512


def unpredicted(
    H: Any, *, damping: float = 0.01, act_order: bool = True, tokens: int | None = None
) -> npt.NDArray[np.float64]:
    """Return the variance of each input that inputs rounded after it don't predict.

    Parameters
    ----------
    H : numpy.ndarray (d, d)
        ``XᵀX / n`` of the inputs.
    damping : float
        Addition to the diagonal of H, relative to its mean.
    act_order : bool
        Whether columns of large H_jj are rounded first.
    tokens : int, optional
        Number n of tokens; too few are compensated for as in ``gptq``.

    Returns
    -------
    numpy.ndarray (d,), float64
        Variances in the order of H.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.rounding import unpredicted
    >>> unpredicted(np.array([[1.0, 0.8], [0.8, 1.0]]), damping=0).round(2)
    array([0.36, 1.  ])
    """
    H = check_hessian(H, len(H), "H")
    H, _, _ = shrunk(H, None, check_tokens(tokens))
    diagonal = np.diagonal(H).astype(np.float64)
    dead = diagonal == 0
    order = column_order(diagonal, dead, act_order, 0)
    value = damping * mean_diagonal(diagonal, dead)
    factor, _ = damped_factor(H, order, dead, value, np.dtype(np.float32), "H")
    found = np.zeros(len(H))
    found[order] = np.square(np.diagonal(factor.L), dtype=np.float64)
    found[dead] = 0
    return found


def expected_losses(
    W: Any, specs: Sequence[QuantSpec | str], *, H: Any = None, weights: Any = None
) -> npt.NDArray[np.float64]:
    """Return the loss of rounding a weight to nearest in each of several formats.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Finite, of a floating dtype.
    specs : sequence of QuantSpec or str
        The formats.
    H : numpy.ndarray (in_features, in_features), optional
        ``XᵀX / n`` of the inputs; the loss is then the error of the outputs.
    weights : numpy.ndarray (out_features, in_features) or (in_features,), optional
        Weights of the squared errors, instead of H. With the result of ``unpredicted`` for H, the
        loss approximates that of a method with error feedback.

    Returns
    -------
    numpy.ndarray (len(specs),), float64
        ``tr(D H Dᵀ)`` with ``D = W - Q`` and Q the rounded weight, or ``Σ_ij weights_ij D_ij²``.

    Raises
    ------
    BlockSizeError, HessianError, NonFiniteError, ShapeError, SpecError, TypeError
        If an array is invalid or has another shape, a spec doesn't fit W, or not exactly one of
        ``H`` and ``weights`` is given.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.rounding import expected_losses
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> expected_losses(W, ["int2:channel", "int4:channel"], H=np.eye(2)).round(3)
    array([0.28 , 0.021])
    """
    W = check_matrix("W", W)
    if (H is None) == (weights is None):
        given = "none" if H is None else "both"
        raise TypeError(f"exactly one of H and weights must be given, got {given}")
    if H is not None:
        moments = check_hessian(H, W.shape[1], "W")
        return np.array([_quadratic(W, _rounded(W, spec), moments) for spec in specs])
    shares = check_numpy("weights", weights)
    if shares.shape not in (W.shape, W.shape[1:]):
        raise ShapeError(f"weights must be {W.shape} or {W.shape[1:]}, got {shares.shape}")
    check_finite("weights", shares)
    return np.array([_diagonal(W, _rounded(W, spec), shares) for spec in specs])


def _rounded(W: Array, spec: QuantSpec | str) -> Array:
    rounded: Array = dequantize(quantize(W, as_spec(spec)))
    return rounded


def _quadratic(W: Array, Q: Array, H: Array) -> float:
    return losses_of(W, [Q], H, None)[0]


def _diagonal(W: Array, Q: Array, weights: Array) -> float:
    total = 0.0
    for first in range(0, len(W), _ROWS):
        part = slice(first, first + _ROWS)
        squares = np.square(W[part].astype(np.float64) - Q[part])
        total += float((squares * (weights if weights.ndim == 1 else weights[part])).sum())
    return total
