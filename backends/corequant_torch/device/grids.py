"""Rounding to formats as torch operations, for any device: NumPy's operations in NumPy's order.

Divisors are always tensors on the device: CUDA divides by a host number by multiplying with its
reciprocal, which rounds twice.

Bit-exact twin: `corequant._cpu.grids`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant._cpu.grids import codebook_thresholds, rounder_for
from corequant._cpu.loops.minifloat_grid import Rounder
from corequant.formats import FormatKind, NumberFormat
from corequant_torch.device.tables import kept_table

__all__ = ["Grid", "encode_powers", "integers_of", "nearest_value", "numpy_dtype", "table_of"]

Tensor = torch.Tensor


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's name of the working dtype: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == torch.float64 else np.float32)


def integers_of(x: Tensor) -> Tensor:
    """Return the bits of float32 or float64 as integers."""
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def _split(v: Tensor, r: Rounder) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clamped magnitude, its rounded field and whether it is subnormal."""
    a = v.abs().clamp(max=float(r.largest))
    bits = integers_of(a.clamp(min=float(r.least_normal))) - int(r.origin)
    shift = int(r.shift)
    field = (bits + int(r.half) + ((bits >> shift) & 1)) >> shift
    return a, field, a < float(r.least_normal)


def nearest_value(v: Tensor, r: Rounder) -> Tensor:
    """Return the minifloat values nearest to ``v``, ties to the even code."""
    a, field, low = _split(v, r)
    large = ((field << int(r.shift)) + int(r.origin)).view(v.dtype)
    small = (a + float(r.magic)) - float(r.magic)
    return torch.copysign(torch.where(low, small, large), v) + float(r.plus)


def nearest_code(v: Tensor, r: Rounder) -> Tensor:
    """Return the minifloat codes nearest to ``v``, as uint8."""
    a, field, low = _split(v, r)
    small = integers_of(a + float(r.magic)) - int(r.magic_bits)
    code = torch.where(low, small, field)
    sign = torch.signbit(v)
    if not r.keep:
        sign = sign & (code > 0)
    return (code + sign * int(r.sign_bit)).to(torch.uint8)


def table_of(form: NumberFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value of each of the 256 bytes, NaN for those that are not codes."""

    def make() -> npt.NDArray[Any]:
        table = np.full(256, np.nan, numpy_dtype(dtype))
        table[: len(form.values)] = form.values
        return table

    return kept_table(("values", form, dtype), device, make)


def _thresholds(form: NumberFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    make = partial(codebook_thresholds, form.table, numpy_dtype(dtype))
    return kept_table(("thresholds", form, dtype), device, make)


class Grid:
    """The grid of a format: panels are (groups, size), steps and zero points (groups, 1)."""

    def __init__(self, form: NumberFormat, dtype: torch.dtype, device: torch.device) -> None:
        self.form, self.dtype, self.device = form, dtype, device
        self._whole = form.kind is FormatKind.INTEGER
        self._float = form.kind is FormatKind.FLOAT
        self._rounder = rounder_for(form, numpy_dtype(dtype)) if self._float else None
        self._unit = math.ldexp(1.0, -form.fraction_bits)

    def _step(self, steps: Tensor) -> Tensor:
        return steps * self._unit if self._whole and self._unit != 1 else steps

    def _integers(self, panel: Tensor, step: Tensor, zeros: Tensor) -> Tensor:
        code = torch.round(panel / step) + zeros
        return code.clamp(self.form.least_code, self.form.most_code)

    def _indices(self, panel: Tensor, steps: Tensor) -> Tensor:
        limits = _thresholds(self.form, self.dtype, self.device)
        return torch.bucketize((panel / steps).contiguous(), limits, right=True)

    def encode(self, panel: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """Return the codes of a panel."""
        if self._whole:
            kind = torch.int8 if self.form.signed else torch.uint8
            return self._integers(panel, self._step(steps), zeros).to(kind)
        if self._rounder is not None:
            return nearest_code(panel / steps, self._rounder)
        return self._indices(panel, steps).to(torch.uint8)

    def fake(self, panel: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """Return a panel quantized and dequantized."""
        if self._whole:
            step = self._step(steps)
            return (self._integers(panel, step, zeros) - zeros) * step
        if self._rounder is not None:
            return nearest_value(panel / steps, self._rounder) * steps
        table = table_of(self.form, self.dtype, self.device)
        return table[self._indices(panel, steps)] * steps

    def decode(self, codes: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """Return the values of codes."""
        if self._whole:
            return (codes.to(self.dtype) - zeros) * self._step(steps)
        return table_of(self.form, self.dtype, self.device)[codes.int()] * steps

    def losses(self, panel: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """Return the squared errors of trial steps (groups, trials), summed in NumPy's order."""
        size = panel.shape[1]
        width = 1 if not (self._whole or self._float) else _lanes(size)
        found = torch.empty(steps.shape, dtype=torch.float64, device=panel.device)
        for k in range(steps.shape[1]):
            error = panel - self.fake(panel, steps[:, k, None], zeros[:, k, None])
            squares = error.double().square().reshape(len(panel), size // width, width)
            lanes = squares[:, 0]
            for i in range(1, size // width):
                lanes = lanes + squares[:, i]
            total = lanes[:, 0]
            for j in range(1, width):
                total = total + lanes[:, j]
            found[:, k] = total
        return found


def _lanes(size: int) -> int:
    from corequant._cpu.grids import LOSS_LANES

    return math.gcd(size, LOSS_LANES) if size > LOSS_LANES else size


def encode_powers(x: Tensor, form: NumberFormat) -> Tensor:
    """Return the codes of the nearest powers of two, ties upward."""
    wide = x.double()
    mantissa, exponent = torch.frexp(wide)
    codes = exponent - 1 + (mantissa >= 0.75) + form.bias
    codes = torch.where(wide > 0, codes.clamp(0, form.magnitudes - 1), 0)
    return codes.to(torch.uint8)
