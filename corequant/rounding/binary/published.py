"""The block loop of BiLLM and ARB-LLM as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.additive import Additive
from corequant.rounding.binary.partition import Partition
from corequant.rounding.binary.planes import residual_planes, row_column_planes
from corequant.rounding.binary.structure import published_parts
from corequant.rounding.binary.target import Target

__all__ = ["published_arb", "published_billm"]

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

_BILLM_FORM = ((0, 0, 1), (0, 1, 1), (1, 0, 2))
"""Parts of BiLLM: whether columns are salient, whether weights are large, and number of planes."""

_ARB_FORM = ((0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 2))
"""The same for ARB-LLM."""


def published_billm(target: Target, block: int) -> Additive:
    """Return BiLLM's approximation of a target in the original order of columns."""
    pieces, curvature = _Pieces(target.values.shape, block, 3, 4), _curvature(target)

    def fit(index: int, columns: slice, values: Array) -> Array:
        return _billm_block(pieces, index, columns, values, values**2 * curvature[columns])

    _diffuse_blocks(target, block, fit)
    return _packed(pieces, block, target, rows_only=True)


def published_arb(target: Target, block: int, steps: int) -> Additive:
    """Return ARB-RC's approximation of a target in the original order of columns."""
    pieces, curvature = _Pieces(target.values.shape, block, 0, 6), _curvature(target)

    def fit(index: int, columns: slice, values: Array) -> Array:
        return _arb_block(pieces, index, columns, values, values**2 * curvature[columns], steps)

    _diffuse_blocks(target, block, fit)
    return _packed(pieces, block, target, rows_only=False)


def _curvature(target: Target) -> Array:
    """Return ``1 / U_jj²`` (columns,) for the upper Cholesky factor U of the inverse of H."""
    curvature: Array = np.diagonal(target.factor.L)[::-1] ** 2
    return curvature


class _Pieces:
    """The results of all blocks of a weight, concatenated.

    Attributes
    ----------
    digits : numpy.ndarray (2, rows, columns), bool
    row_scales, means : numpy.ndarray (slots or parts, rows, blocks)
    column_scales : numpy.ndarray (slots, columns)
    salient : numpy.ndarray (columns,), bool
    large : numpy.ndarray (rows, columns), bool
    """

    def __init__(self, shape: tuple[int, int], block: int, parts: int, slots: int) -> None:
        rows, d = shape
        groups = -(-d // block)
        self.digits = np.zeros((2, rows, d), np.bool_)
        self.row_scales = np.zeros((slots, rows, groups))
        self.means = np.zeros((parts, rows, groups))
        self.column_scales = np.ones((slots, d))
        self.salient = np.zeros(d, np.bool_)
        self.large = np.zeros(shape, np.bool_)


def _diffuse_blocks(target: Target, block: int, fit: Callable[[int, slice, Array], Array]) -> None:
    """Approximate blocks of columns in turn, and diffuse their errors to later columns.

    Parameters
    ----------
    target : Target
        Target in the original order of columns.
    block : int
    fit : callable
        Called with the pieces, the index of a block, its columns and their current weights (rows,
        n). Adds the block to the pieces and returns its approximation.
    pieces : Pieces
    """
    from scipy.linalg import lapack

    values = np.ascontiguousarray(target.values[:, ::-1])
    inverse, _ = lapack.get_lapack_funcs(("trtri",), (values,))[0](target.factor.L, lower=1)
    U = inverse[::-1, ::-1]
    values[:, target.dead] = 0
    d = values.shape[1]
    for index, start in enumerate(range(0, d, block)):
        columns = slice(start, min(start + block, d))
        now = np.ascontiguousarray(values[:, columns])
        # As published: the error of a column, as if earlier ones of the block had no error.
        errors = (now - fit(index, columns, now)) / np.diagonal(U)[columns]
        values[:, columns.stop :] -= errors @ U[columns, columns.stop :]


def _billm_block(
    pieces: _Pieces, index: int, columns: slice, values: Array, saliency: Array
) -> Array:
    """Add a block of BiLLM to the pieces and return its values."""
    salient, large = published_parts(saliency, everywhere=False)
    pieces.salient[columns], pieces.large[:, columns] = salient, large
    found = np.zeros_like(values)
    slot = 0
    for part, (kind, variant, order) in enumerate(_BILLM_FORM):
        mask = (salient == bool(kind)) & (large == bool(variant))
        planes = residual_planes(values, order, mask)
        found += np.where(mask, planes.values(), 0)
        pieces.means[part, :, index] = planes.mean
        for k in range(order):
            pieces.row_scales[slot, :, index] = planes.scales[k]
            pieces.digits[k][:, columns] |= mask & (planes.signs[k] > 0)
            slot += 1
    return found


def _arb_block(
    pieces: _Pieces, index: int, columns: slice, values: Array, saliency: Array, steps: int
) -> Array:
    """Add a block of ARB-RC with its column-group bitmap to the pieces and return its values."""
    salient, large = published_parts(saliency, everywhere=True)
    pieces.salient[columns], pieces.large[:, columns] = salient, large
    found = np.zeros_like(values)
    slot = 0
    for kind, variant, order in _ARB_FORM:
        mask = (salient == bool(kind)) & (large == bool(variant))
        planes = row_column_planes(values, order, mask, steps)
        found += np.where(mask, planes.values(), 0)
        for k in range(order):
            level = _level(planes.columns[k])
            pieces.row_scales[slot, :, index] = planes.rows[k] * level
            pieces.column_scales[slot, columns] = planes.columns[k] / level
            pieces.digits[k][:, columns] |= mask & (planes.signs[k] > 0)
            slot += 1
    return found


def _packed(pieces: _Pieces, block: int, target: Target, rows_only: bool) -> Additive:
    """Return the weight that consists of these pieces."""
    everywhere = not rows_only
    partition = Partition.of(pieces.salient, pieces.large, everywhere=everywhere)
    slots = len(pieces.row_scales) if pieces.salient.any() else 2
    parts = 3 if pieces.salient.any() else 2
    return Additive.of(
        pieces.digits,
        pieces.row_scales[:slots],
        group=block,
        orders=(1, 2),
        means=pieces.means[:parts] if rows_only else None,
        column_scales=None if rows_only else pieces.column_scales[:slots],
        partition=partition,
        exponent=target.exponent,
    ).scaled(target.scale)


def _level(scales: Array) -> float:
    """Return the mean of the nonzero scales, as a divisor; 1 if all are zero."""
    live = scales[scales != 0]
    return float(np.abs(live).mean()) if live.size else 1.0
