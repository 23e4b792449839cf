"""The column loop that GPTQ, GPFQ and Qronos share, on tensors of any device.

Columns are kept in reverse order of their rounding, as in ``corequant.rounding``. Of a block of
columns, products bring in what was rounded before; within it one column follows the other for all
rows at once: in Triton where it runs and is float32, otherwise in torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant._validation import check_divides
from corequant.errors import NonFiniteError
from corequant.exact import integer_unit
from corequant.formats import FormatKind
from corequant.protocols import Backend
from corequant.quantization import QuantizedTensor, check_global, check_qparams
from corequant.rounding.accumulators import ensure_certified
from corequant.rounding.columns import column_grid
from corequant.rounding.loop import BLOCK
from corequant.specs import Granularity, QuantSpec
from corequant_torch.device.grids import numpy_dtype
from corequant_torch.device.scales import effective
from corequant_torch.rounding.bounds import Tiles

__all__ = ["ColumnLoop", "Levels", "Pull", "TensorScales"]

Tensor = torch.Tensor

_WIDEST = 256
"""Columns of a block that Triton's kernel holds in registers."""

Pull = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""As ``corequant.rounding.loop.Pull``."""


@dataclass(frozen=True, eq=False)
class TensorScales:
    """Scales of a weight (rows, d): one for each row and each run of ``group`` columns."""

    kernels: Backend
    spec: QuantSpec
    scales: Tensor
    zero_points: Tensor | None
    global_scale: Tensor | None
    group: int

    @classmethod
    def choose(
        cls, kernels: Backend, W: Tensor, spec: QuantSpec, scales: Any, zeros: Any, divisor: Any
    ) -> TensorScales:
        """Choose scales for W by the spec's search, or check those that are given."""
        if spec.group_size is not None:
            check_divides("group_size", spec.group_size, W.shape[1])
        group = spec.group_size or W.shape[1]
        whole = spec.granularity is Granularity.TENSOR_GROUP
        if scales is None:
            if zeros is not None:
                raise ValueError("zero_points must come with scales, got zero_points alone")
            divisor = check_global(spec, divisor)
            if whole and divisor is None:
                divisor = kernels.choose_global_scale(W, spec)
            scales, zeros = kernels.choose_qparams(W, spec, divisor)
            return cls(kernels, spec, scales, zeros, divisor, group)
        scales, zeros = check_qparams(tuple(W.shape), spec, scales, zeros)
        divisor = check_global(spec, divisor)
        if whole and divisor is None:
            raise ValueError("global_scale must come with scales, got scales alone")
        kept = None if zeros is None else zeros.detach().clone()
        return cls(kernels, spec, scales.detach().clone(), kept, divisor, group)

    def steps(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what codes are multiplied by, and zero points, (rows, groups) of ``dtype``."""
        steps = effective(self.scales, self.global_scale).to(dtype)
        if self.spec.format.kind is FormatKind.INTEGER:
            steps = steps * integer_unit(self.spec.format)
        zeros = torch.zeros_like(steps) if self.zero_points is None else self.zero_points.to(dtype)
        shape = (rows, steps.shape[1])
        return steps.expand(shape).contiguous(), zeros.expand(shape).contiguous()

    def refit(self, index: int, values: Tensor) -> None:
        """Choose the scales of one group anew for the given values (rows, group), in place."""
        scales, zeros = self.kernels.choose_qparams(values, self.spec, self.global_scale)
        self.scales[:, index] = scales[:, 0]
        if self.zero_points is not None and zeros is not None:
            self.zero_points[:, index] = zeros[:, 0]

    def encode(self, values: Tensor) -> QuantizedTensor:
        """Round ``values`` (rows, d), in the order of the weight's own columns."""
        given = self.scales, self.zero_points, self.global_scale
        codes, scales, zeros = self.kernels.quantize(values, self.spec, *given)
        return QuantizedTensor(codes, scales, zeros, self.spec, self.global_scale)


class Levels:
    """The numbers of a format in units of a step, as constants of the column loop."""

    def __init__(self, spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> None:
        grid = column_grid(spec.format, numpy_dtype(dtype))
        self.whole = spec.format.kind is FormatKind.INTEGER
        self.least, self.most = float(grid.least), float(grid.most)
        self.thresholds = torch.from_numpy(grid.thresholds).to(device)
        self.table = torch.from_numpy(grid.table).to(device)

    def nearest(self, v: Tensor, zero: Tensor) -> Tensor:
        """Return the numbers nearest to ``v``; those of integers are shifted by ``zero``."""
        if self.whole:
            return (torch.round(v) + zero).clamp(self.least, self.most) - zero
        return self.table[torch.bucketize(v.contiguous(), self.thresholds, right=True)]


@dataclass(frozen=True, eq=False)
class ColumnLoop:
    """Everything that a method needs besides its matrices; see ``corequant.rounding.loop``."""

    order: npt.NDArray[np.int64]
    scales: TensorScales
    refit: bool
    tiles: Tiles | None
    dtype: torch.dtype
    name: str
    triton: bool
    levels: Levels = field(init=False)
    groups: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Bring the grid and the columns' groups to the device."""
        device = self.scales.scales.device
        groups = torch.from_numpy((self.order // self.scales.group).astype(np.int32)).to(device)
        object.__setattr__(self, "levels", Levels(self.scales.spec, self.dtype, device))
        object.__setattr__(self, "groups", groups)

    def run(
        self, values: Tensor, centers: Tensor, pull: Pull
    ) -> tuple[QuantizedTensor, float | None]:
        """Round ``values`` (rows, d), which may be overwritten, with D = ``centers`` - rounded."""
        # A triangular solve leaves its result in columns.
        values, centers = values.contiguous(), centers.contiguous()
        rows, d = values.shape
        errors = torch.empty_like(values)
        length = self.scales.group if self.refit else BLOCK
        steps, zeros = self.scales.steps(rows, self.dtype)
        for stop in range(d, 0, -length):
            start = max(0, stop - length)
            sums, mixing, echo = pull(start, stop, errors, values)
            if self.refit:
                # What the columns would be if none of them were rounded: no pull is left over.
                # X with X M = sums, M lower triangular.
                shift = torch.linalg.solve_triangular(mixing, sums, upper=False, left=False)
                group = int(self.order[start]) // self.scales.group
                self.scales.refit(group, values[:, start:stop] + shift)
                steps, zeros = self.scales.steps(rows, self.dtype)
            self._block(start, values, centers, sums, mixing, echo, steps, zeros, errors)
        self._check(values)
        back = torch.empty_like(values)
        back[:, torch.from_numpy(self.order.copy()).to(values.device)] = values
        share = None if self.tiles is None else self.tiles.moved_share(rows * d)
        rounded = self.scales.encode(back)
        if self.tiles is not None:
            arrays = (rounded.codes, rounded.scales, rounded.zero_points)
            home = [None if a is None else a.cpu().numpy() for a in arrays]
            at_home = QuantizedTensor(home[0], home[1], home[2], rounded.spec)
            ensure_certified(at_home, self.tiles.accumulator, self.name)
        return rounded, share

    def _block(
        self,
        start: int,
        values: Tensor,
        centers: Tensor,
        sums: Tensor,
        mixing: Tensor,
        echo: Tensor | None,
        steps: Tensor,
        zeros: Tensor,
        errors: Tensor,
    ) -> None:
        size = mixing.shape[0]
        columns = self.order[start : start + size]
        fits = self.dtype == torch.float32 and self.tiles is None and size <= _WIDEST
        if self.triton and fits and values.numel():
            from corequant_torch.gpu.columns import solve_block

            state = (sums, mixing, echo, steps, zeros, self.groups[start : start + size])
            solve_block(start, values, centers, *state, self.levels, errors)
            return
        groups = (columns // self.scales.group).tolist()
        for j in range(size - 1, -1, -1):
            c = start + j
            step, zero = steps[:, groups[j]], zeros[:, groups[j]]
            pulled, argument = sums[:, j], values[:, c]
            # -0.0 stays what it is.
            argument = torch.where(pulled != 0, argument + pulled / mixing[j, j], argument)
            if self.tiles is None:
                level = self.levels.nearest(argument / step, zero)
                error = centers[:, c] - level * step
            else:
                wanted = argument
                argument, level = self.tiles.place(int(columns[j]), wanted, step, zero, self.levels)
                error = centers[:, c] - level * step
                if not self.tiles.diffuse:
                    error = error - (wanted - argument)
            values[:, c], errors[:, c] = argument, error
            sums[:, :j] += error[:, None] * mixing[j, :j]
            if echo is not None:
                sums[:, :j] += argument[:, None] * echo[j, :j]

    def _check(self, values: Tensor) -> None:
        bad = self.scales.kernels.first_nonfinite(values)
        if bad is not None:
            count, (row, place), value = bad
            column = int(self.order[place])
            what = f"W of {self.name}, adjusted for rounding errors,"
            raise NonFiniteError(what, count, (row, column), value)
