"""Scales that balance tensors before rounding, and biases that correct their outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import (
    check_finite,
    check_floating,
    check_matrix,
    check_number,
    check_numpy,
    check_scores,
)
from corequant.errors import ShapeError
from corequant.quantization import QuantizedTensor, dequantize

__all__ = ["balanced_scales", "correct_bias", "cross_layer_scales", "smoothquant_scales"]

Vector = npt.NDArray[np.float64]

_LEAST = 1e-5


def smoothquant_scales(absmax: Any, *weights: Any, alpha: float = 0.5) -> Vector:
    """Return scales that move outliers of activations into the weights that read them.

    Parameters
    ----------
    absmax : numpy.ndarray (d,)
        Largest |x| of each channel.
    *weights : numpy.ndarray (out_features, d)
        All weights that read these activations.
    alpha : float
        Share of the difficulty that moves, 0 to 1.

    Returns
    -------
    numpy.ndarray (d,), float64
        s with ``x / s`` in place of x and ``W * s`` in place of W:
        ``max|x_i|**alpha / max|W_i|**(1 - alpha)``, at least 1e-5, and 1 where either is zero.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an array is not finite or of another shape, or alpha out of range.

    Notes
    -----
    SmoothQuant, arXiv 2211.10438, equation 4.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.smoothquant_scales(np.array([16.0, 1.0]), np.array([[1.0, 0.25], [0.5, -1.0]]))
    array([4., 1.])
    """
    ranges = check_scores("absmax", absmax)
    largest = np.zeros(len(ranges))
    for W in _readers(weights, len(ranges), alpha):
        np.maximum(largest, _range(W, 0), out=largest)
    busy = (ranges > 0) & (largest > 0)
    x, w = np.where(busy, ranges, 1), np.where(busy, largest, 1)
    scales: Vector = np.maximum(x**alpha / w ** (1 - alpha), _LEAST)
    return np.where(busy, scales, 1.0)


def balanced_scales(mean_square: Any, *weights: Any, alpha: float = 0.5) -> Vector:
    """Return scales that balance the energy of activations and weights behind a rotation.

    Parameters
    ----------
    mean_square : numpy.ndarray (d,)
        Mean of x² of each channel (``ActivationStats.mean_square``).
    *weights : numpy.ndarray (out_features, d)
        All weights that read these activations.
    alpha : float
        Share of the imbalance that moves into the weights, 0 to 1.

    Returns
    -------
    numpy.ndarray (d,), float64
        s with ``x / s`` in place of x and ``W * s`` in place of W: ``r_i**alpha / n_i**(1-alpha)``
        with r the root mean square and n the norm of the weights' columns, divided by its
        geometric mean; 1 where either is zero.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an array is not finite or of another shape, or alpha out of range.

    Notes
    -----
    A rotation spreads a token's energy over all of its entries, so its step follows ``‖x / s‖₂``
    rather than a largest entry, and that of the weights' rows their norms. The error that rounding
    leaves in the output, of tokens and of weights alike, is then proportional to
    ``Σ (r_i / s_i)² · Σ (n_i s_i)²``, which the inequality of Cauchy and Schwarz bounds below by
    ``(Σ r_i n_i)²``, and ``s² = r / n`` meets the bound: alpha of one half is optimal. Without a
    rotation, largest entries matter, as in ``smoothquant_scales``. Source: own derivation.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.balanced_scales(np.array([16.0, 1.0]), np.array([[1.0, 1.0]]), alpha=0.5)
    array([1.41421356, 0.70710678])
    """
    energies = check_scores("mean_square", mean_square)
    squares = np.zeros(len(energies))
    for W in _readers(weights, len(energies), alpha):
        squares += np.square(W, dtype=np.float64).sum(0)
    busy = (energies > 0) & (squares > 0)
    logs = np.zeros(len(energies))
    logs[busy] = (alpha * np.log(energies[busy]) - (1 - alpha) * np.log(squares[busy])) / 2
    if busy.any():
        logs[busy] -= logs[busy].mean()
    scales: Vector = np.exp(logs)
    return scales


def cross_layer_scales(first: Any, second: Any) -> Vector:
    """Return scales that give a channel the same range on both of its sides.

    Parameters
    ----------
    first : numpy.ndarray (h, in_features)
        The weight that writes h channels.
    second : numpy.ndarray (out_features, h)
        The weight that reads them, through a positively homogeneous function.

    Returns
    -------
    numpy.ndarray (h,), float64
        s with ``first / s[:, None]`` and its bias ``/ s``, and ``second * s``: then both have the
        range ``√(r1 r2)``. 1 where a range is zero.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError
        If an array is not finite or of another shape.

    Notes
    -----
    Cross-layer equalization, arXiv 1906.04721, equation 11; right through ReLU and the linear
    branch of a gated unit, not through SiLU or GELU.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> first, second = np.array([[8.0, 1.0], [1.0, 0.5]]), np.array([[2.0, -4.0]])
    >>> s = cq.cross_layer_scales(first, second)
    >>> s, abs(first / s[:, None]).max(1), abs(second * s).max(0)
    (array([2. , 0.5]), array([4., 2.]), array([4., 2.]))
    """
    one, two = check_matrix("first", first), check_matrix("second", second)
    if one.shape[0] != two.shape[1]:
        raise ShapeError(
            f"second must have as many columns as first has rows, got {two.shape} and {one.shape}"
        )
    r1, r2 = _range(one, 1), _range(two, 0)
    busy = (r1 > 0) & (r2 > 0)
    scales: Vector = np.sqrt(np.where(busy, r1, 1)) / np.sqrt(np.where(busy, r2, 1))
    return scales


def correct_bias(
    W: Any, quantized: QuantizedTensor | Any, mean: Any, *, bias: Any = None, seen_mean: Any = None
) -> npt.NDArray[Any]:
    """Return the bias with which a rounded layer's mean output is the float layer's.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        The float weight.
    quantized : QuantizedTensor or numpy.ndarray (out_features, in_features)
        What stands for it.
    mean : numpy.ndarray (in_features,)
        Mean of each channel of the float layer's input.
    bias : numpy.ndarray (out_features,), optional
        The float layer's bias; zeros by default.
    seen_mean : numpy.ndarray (in_features,), optional
        Mean of the input that the rounded layer sees; by default the same.

    Returns
    -------
    numpy.ndarray (out_features,)
        ``bias + W mean - Q seen_mean``, in float64.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError
        If an array is not finite or of another shape.

    Notes
    -----
    Bias correction, arXiv 1906.04721, section 4.2, from means that are measured.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> cq.correct_bias(W, np.round(W), np.array([1.0, 2.0])).round(3)
    array([0.9, 0.7])
    """
    W = check_matrix("W", W)
    Q = dequantize(quantized) if isinstance(quantized, QuantizedTensor) else quantized
    Q = check_matrix("quantized", Q)
    if Q.shape != W.shape:
        raise ShapeError(f"quantized must have W's shape {W.shape}, got {Q.shape}")
    x = _vector("mean", mean, W.shape[1])
    seen = x if seen_mean is None else _vector("seen_mean", seen_mean, W.shape[1])
    start = np.zeros(len(W)) if bias is None else _vector("bias", bias, len(W))
    corrected: npt.NDArray[Any] = start + W.astype(np.float64) @ x - Q.astype(np.float64) @ seen
    return corrected


def _readers(weights: tuple[Any, ...], d: int, alpha: float) -> list[npt.NDArray[Any]]:
    if not 0 <= check_number("alpha", alpha) <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    if not weights:
        raise ValueError("weights must hold at least one weight, got none")
    checked = [check_matrix(f"weights[{k}]", weight) for k, weight in enumerate(weights)]
    for k, W in enumerate(checked):
        if W.shape[1] != d:
            raise ShapeError(f"weights[{k}] must have d={d} columns, got {W.shape}")
    return checked


def _range(W: npt.NDArray[Any], axis: int) -> Vector:
    largest: Vector = np.abs(W).max(axis, initial=0).astype(np.float64)
    return largest


def _vector(name: str, value: Any, length: int) -> Vector:
    check_numpy(name, value)
    if value.shape != (length,):
        raise ShapeError(f"{name} must have shape ({length},), got {value.shape}")
    check_floating(name, value)
    check_finite(name, value)
    checked: Vector = value.astype(np.float64)
    return checked
