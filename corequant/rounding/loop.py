"""The column loop that GPTQ, GPFQ and Qronos share, in lazy blocks, and its grid and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.grids import grid_for
from corequant._cpu.loops.columns import ColumnGrid, Limits, solve_block
from corequant._cpu.scales import effective
from corequant._cpu.threads import for_rows
from corequant.errors import NonFiniteError
from corequant.formats import FormatKind, NumberFormat
from corequant.quantization import QuantizedTensor, choose_global_scale, choose_qparams, quantize
from corequant.rounding.accumulators import AccumulatorSpec, ensure_certified
from corequant.specs import Granularity, QuantSpec, ScaleSearch

__all__ = ["BLOCK", "ColumnLoop", "Pull", "Scales", "column_grid"]

Array = npt.NDArray[Any]

BLOCK = 128
"""Columns between two updates through BLAS: the block's factor, 64 KiB of float32, stays cached."""

_LEAST_WORK = 1 << 20
"""Multiplications that are worth a thread of their own: about a tenth of a millisecond."""

Pull = Callable[[int, int, Array, Array], tuple[Array, Array, Array | None]]
"""Of a block ``start..stop-1``, the errors so far and the arguments so far: the sums over the
columns rounded before (rows, B), the block's own factor (B, B) and its echo (B, B) or None."""


@lru_cache(maxsize=256)
def column_grid(form: NumberFormat, dtype: np.dtype[Any]) -> ColumnGrid:
    """Return a format's numbers as constants of the column loop, in float32 or float64."""
    none = np.empty(0, dtype)
    if form.kind is FormatKind.INTEGER:
        return ColumnGrid(dtype.type(form.least_code), dtype.type(form.most_code), none, none)
    table = form.finite_values.astype(dtype)
    return ColumnGrid(table[0], table[-1], _thresholds(form, dtype), table)


def _thresholds(form: NumberFormat, dtype: np.dtype[Any]) -> Array:
    """Return the smallest float that the format rounds to each of its numbers but the first."""
    exact = [Fraction(float(v)) for v in form.finite_values]
    middles = [(a + b) / 2 for a, b in pairwise(exact)]
    near = np.array([float(m) for m in middles]).astype(dtype)
    found = np.nextafter(near, dtype.type(-np.inf))
    one, none = np.ones(1, dtype), np.zeros(1, dtype)
    rounded = np.empty((1, len(near)), dtype)
    # Three neighbours of the middle: the first that is rounded up is where the next number begins.
    for _ in range(3):
        grid_for(form, dtype).fake(found.reshape(1, -1), one, none, rounded)
        low = rounded[0] < form.finite_values[1:]
        found[low] = np.nextafter(found[low], dtype.type(np.inf))
    thresholds: Array = found
    return thresholds


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of a weight (rows, d): one for each row and each run of ``group`` columns.

    Arrays are those of ``QuantizedTensor``, of one column for each group.
    """

    spec: QuantSpec
    scales: Array
    zero_points: Array | None
    global_scale: Array | None
    group: int

    @classmethod
    def choose(
        cls,
        W: Array,
        spec: QuantSpec,
        scales: Any = None,
        zero_points: Any = None,
        global_scale: Any = None,
        *,
        refit: bool = False,
    ) -> Scales:
        """Choose scales for W by the spec's search, or check the given ones.

        With ``refit``, the scales of a group are searched when its values are known; until then,
        scales from its range are used.
        """
        if global_scale is None and spec.granularity is Granularity.TENSOR_GROUP and scales is None:
            global_scale = choose_global_scale(W, spec)
        if scales is None:
            if zero_points is not None:
                raise ValueError("zero_points must come with scales, got zero_points alone")
            first = spec.replace(scale_search=ScaleSearch.ABSMAX) if refit else spec
            scales, zero_points = choose_qparams(W, first, global_scale=global_scale)
        else:
            # Rounding once checks shapes, signs and that everything belongs together.
            fitted = quantize(W, spec, scales, zero_points, global_scale=global_scale)
            scales, zero_points = fitted.scales, fitted.zero_points
            global_scale = fitted.global_scale
            zero_points = None if zero_points is None else np.array(zero_points)
        return cls(spec, np.array(scales), zero_points, global_scale, spec.group_size or W.shape[1])

    def steps(self, rows: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Return what codes are multiplied by, and zero points, (rows, groups) of ``dtype``."""
        steps = effective(self.scales, self.global_scale).astype(dtype)
        if self.spec.format.kind is FormatKind.INTEGER:
            steps = steps * dtype.type(math.ldexp(1.0, -self.spec.format.fraction_bits))
        zeros = np.zeros_like(steps) if self.zero_points is None else self.zero_points.astype(dtype)
        shape = (rows, steps.shape[1])
        return (
            np.ascontiguousarray(np.broadcast_to(steps, shape)),
            np.ascontiguousarray(np.broadcast_to(zeros, shape)),
        )

    def refit(self, index: int, values: Array) -> None:
        """Replace the scales of one group by those of the given values (rows, group)."""
        scales, zero_points = choose_qparams(values, self.spec, global_scale=self.global_scale)
        self.scales[:, index] = scales[:, 0]
        if self.zero_points is not None:
            self.zero_points[:, index] = zero_points[:, 0]

    def encode(self, values: Array) -> QuantizedTensor:
        """Round ``values`` (rows, d), in the order of the weight's own columns."""
        return quantize(
            values, self.spec, self.scales, self.zero_points, global_scale=self.global_scale
        )


