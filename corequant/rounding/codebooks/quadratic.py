"""What the output error is quadratic in: a row's levels, and the scales of columns.

The error of a layer is ``Σ_r (q_r H q_rᵀ - 2 q_r t_rᵀ)`` and a constant, q_r being the rows of the
quantized weight and T = ``W G``, or ``W H``. Where it is fixed which weights share a level, q_r is
linear in the levels; where all values but the scales of columns are fixed, in these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.codebooks.systems import level_systems
from corequant._cpu.threads import for_rows
from corequant.rounding.codebooks.codebook import Codebook

__all__ = ["best_column_scales", "best_levels", "row_losses"]

Array = npt.NDArray[Any]

_PANEL = 64
_RIDGE = 1e-7
"""Pull of a row's levels towards what they were, relative to the mean of the system's diagonal."""


def row_losses(W: Array, Q: Array, H: Array, G: Array | None = None) -> npt.NDArray[np.float64]:
    """Return each row's share of ``reconstruction_loss`` (rows,), of checked matrices."""
    D = W.astype(np.float64) - Q
    wide = D.astype(H.dtype)
    products = wide @ H
    if G is not None:
        products += 2 * (W.astype(H.dtype) @ (G.astype(H.dtype) - H))
    found: npt.NDArray[np.float64] = np.einsum("ij,ij->i", wide, products, dtype=np.float64)
    return found


def best_levels(book: Codebook, H: Array, targets: Array) -> Codebook:
    """Return a codebook by row with the levels of least output error for its labels.

    Parameters
    ----------
    book : Codebook
        Its axis is ``"row"``. Levels without weights stay as they are.
    H : array (columns, columns)
    targets : array (rows, columns)
        ``W H``, or ``W G``.

    Returns
    -------
    Codebook
        Weights keep their levels' values, up to float16; their labels are in a new order.
    """
    levels = np.array(book.levels, np.float64)
    H, targets = np.ascontiguousarray(H), np.ascontiguousarray(targets, np.float64)
    for width in np.unique(book.widths):
        size = 1 << int(width)
        chosen = np.flatnonzero(book.widths == width)
        for first in range(0, len(chosen), _PANEL):
            rows = chosen[first : first + _PANEL]
            fitted = _solve(levels[rows, :size], H, targets[rows], book.labels[rows])
            levels[rows, :size] = fitted
    values = np.take_along_axis(levels, book.labels.astype(np.intp), axis=1)
    used = np.arange(levels.shape[1]) < (1 << book.widths.astype(np.int64))[:, None]
    ascending = np.sort(np.where(used, levels, np.inf), axis=1)
    return Codebook.of(values, np.where(used, ascending, 0), book.widths)


def _solve(levels: Array, H: Array, targets: Array, labels: Array) -> Array:
    """Return the best levels (rows, K) of rows that have K each."""
    rows, size = levels.shape
    matrices, rights = np.zeros((rows, size, size)), np.zeros((rows, size))

    def work(first: int, last: int) -> None:
        level_systems(first, last, H, targets, labels, matrices, rights)

    for_rows(rows, H.size, work)
    diagonal = np.einsum("rkk->rk", matrices)
    pull = _RIDGE * diagonal.mean(1, keepdims=True)
    # A level without weights has nothing but the pull.
    pull = np.where(diagonal > 0, pull, np.maximum(pull, np.finfo(np.float64).tiny))
    pull[pull == 0] = 1
    place = np.arange(size)
    matrices[:, place, place] += pull
    found: Array = np.linalg.solve(matrices, (rights + pull * levels)[..., None])[..., 0]
    return found


def best_column_scales(Q: Array, H: Array, targets: Array, ridge: float = 1e-3) -> Array:
    """Return the scales of columns (columns,) by which Q has the least output error.

    Parameters
    ----------
    Q : array (rows, columns)
    H : array (columns, columns)
    targets : array (rows, columns)
        ``W H``, or ``W G``.
    ridge : float
        Pull towards 1, relative to the mean of the system's diagonal.

    Returns
    -------
    array (columns,)
        At least 1e-3.
    """
    from scipy.linalg import solve

    wide = Q.astype(np.float64)
    system = (wide.T @ wide) * H
    right = np.einsum("ij,ij->j", wide, targets, dtype=np.float64)
    diagonal = np.diagonal(system)
    pull = ridge * float(diagonal.mean()) or 1.0
    place = np.arange(len(H))
    system[place, place] += pull
    found: Array = solve(system, right + pull, assume_a="pos")
    return np.maximum(found, 1e-3)
