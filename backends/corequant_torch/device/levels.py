"""Scales and grid of the column loop, on tensors of any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from corequant._validation import check_divides
from corequant.formats import FormatKind
from corequant.protocols import Backend
from corequant.quantization import QuantizedTensor, check_global, check_qparams
from corequant.rounding.loop import column_grid
from corequant.specs import Granularity, QuantSpec
from corequant_torch.device.grids import numpy_dtype
from corequant_torch.device.scales import effective

__all__ = ["Levels", "TensorScales"]

Tensor = torch.Tensor


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
            steps = steps * math.ldexp(1.0, -self.spec.format.fraction_bits)
        zeros = torch.zeros_like(steps) if self.zero_points is None else self.zero_points.to(dtype)
        shape = (rows, steps.shape[1])
        return steps.expand(shape).contiguous(), zeros.expand(shape).contiguous()

    def refit(self, index: int, values: Tensor) -> None:
        """Replace the scales of one group by those of the given values (rows, group)."""
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
