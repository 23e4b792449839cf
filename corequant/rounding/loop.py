"""The column loop that GPTQ, GPFQ and Qronos share, in lazy blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops.columns import solve_block
from corequant._cpu.threads import for_rows
from corequant.errors import NonFiniteError
from corequant.quantization import QuantizedTensor
from corequant.rounding.accumulators import AccumulatorSpec, ensure_certified
from corequant.rounding.bounds import Budget
from corequant.rounding.columns import Scales, column_grid

__all__ = ["BLOCK", "ColumnLoop", "Pull"]

Array = npt.NDArray[Any]

BLOCK = 128
"""Columns between two updates through BLAS: the block's factor, 64 KiB of float32, stays cached."""

Pull = Callable[[int, int, Array, Array], tuple[Array, Array, Array | None]]
"""Of a block ``start..stop-1``, the errors so far and the arguments so far: the sums over the
columns rounded before (rows, B), the block's own factor (B, B) and its echo (B, B) or None."""


@dataclass(frozen=True, eq=False)
class ColumnLoop:
    """Everything that a method needs besides its matrices.

    Attributes
    ----------
    order : array (d,)
        Columns in reverse order of their rounding.
    scales : Scales
        Of the weight's columns in their own order.
    refit : bool
        Choose the scales of a group when its first column is reached.
    accumulator : AccumulatorSpec or None
        What the integer weights must not overflow.
    dtype : dtype
        Float32 or float64.
    name : str
        The layer's name.
    """

    order: Array
    scales: Scales
    refit: bool
    accumulator: AccumulatorSpec | None
    dtype: np.dtype[Any]
    name: str

    def run(
        self, W: Array, values: Array, centers: Array, pull: Pull
    ) -> tuple[QuantizedTensor, float | None]:
        """Round ``values`` (rows, d) with D = ``centers`` - rounded, both in the loop's order.

        ``values`` is overwritten. Returns the codes in W's own order and the share of weights that
        the accumulator moved.
        """
        rows, d = values.shape
        errors = np.empty_like(values)
        grid = column_grid(self.scales.spec.format, self.dtype)
        budget = Budget.of(self.accumulator, W, self.scales, self.dtype)
        groups, tiles = self.order // self.scales.group, self.order // budget.tile
        moved = np.zeros(rows, np.int64)
        steps, zeros = self.scales.steps(rows, self.dtype)
        for stop in self._edges(d):
            start = max(0, stop - self._length)
            sums, mixing, echo = pull(start, stop, errors, values)
            if self.refit:
                self._refit(start, stop, values, sums, mixing)
                steps, zeros = self.scales.steps(rows, self.dtype)
            none = np.empty((0, 0), self.dtype)
            arrays = (values, centers, sums, mixing, none if echo is None else echo, steps, zeros)
            state = (tiles, budget.shrink, budget.positive, budget.negative, moved, errors)

            rest = (groups, grid, budget.limits, *state)

            def work(
                first: int, last: int, at: int = start, arrays: Any = arrays, rest: Any = rest
            ) -> None:
                solve_block(first, last, at, *arrays, *rest)

            for_rows(rows, (stop - start) * BLOCK, work)
        self._check(values)
        back = np.take(values, np.argsort(self.order), axis=1)
        share = float(moved.sum()) / max(1, rows * d) if self.accumulator else None
        rounded = self.scales.encode(back)
        if self.accumulator is not None:
            ensure_certified(rounded, self.accumulator, self.name)
        return rounded, share

    @property
    def _length(self) -> int:
        return self.scales.group if self.refit else BLOCK

    def _edges(self, d: int) -> range:
        return range(d, 0, -self._length)

    def _refit(self, start: int, stop: int, values: Array, sums: Array, mixing: Array) -> None:
        from scipy.linalg import blas

        # What the columns would be if none of them were rounded: no pull is left over.
        trsm = blas.get_blas_funcs("trsm", (values,))
        shift = trsm(1.0, np.asfortranarray(mixing.T), sums.T, lower=False).T
        group = int(self.order[start]) // self.scales.group
        self.scales.refit(group, np.ascontiguousarray(values[:, start:stop] + shift))

    def _check(self, values: Array) -> None:
        good = np.isfinite(values)
        if not good.all():
            index = np.unravel_index(int(np.argmin(good)), good.shape)
            column = int(self.order[index[1]])
            raise NonFiniteError(
                f"W of {self.name}, adjusted for rounding errors,",
                int(good.size - np.count_nonzero(good)),
                (int(index[0]), column),
                float(values[index]),
            )