@dataclass(frozen=True, eq=False)
class Budget:
    """Limits, soft thresholds and sums of each tile of each row, as ``solve_block`` updates them.

    By default there are none.
    """

    limits: Limits | None = None
    tile: int | None = None
    shrink: Array = field(default_factory=lambda: np.zeros((1, 1)))
    positive: Array = field(default_factory=lambda: np.zeros((1, 1)))
    negative: Array = field(default_factory=lambda: np.zeros((1, 1)))
    accumulator: AccumulatorSpec | None = None


@dataclass(frozen=True, eq=False)
class ColumnLoop:
    """The inputs of a column loop other than the method's matrices.

    Attributes
    ----------
    order : array (d,)
        Columns in reverse order of their rounding.
    scales : Scales
        Scales of the weight's columns in their own order.
    refit : bool
        Choose the scales of a group when its first column is reached.
    budget : Budget
        Bounds of an accumulator that the integer weights must not overflow.
    dtype : dtype
        Float32 or float64.
    name : str
        The layer's name.
    """

    order: Array
    scales: Scales
    refit: bool
    budget: Budget
    dtype: np.dtype[Any]
    name: str

    def run(
        self, values: Array, centers: Array, pull: Pull
    ) -> tuple[QuantizedTensor, float | None]:
        """Round ``values`` (rows, d) with D = ``centers`` - rounded, both in the loop's order.

        ``values`` is overwritten. Returns the codes in W's own order and the share of weights that
        the accumulator moved.
        """
        rows, d = values.shape
        errors = np.empty_like(values)
        grid = column_grid(self.scales.spec.format, self.dtype)
        budget, accumulator = self.budget, self.budget.accumulator
        groups, tiles = self.order // self.scales.group, self.order // (budget.tile or max(1, d))
        shrink = budget.shrink.astype(self.dtype, copy=False)
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
            state = (tiles, shrink, budget.positive, budget.negative, moved, errors)

            rest = (groups, grid, budget.limits, *state)

            def work(
                first: int, last: int, at: int = start, arrays: Any = arrays, rest: Any = rest
            ) -> None:
                solve_block(first, last, at, *arrays, *rest)

            for_rows(rows, (stop - start) * BLOCK, work, least_work=_LEAST_WORK)
        self._check(values)
        back = np.take(values, np.argsort(self.order), axis=1)
        share = float(moved.sum()) / max(1, rows * d) if accumulator else None
        rounded = self.scales.encode(back)
        if accumulator is not None:
            ensure_certified(rounded, accumulator, self.name)
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
