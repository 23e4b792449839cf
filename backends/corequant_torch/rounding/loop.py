"""The column loop that GPTQ, GPFQ and Qronos share, on tensors of any device.

Columns are kept in reverse order of their rounding, as in ``corequant.rounding``. Of a block of
columns, products bring in what was rounded before; within it one column follows the other for all
rows at once: in Triton where it runs and is float32, otherwise in torch operations.

Bit-exact twin: `corequant._cpu.loops.columns`, `corequant_torch.gpu.columns`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import NonFiniteError
from corequant.quantization import QuantizedTensor
from corequant.rounding.accumulators import ensure_certified
from corequant.rounding.loop import BLOCK
from corequant_torch.device.levels import Levels, TensorScales
from corequant_torch.rounding.bounds import Tiles

__all__ = ["ColumnLoop", "Pull"]

Tensor = torch.Tensor

_WIDEST = 256
"""Columns of a block that Triton's kernel holds in registers."""

Pull = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""As ``corequant.rounding.loop.Pull``."""


@dataclass(frozen=True, eq=False)
class ColumnLoop:
    """The inputs of a column loop other than the matrices; see ``corequant.rounding.loop``."""

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
            on_host = [None if a is None else a.cpu().numpy() for a in arrays]
            certified = QuantizedTensor(on_host[0], on_host[1], on_host[2], rounded.spec)
            ensure_certified(certified, self.tiles.accumulator, self.name)
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
        fits = self.dtype == torch.float32 and self.tiles is None and size <= _WIDEST
        if self.triton and fits and values.numel():
            from corequant_torch.gpu.columns import solve_block

            state = (sums, mixing, echo, steps, zeros, self.groups[start : start + size])
            solve_block(start, values, centers, *state, self.levels, errors)
            return
        places = self.order[start : start + size]
        groups = (places // self.scales.group).tolist()
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
                argument, level = self.tiles.place(int(places[j]), wanted, step, zero, self.levels)
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
