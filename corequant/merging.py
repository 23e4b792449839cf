"""Fold norms, permutations, signs and rotations into the weights around them.

Weights are (out_features, in_features) and a linear layer is ``y = x Wᵀ + bias``. The ``input``
side of a weight is what it reads, the ``output`` side what it writes. If the activation between two
layers becomes ``x' = (x[..., p] ∘ s) R̃``, the writer is merged on its output side and every
reader on its input side with the same arguments, and the function of the pair stays what it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_numpy, check_permutation
from corequant.errors import ShapeError
from corequant.rotation import block_hadamard

__all__ = [
    "fold_norm",
    "fold_norm_bias",
    "merge_centering",
    "merge_factors",
    "merge_permutation",
    "merge_rotation",
]

Array = npt.NDArray[Any]


def fold_norm(W: Array, gain: Array) -> Array:
    """Fold the gain of a norm into a weight that reads the norm's output.

    Parameters
    ----------
    W : numpy.ndarray (out_features, d)
    gain : numpy.ndarray (d,)
        What the norm multiplies its normalised input by; afterwards the norm's own gain must be 1.

    Returns
    -------
    numpy.ndarray (out_features, d)
        ``W ∘ gain`` in the dtype of W, computed in float64.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError
        If an argument is not a finite floating array of that shape.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.fold_norm(np.array([[1.0, 2.0]]), np.array([3.0, 0.5]))
    array([[3., 1.]])
    """
    _check_weight("W", W, 2)
    _check_weight("gain", gain, 1)
    if gain.shape[0] != W.shape[1]:
        raise ShapeError(f"gain must have shape ({W.shape[1]},), got {gain.shape}")
    product = W.astype(np.float64) * gain.astype(np.float64)
    return product.astype(W.dtype)


def fold_norm_bias(W: Array, bias: Array | None, shift: Array) -> Array:
    """Fold the bias of a norm into the bias of a layer that reads the norm's output.

    Parameters
    ----------
    W : numpy.ndarray (out_features, d)
        The layer's weight before the norm's gain is folded in.
    bias : numpy.ndarray (out_features,), optional
        The layer's bias; None is a bias of zeros.
    shift : numpy.ndarray (d,)
        What the norm adds to its output; afterwards the norm's own bias must be 0.

    Returns
    -------
    numpy.ndarray (out_features,)
        ``bias + W shift`` in the dtype of W, computed in float64.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError
        If an argument is not a finite floating array of that shape.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.fold_norm_bias(np.array([[1.0, 2.0]]), np.array([0.5]), np.array([3.0, 1.0]))
    array([5.5])
    """
    _check_weight("W", W, 2)
    _check_weight("shift", shift, 1)
    if shift.shape[0] != W.shape[1]:
        raise ShapeError(f"shift must have shape ({W.shape[1]},), got {shift.shape}")
    total = W.astype(np.float64) @ shift.astype(np.float64)
    if bias is not None:
        _check_weight("bias", bias, 1)
        if bias.shape[0] != W.shape[0]:
            raise ShapeError(f"bias must have shape ({W.shape[0]},), got {bias.shape}")
        total = total + bias.astype(np.float64)
    return total.astype(W.dtype)


def merge_centering(W: Array, *, side: str) -> Array:
    """Subtract the mean over the channels from all that a weight writes, or from what it reads.

    A LayerNorm subtracts the mean of its input's channels. Where every writer of the input is
    centered, so is their sum, and the LayerNorm is an RMSNorm, which a rotation commutes with.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features), or (out_features,) for a bias
    side : {"input", "output"}
        ``output`` centers columns, ``input`` rows; a bias has only an output side.

    Returns
    -------
    numpy.ndarray
        A C-contiguous array in the dtype of W, computed in float64.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is malformed.

    Notes
    -----
    Source: SliceGPT, arXiv 2401.15024, section 3.1.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.merge_centering(np.array([[1.0, 2.0], [3.0, 8.0]]), side="output")
    array([[-1., -3.],
           [ 1.,  3.]])
    """
    axis = _axis(W, side)
    check_finite("W", W)
    wide = W.astype(np.float64)
    return np.ascontiguousarray(wide - wide.mean(axis, keepdims=True), dtype=W.dtype)


def merge_permutation(W: Array, permutation: Array, *, side: str) -> Array:
    """Permute the channels that a weight reads or writes.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features), or (out_features,) for a bias
    permutation : numpy.ndarray, integer
        Permutation of that side's channels; new channel k holds old ``permutation[k]``.
    side : {"input", "output"}
        A bias has only an output side.

    Returns
    -------
    numpy.ndarray
        A C-contiguous copy.

    Raises
    ------
    PermutationError, ShapeError, TypeError, ValueError
        If the permutation isn't one of that many channels, or for a wrong side.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.merge_permutation(np.array([[1.0, 2.0, 3.0]]), np.array([2, 0, 1]), side="input")
    array([[3., 1., 2.]])
    """
    axis = _axis(W, side)
    p = check_permutation("permutation", permutation, W.shape[axis])
    # Fancy indexing of columns gives Fortran order, which some writers store wrongly.
    return np.ascontiguousarray(np.take(W, p, axis=axis))


def merge_factors(W: Array, factors: npt.NDArray[Any], *, side: str) -> Array:
    """Multiply the channels that a weight writes, or undo that in one that reads them.

    Signs and scales pass only through linear paths: elementwise products with other activations,
    but no activation function.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features), or (out_features,) for a bias
    factors : numpy.ndarray (channels,)
        What the activation is multiplied by, of any sign, not 0.
    side : {"input", "output"}
        ``output`` multiplies rows, ``input`` divides columns.

    Returns
    -------
    numpy.ndarray
        In the dtype of W, computed in float64.

    Raises
    ------
    NonFiniteError, ShapeError, TypeError, ValueError
        If an argument is malformed or a factor is 0.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.merge_factors(np.array([[1.0, 2.0]]), np.array([2.0, -1.0]), side="input")
    array([[ 0.5, -2. ]])
    """
    axis = _axis(W, side)
    check_finite("W", W)
    _check_weight("factors", factors, 1)
    if factors.shape[0] != W.shape[axis]:
        raise ShapeError(f"factors must have shape ({W.shape[axis]},), got {factors.shape}")
    if not factors.all():
        raise ValueError(f"factors must not be 0, got 0 at index {int(np.argmin(factors != 0))}")
    wide = factors.astype(np.float64)
    if side == "input":
        return np.ascontiguousarray(W.astype(np.float64) / wide, dtype=W.dtype)
    column = wide if W.ndim == 1 else wide[:, None]
    return np.ascontiguousarray(W.astype(np.float64) * column, dtype=W.dtype)


def merge_rotation(
    W: Array,
    block_size: int | None = None,
    *,
    side: str,
    signs: npt.NDArray[Any] | None = None,
) -> Array:
    """Rotate the channels that a weight reads or writes.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features), or (out_features,) for a bias
    block_size : int, optional
        Block length of the rotation; the whole side by default.
    side : {"input", "output"}
        ``input`` gives ``W D R̃``, ``output`` gives ``R̃ᵀ D W``, D being the signs.
    signs : numpy.ndarray, optional
        ±1 for each channel of that side, applied before the rotation.

    Returns
    -------
    numpy.ndarray
        A C-contiguous array in the dtype of W, computed in float64.

    Raises
    ------
    BlockSizeError, HadamardOrderError, NonFiniteError, ShapeError, TypeError, ValueError
        As for ``block_hadamard``, and if W is not finite or the side a wrong one.

    Notes
    -----
    A reader of ``x R̃`` must hold ``W R̃``, since ``x R̃ (W R̃)ᵀ = x Wᵀ``. Source: QuaRot, arXiv
    2404.00456, section 4.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> x, W = rng.normal(size=(3, 8)), rng.normal(size=(5, 8))
    >>> y = cq.block_hadamard(x, 4) @ cq.merge_rotation(W, 4, side="input").T
    >>> bool(np.allclose(y, x @ W.T))
    True
    """
    axis = _axis(W, side)
    check_finite("W", W)
    wide = np.moveaxis(W, axis, -1).astype(np.float64)
    rotated = np.moveaxis(block_hadamard(wide, block_size, signs=signs), -1, axis)
    return np.ascontiguousarray(rotated, dtype=W.dtype)


def _axis(W: Any, side: str) -> int:
    if side not in ("input", "output"):
        raise ValueError(f"side must be 'input' or 'output', got {side!r}")
    check_numpy("W", W)
    check_floating("W", W)
    if W.ndim > 2 or (W.ndim == 1 and side == "input"):
        raise ShapeError(
            "W must be (out_features, in_features), or (out_features,) with side 'output', "
            f"got shape {W.shape} with side {side!r}"
        )
    return 1 if side == "input" else 0


def _check_weight(name: str, W: Any, ndim: int) -> None:
    check_numpy(name, W)
    check_floating(name, W)
    if W.ndim != ndim:
        raise ShapeError(f"{name} must have {ndim} axes, got shape {W.shape}")
    check_finite(name, W)
