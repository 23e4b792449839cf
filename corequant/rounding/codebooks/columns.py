"""The column loop of GPTQ and Qronos for weights that are not on a grid.

It is the loop of ``corequant.rounding.loop`` with another rounding: columns in reverse order, ``H =
L Lᵀ``, D = centers - rounded, and column j rounded at ``values_j + Σ_{i>j} D_i L_ij / L_jj``.
Blocks of columns are separated by matrix products; a ``ColumnQuantizer`` rounds each column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from corequant._validation import working_dtype
from corequant.errors import NonFiniteError
from corequant.rounding.codebooks.coded import check_weight
from corequant.rounding.damping import addition_to
from corequant.rounding.hessian import (
    Damping,
    Factor,
    check_cross_moment,
    check_hessian,
    check_tokens,
    column_order,
    damped_factor,
    shrunk,
)
from corequant.rounding.problem import gap_product, loss_of
from corequant.rounding.qronos import correct

__all__ = ["ColumnProblem", "ColumnQuantizer"]

Array = npt.NDArray[Any]

_BLOCK = 128
_PANEL = 32
"""Columns of a block between two products, so that BLAS computes most of the sums."""


class ColumnQuantizer(Protocol):
    """Rounds the columns of a weight."""

    def enter_block(self, columns: Array, values: Array, curvature: Array) -> None:
        """Prepare for a block of columns.

        Parameters
        ----------
        columns : array (B,), int64
            Indexes of the columns in the weight, in the order of rounding.
        values : array (rows, B)
            Values that the columns would have if none of them were rounded.
        curvature : array (B,), float64
            L_jj², the cost of a squared error in a column after all later columns have compensated
            for it.
        """

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return column j of the weight, rounded.

        Parameters
        ----------
        w : array (rows,)
            Values to round, with the errors of all earlier columns compensated for.
        j : int
            Index of the column in the weight.

        Returns
        -------
        array (rows,)
            Rounded values in the dtype of ``w``.
        """


@dataclass(frozen=True, eq=False)
class ColumnProblem:
    """A weight, the moments of its inputs, and the order of its columns, all checked.

    ``values`` and ``centers`` (rows, d) have their columns in the order of the loop. ``H`` and
    ``G`` are the moments that the loop uses, ``measured`` those that were passed.
    """

    W: Array
    H: Array
    G: Array | None
    measured: tuple[Array, Array | None]
    order: npt.NDArray[np.int64]
    dead: npt.NDArray[np.bool_]
    factor: Factor
    values: Array
    centers: Array
    damping: Damping
    shrinkage: float
    name: str

    @classmethod
    def of(
        cls,
        W: Any,
        H: Any,
        G: Any = None,
        *,
        damping: float | None = None,
        act_order: bool = True,
        dtype: npt.DTypeLike | None = None,
        tokens: int | None = None,
        name: str = "W",
    ) -> ColumnProblem:
        """Check the arguments; raises the errors of ``gptq`` and ``qronos``.

        Parameters
        ----------
        W : array (out_features, in_features)
        H : array (in_features, in_features)
        G : array (in_features, in_features), optional
            Cross moments for Qronos's correction.
        damping : float, optional
            Addition to the diagonal of H, relative to its mean, or, with G, to the largest
            eigenvalue of H; 0.01 by default, with G 1e-4.
        act_order, dtype, tokens, name
            See ``gptq``.
        """
        W = check_weight("W", W)
        working = working_dtype(W, dtype)
        measured = check_hessian(H, W.shape[1], name)
        cross = None if G is None else check_cross_moment(G, measured, name)
        dead = np.diagonal(measured) == 0
        order = column_order(np.diagonal(measured), dead, act_order, 0)
        H, G, shrinkage = shrunk(measured, cross, check_tokens(tokens))
        addition = addition_to(H, dead, damping, corrected=G is not None)
        factor, used = damped_factor(H, order, dead, addition, working, name)
        centers = np.take(W, order, axis=1).astype(working, copy=False)
        if G is None:
            values = centers.copy()
        else:
            gap = np.ascontiguousarray(gap_product(W, G, H, working)[:, order])
            values = correct(centers, gap, factor, H, order, dead)
        given = measured, cross
        return cls(W, H, G, given, order, dead, factor, values, centers, used, shrinkage, name)

    def run(self, quantizer: ColumnQuantizer, block: int = _BLOCK) -> Array:
        """Return the weight (rows, columns) as ``quantizer`` rounds it, in the working dtype.

        Blocks of ``block`` columns are entered one after the other.
        """
        rounded = np.empty_like(self.values)
        errors = np.empty_like(self.values)
        L = self.factor.L
        for stop in range(self.values.shape[1], 0, -block):
            start = max(0, stop - block)
            sums = errors[:, stop:] @ L[stop:, start:stop]
            part = np.ascontiguousarray(L[start:stop, start:stop])
            self._enter(quantizer, start, stop, sums, part)
            # Columns lie in memory one after the other.
            columns = np.asfortranarray(sums)
            for last in range(stop, start, -_PANEL):
                first = max(start, last - _PANEL)
                for c in range(last - 1, first - 1, -1):
                    j = c - start
                    argument = self.values[:, c] + columns[:, j] / part[j, j]
                    column = quantizer.quantize_column(argument, int(self.order[c]))
                    rounded[:, c] = column
                    error = self.centers[:, c] - column
                    errors[:, c] = error
                    inside = slice(first - start, j)
                    columns[:, inside] += error[:, None] * part[j, inside]
                done = slice(first - start, last - start)
                before = slice(0, first - start)
                columns[:, before] += errors[:, first:last] @ part[done, before]
        self._check(errors)
        return np.take(rounded, np.argsort(self.order), axis=1)

    def loss(self, Q: Array) -> float:
        """Return the reconstruction loss of ``Q`` (rows, columns)."""
        return loss_of(self.W, Q, *self.measured)

    def _enter(
        self, quantizer: ColumnQuantizer, start: int, stop: int, sums: Array, part: Array
    ) -> None:
        from scipy.linalg import blas

        # The values of the columns if none of them were rounded, so that no pull remains.
        trsm = blas.get_blas_funcs("trsm", (sums,))
        shift = trsm(1.0, np.asfortranarray(part.T), sums.T, lower=False).T
        values = (self.values[:, start:stop] + shift)[:, ::-1]
        curvature = np.square(np.diagonal(part)[::-1].astype(np.float64))
        quantizer.enter_block(
            self.order[start:stop][::-1].copy(), np.ascontiguousarray(values), curvature
        )

    def _check(self, errors: Array) -> None:
        good = np.isfinite(errors)
        if not good.all():
            row, place = np.unravel_index(int(np.argmin(good)), good.shape)
            raise NonFiniteError(
                f"W of {self.name}, adjusted for rounding errors,",
                int(good.size - np.count_nonzero(good)),
                (int(row), int(self.order[place])),
                float(errors[row, place]),
            )
