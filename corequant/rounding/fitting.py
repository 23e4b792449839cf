"""Scales that minimize the error of a layer's outputs rather than that of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_index, check_matrix
from corequant.errors import SpecError
from corequant.quantization import QuantizedTensor, as_spec, choose_qparams, dequantize, quantize
from corequant.rounding.hessian import check_hessian
from corequant.specs import Granularity, QuantSpec, ScaleFormat

__all__ = ["CHUNK", "FACTORS", "SWEEPS", "check_fitted", "fit_scales", "leading_pairs"]

Array = npt.NDArray[Any]

FACTORS = np.concatenate([[1.0], np.linspace(0.75, 1.25, 41)]).astype(np.float32)
"""Factors of a group's scale, tried in turn; the first wins ties."""

SWEEPS = 2
"""Number of visits to each group of a row."""

_SPARE, _BLOCKS, _RESTARTS = 8, 5, 8
"""Directions beyond those asked for, blocks that are added to the first, and how often."""

CHUNK = 2**24
"""Numbers that the projected errors of some rows may take."""


def fit_scales(W: Any, H: Any, spec: QuantSpec | str, *, rank: int = 8) -> QuantizedTensor:
    """Round to nearest with scales chosen for the layer's outputs.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the layer's inputs.
    spec : QuantSpec or str
        The quantizer: one scale a channel or a group, in float32. Its own search gives the scales
        to start from.
    rank : int
        Directions of the inputs that count with their correlations.

    Returns
    -------
    QuantizedTensor
        Its arrays are where W is.

    Raises
    ------
    BackendError, HessianError, NonFiniteError, ShapeError, SpecError, TypeError
        If the matrices can't be used, or the spec has no scales to fit.

    Notes
    -----
    The error of an output is ``e H eᵀ`` for the row's error e. Inputs have a mean, and rotated ones
    carry in it what was an outlier channel, so a row's error adds up along it: on SmolLM2-135M W4A4
    rounding to nearest comes from a perplexity of 60 to 34 by this choice of scales alone
    (``bench/bench_perplexity.py``). H is taken as its ``rank`` leading eigenvectors and a
    diagonal, ``H ≈ U Λ Uᵀ + D`` with the diagonal of H kept, so that trying a scale takes one
    product with (in_features, rank) instead of with H. Each group's scale is multiplied by factors
    from 0.75 to 1.25; groups of a row are visited in turn, twice. Codes stay the nearest ones, so
    readers see an ordinary round-to-nearest tensor.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(2.0, 1.0, (256, 32)), rng.normal(size=(8, 32))
    >>> H = X.T @ X / 256
    >>> nearest = cq.quantize(W, "int4:channel:symmetric:mse")
    >>> fitted = cq.fit_scales(W, H, "int4:channel:symmetric:mse")
    >>> cq.reconstruction_loss(W, fitted, H) < cq.reconstruction_loss(W, nearest, H) / 3
    True
    """
    if is_elsewhere(W):
        fitted: QuantizedTensor = round_elsewhere("fit_scales", W=W, H=H, spec=spec, rank=rank)
        return fitted
    spec = check_fitted(spec)
    W = check_matrix("W", W)
    d = W.shape[1]
    H = check_hessian(H, d, "W")
    # By kernels that are used below, too.
    start, zero_points = choose_qparams(W, spec)
    if W.size == 0:
        return quantize(W, spec, start, zero_points)
    U, diagonal = _leading(H, min(check_index("rank", rank), d))
    size = d if spec.group_size is None else spec.group_size
    scales = np.array(start, copy=True)
    rows = max(1, CHUNK // (len(FACTORS) * (d // size) * (U.shape[1] + 1)))
    for first in range(0, len(W), rows):
        part = slice(first, first + rows)
        zeros = None if zero_points is None else zero_points[part]
        squares, projected = _trials(W[part], spec, start[part], zeros, U, diagonal, size)
        chosen = _choose(squares, projected)
        scales[part] *= FACTORS[chosen].reshape(scales[part].shape)
    return quantize(W, spec, scales, zero_points)


def check_fitted(spec: QuantSpec | str) -> QuantSpec:
    """Return a spec whose scales can be fitted."""
    spec = as_spec(spec)
    if spec.granularity not in (Granularity.CHANNEL, Granularity.GROUP):
        raise SpecError(f"spec must scale channels or groups to fit their scales, got {spec}")
    if spec.scale_format is not ScaleFormat.FLOAT32:
        raise SpecError(f"spec must have scales in float32 to fit them, got {spec}")
    return spec


def _leading(H: Array, rank: int) -> tuple[Array, Array]:
    """Return eigenvectors scaled by roots of eigenvalues (d, rank), and what is left of diag(H)."""
    from scipy.linalg import eigh

    d, wide = len(H), in_unit(H.astype(np.float64))
    if rank < d:
        values, vectors = leading_pairs(lambda block: wide @ block, d, rank)
    else:
        values, vectors = eigh(wide)
    U = vectors * np.sqrt(np.maximum(values, 0))
    rest = np.maximum(np.diagonal(wide) - np.square(U).sum(1), 0)
    return U.astype(np.float32), rest.astype(np.float32)


def in_unit(H: Array) -> Array:
    """Scale by a power of two, so that squares in float32 neither overflow nor vanish."""
    scaled: Array = np.ldexp(H, -int(np.frexp(np.abs(H).max(initial=0))[1]))
    return scaled


def leading_pairs(product: Callable[[Array], Array], d: int, rank: int) -> tuple[Array, Array]:
    """Return the largest eigenvalues (rank,) of a matrix H (d, d) and their vectors (d, rank).

    Block Lanczos with restarts, from a start of its own: the same matrix gives the same vectors,
    also where eigenvalues are equal.

    Parameters
    ----------
    product : callable
        Returns ``H V`` of vectors V (d, k), float64; H is positive semidefinite.
    d, rank : int
        ``rank < d``.
    """
    drawn = np.random.default_rng(0).standard_normal((d, min(d, rank + _SPARE)))
    block = np.linalg.qr(drawn)[0]
    values, vectors = np.zeros(rank), np.zeros((d, rank))
    for _ in range(_RESTARTS):
        basis, images = block, product(block)
        for _ in range(_BLOCKS):
            fresh = images[:, -block.shape[1] :]
            for _ in range(2):
                fresh = fresh - basis @ (basis.T @ fresh)
            axes, sizes, _ = np.linalg.svd(fresh, full_matrices=False)
            # What is left of a space that H maps to itself is rounding.
            block = axes[:, sizes > 1e-9 * np.abs(images).max()][:, : d - basis.shape[1]]
            if not block.shape[1]:
                break
            basis = np.hstack([basis, block])
            images = np.hstack([images, product(block)])
        small = basis.T @ images
        found, turns = np.linalg.eigh((small + small.T) / 2)
        before, values = values, found[-rank:]
        vectors, block = basis @ turns[:, -rank:], basis @ turns[:, -drawn.shape[1] :]
        if np.abs(values - before).max() <= 1e-10 * values[-1]:
            break
    return values, vectors


def _trials(
    W: Array,
    spec: QuantSpec,
    scales: Array,
    zeros: Array | None,
    U: Array,
    diagonal: Array,
    size: int,
) -> tuple[Array, Array]:
    """Return each factor's errors: on the diagonal (k, rows, n), along U (k, rows, n, rank)."""
    blocks, rows = len(U) // size, len(W)
    squares = np.empty((len(FACTORS), rows, blocks), np.float32)
    projected = np.empty((len(FACTORS), rows, blocks, U.shape[1]), np.float32)
    directions = U.reshape(blocks, size, -1)
    exponent = math.frexp(float(np.abs(W).max()))[1]
    for k, factor in enumerate(FACTORS):
        tried = quantize(W, spec, scales * factor, zeros)
        E = np.ldexp(dequantize(tried) - W, -exponent).astype(np.float32, copy=False)
        squares[k] = (np.square(E) * diagonal).reshape(rows, blocks, size).sum(-1)
        split = E.reshape(rows, blocks, size).swapaxes(0, 1)
        projected[k] = (split @ directions).swapaxes(0, 1)
    return squares, projected


def _choose(squares: Array, projected: Array) -> npt.NDArray[np.int64]:
    """Return the index of each group's factor (rows, n)."""
    _, rows, blocks = squares.shape
    chosen = np.zeros((rows, blocks), np.int64)
    every = np.arange(rows)
    total = projected[0].sum(1)
    for _ in range(SWEEPS if blocks > 1 else 1):
        for g in range(blocks):
            others = total - projected[chosen[:, g], every, g]
            outcomes = others + projected[:, :, g]
            loss = squares[:, :, g] + np.square(outcomes).sum(-1)
            chosen[:, g] = loss.argmin(0)
            total = outcomes[chosen[:, g], every]
    return chosen
