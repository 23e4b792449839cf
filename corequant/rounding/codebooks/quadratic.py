"""Least-squares fits of levels and of column scales to the output error.

The error of a layer is ``Σ_r (q_r H q_rᵀ - 2 q_r t_rᵀ)`` plus a constant, with the rows q_r of the
quantized weight and T = ``W G``, or ``W H``. For fixed labels, q_r is linear in the levels; for
fixed values of the weight, it is linear in the scales of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.codebooks.systems import level_systems
from corequant._cpu.threads import for_rows
from corequant.rounding.codebooks.codebook import Codebook
from corequant.rounding.codebooks.shared import SharedCodebook

__all__ = ["best_column_scales", "best_levels", "best_shared", "row_losses"]

Array = npt.NDArray[Any]

_PANEL = 64
_RIDGE = 1e-7
"""Pull of a row's levels to their old values, relative to the mean of the system's diagonal."""


def row_losses(W: Array, Q: Array, H: Array, G: Array | None = None) -> npt.NDArray[np.float64]:
    """Return each row's share of ``reconstruction_loss`` (rows,), for checked matrices."""
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
        Codebook with axis ``"row"``. Levels that no weight uses stay unchanged.
    H : array (columns, columns)
    targets : array (rows, columns)
        ``W H``, or ``W G``.

    Returns
    -------
    Codebook
        Codebook in which each weight has the same level as before, with the level's new value
        rounded to float16; labels are renumbered.
    """
    levels = np.array(book.levels, np.float64)
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


def best_shared(book: SharedCodebook, H: Array, targets: Array) -> SharedCodebook:
    """Return a shared codebook with the best scales for its labels, and then the best levels.

    Parameters
    ----------
    book : SharedCodebook
    H : array (columns, columns)
    targets : array (rows, columns)
        ``W H``, or ``W G``.

    Returns
    -------
    SharedCodebook
        Codebook with the same labels, up to the order of levels. Scales that would not be positive,
        and levels that no weight uses, stay unchanged.
    """
    units = book.unit_values().astype(H.dtype)
    square = np.einsum("ij,ij->i", units @ H, units, dtype=np.float64)
    product = np.einsum("ij,ij->i", units, targets, dtype=np.float64)
    good = (product > 0) & (square > 0)
    scales = np.where(good, product / np.where(good, square, 1), book.scales.astype(np.float64))
    tables: dict[int, Array] = {}
    values = np.empty(book.shape)
    for width, table in book.tables.items():
        rows = np.flatnonzero(book.widths == width)
        fitted = _solve_shared(table, H, targets[rows], book.labels[rows], scales[rows])
        values[rows] = scales[rows, None] * fitted[book.labels[rows]]
        tables[width] = np.sort(fitted)
    return SharedCodebook.of(values, tables, scales, book.widths)


def _solve_shared(table: Array, H: Array, targets: Array, labels: Array, scales: Array) -> Array:
    """Return the best levels (K,) of rows that share them."""
    size = len(table)
    matrix, right = np.zeros((size, size)), np.zeros(size)
    for first in range(0, len(labels), _PANEL):
        part = slice(first, first + _PANEL)
        matrices, rights = _systems(size, H, targets[part], labels[part])
        matrix += np.einsum("rab,r->ab", matrices, np.square(scales[part]))
        right += scales[part] @ rights
    solved: Array = _pulled(matrix[None], right[None], table.astype(np.float64)[None])[0]
    return solved


def _solve(levels: Array, H: Array, targets: Array, labels: Array) -> Array:
    """Return the best levels (rows, K) of rows with K levels each."""
    matrices, rights = _systems(levels.shape[1], H, targets, labels)
    return _pulled(matrices, rights, levels)


def _systems(size: int, H: Array, targets: Array, labels: Array) -> tuple[Array, Array]:
    """Return each row's normal equations: matrices (rows, K, K) and right sides (rows, K)."""
    rows = len(labels)
    matrices, rights = np.zeros((rows, size, size)), np.zeros((rows, size))
    H, targets = np.ascontiguousarray(H), np.ascontiguousarray(targets, np.float64)
    labels = np.ascontiguousarray(labels)

    def work(first: int, last: int) -> None:
        level_systems(first, last, H, targets, labels, matrices, rights)

    for_rows(rows, H.size, work)
    return matrices, rights


def _pulled(matrices: Array, rights: Array, levels: Array) -> Array:
    """Return the solutions (rows, K), pulled slightly towards the previous levels."""
    diagonal = np.einsum("rkk->rk", matrices)
    pull = np.broadcast_to(_RIDGE * diagonal.mean(1, keepdims=True), diagonal.shape).copy()
    # In a row whose inputs are all zero, only the pull remains.
    pull[pull == 0] = 1
    place = np.arange(levels.shape[1])
    matrices[:, place, place] += pull
    found: Array = np.linalg.solve(matrices, (rights + pull * levels)[..., None])[..., 0]
    return found


def best_column_scales(Q: Array, H: Array, targets: Array, ridge: float = 1e-3) -> Array:
    """Return the scales of columns (columns,) with which Q has the least output error.

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
        Scales, each at least 1e-3.
    """
    from scipy.linalg import solve

    wide = Q.astype(np.float64)
    system = (wide.T @ wide) * H
    right = np.einsum("ij,ij->j", wide, targets, dtype=np.float64)
    diagonal = np.diagonal(system)
    pull = ridge * float(diagonal.mean()) if diagonal.any() else 1.0
    place = np.arange(len(H))
    system[place, place] += pull
    found: Array = solve(system, right + pull, assume_a="pos")
    return np.maximum(found, 1e-3)
