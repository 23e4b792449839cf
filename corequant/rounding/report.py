"""The report of a rounding, and the output error of a quantized weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_matrix
from corequant.errors import ShapeError
from corequant.quantization import QuantizedTensor, dequantize
from corequant.rounding.hessian import Damping, check_cross_moment, check_hessian

__all__ = ["RoundedTensor", "RoundingReport", "reconstruction_loss"]

Array = npt.NDArray[Any]

_ROWS = 512


@dataclass(frozen=True)
class RoundingReport:
    """How a method rounded a weight.

    Attributes
    ----------
    method : str
        Such as ``"gptq"``.
    name : str
        The layer's name as it was given.
    loss : float or None
        ``reconstruction_loss`` of the result; None where it wasn't asked for.
    nearest_loss : float or None
        The same of the weight rounded to nearest with the spec's own scales.
    damping : Damping or None
        Addition to the diagonal of H; None for methods without.
    dead_columns : tuple of int
        Columns that no input reached: H_jj = 0.
    bounded_share : float or None
        Share of the weights that an accumulator's bound moved; None without an accumulator.
    shrinkage : float
        Addition to the diagonals of H and G for lack of tokens, divided by the mean of H's; 0 if
        there were enough.
    """

    method: str
    name: str
    loss: float | None = None
    nearest_loss: float | None = None
    damping: Damping | None = None
    dead_columns: tuple[int, ...] = ()
    bounded_share: float | None = None
    shrinkage: float = 0.0


@dataclass(frozen=True, eq=False)
class RoundedTensor(QuantizedTensor):
    """A QuantizedTensor with the report of the method that made it.

    Attributes
    ----------
    report : RoundingReport
        The method's report.
    """

    report: RoundingReport = RoundingReport("", "")

    @classmethod
    def of(cls, quantized: QuantizedTensor, report: RoundingReport) -> RoundedTensor:
        """Attach a report to a quantized tensor."""
        q = quantized
        return cls(q.codes, q.scales, q.zero_points, q.spec, q.global_scale, report)


def reconstruction_loss(W: Any, quantized: QuantizedTensor | Any, H: Any, G: Any = None) -> float:
    """Return the mean squared error of a layer's outputs, summed over its outputs.

    Parameters
    ----------
    W : array (out_features, in_features)
        The float weight, NumPy array or torch tensor; all other arrays are of its kind.
    quantized : QuantizedTensor or array (out_features, in_features)
        The quantized weight.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    G : array (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; by default they are X̃ themselves.

    Returns
    -------
    float
        ``tr((W - Q) H (W - Q)ᵀ)``. With G, ``E‖Wx - Qx̃‖² - E‖W(x - x̃)‖²``, whose second part no
        rounding can change, so that it may be negative.

    Raises
    ------
    HessianError, NonFiniteError, ShapeError, TypeError
        If a matrix is invalid or has another shape.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> round(cq.reconstruction_loss(W, np.round(W), np.eye(2)), 3)
    0.36
    """
    if is_elsewhere(W):
        loss = round_elsewhere("reconstruction_loss", W=W, quantized=quantized, H=H, G=G)
        return float(loss)
    W = check_matrix("W", W)
    Q = check_matrix(
        "quantized", dequantize(quantized) if isinstance(quantized, QuantizedTensor) else quantized
    )
    if Q.shape != W.shape:
        raise ShapeError(f"quantized must have W's shape {W.shape}, got {Q.shape}")
    H = check_hessian(H, W.shape[1], "W")
    return loss_of(W, Q, H, None if G is None else check_cross_moment(G, H, "W"))


def gap_product(W: Array, G: Array, H: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``W (G - H)`` (out_features, in_features) of checked matrices, holding no G - H."""
    total = np.zeros(W.shape, dtype)
    for start in range(0, len(H), _ROWS):
        rows = slice(start, start + _ROWS)
        gap = (G[rows].astype(dtype) - H[rows]).astype(dtype, copy=False)
        total += np.ascontiguousarray(W[:, rows], dtype) @ gap
    return total


def loss_of(W: Array, Q: Array, H: Array, G: Array | None) -> float:
    """Return the loss of checked matrices; products in H's dtype, sums in float64."""
    return losses_of(W, [Q], H, G)[0]


def losses_of(W: Array, candidates: Sequence[Array], H: Array, G: Array | None) -> list[float]:
    """Return the loss of each of some candidates for a weight."""
    totals = [0.0] * len(candidates)
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        gap = 0.0 if G is None else 2 * gap_product(W[rows], G, H, H.dtype)
        for k, Q in enumerate(candidates):
            D = (W[rows].astype(np.float64) - Q[rows]).astype(H.dtype)
            P = D @ H + gap
            totals[k] += float(np.einsum("ij,ij->", D, P, dtype=np.float64))
    return totals
