"""The grid of a spec for single columns, where every weight has a scale of its own at hand."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.grids import grid_for
from corequant._cpu.loops.columns import ColumnGrid
from corequant._cpu.scales import effective
from corequant.exact import integer_unit
from corequant.formats import FormatKind, NumberFormat
from corequant.quantization import QuantizedTensor, choose_global_scale, choose_qparams, quantize
from corequant.specs import Granularity, QuantSpec

__all__ = ["Scales", "column_grid"]

Array = npt.NDArray[Any]


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
    ) -> Scales:
        """Choose scales for W by the spec's search, or check those that are given."""
        if global_scale is None and spec.granularity is Granularity.TENSOR_GROUP and scales is None:
            global_scale = choose_global_scale(W, spec)
        if scales is None:
            if zero_points is not None:
                raise ValueError("zero_points must come with scales, got zero_points alone")
            scales, zero_points = choose_qparams(W, spec, global_scale=global_scale)
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
            steps = steps * dtype.type(integer_unit(self.spec.format))
        zeros = np.zeros_like(steps) if self.zero_points is None else self.zero_points.astype(dtype)
        shape = (rows, steps.shape[1])
        return (
            np.ascontiguousarray(np.broadcast_to(steps, shape)),
            np.ascontiguousarray(np.broadcast_to(zeros, shape)),
        )

    def refit(self, index: int, values: Array) -> None:
        """Choose the scales of one group anew for the given values (rows, group), in place."""
        scales, zero_points = choose_qparams(values, self.spec, global_scale=self.global_scale)
        self.scales[:, index] = scales[:, 0]
        if self.zero_points is not None:
            self.zero_points[:, index] = zero_points[:, 0]

    def encode(self, values: Array) -> QuantizedTensor:
        """Round ``values`` (rows, d), in the order of the weight's own columns."""
        return quantize(
            values, self.spec, self.scales, self.zero_points, global_scale=self.global_scale
        )
