"""Kernels for tensors of any device: Triton's where it is installed, else torch operations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant._cpu.grids import rule_for
from corequant.errors import NonFiniteError
from corequant.formats import FormatKind, NumberFormat
from corequant.protocols import Moments, Quantized
from corequant.specs import Granularity, QuantSpec, qparams_shape
from corequant_torch.device import rotation
from corequant_torch.device.grams import token_products
from corequant_torch.device.graphs import all_good
from corequant_torch.device.grids import Grid, encode_powers, numpy_dtype, table_of
from corequant_torch.device.rotation import working
from corequant_torch.device.scales import choose, effective, global_scale_for, ranges
from corequant_torch.device.tables import device_table
from corequant_torch.gpu.runtime import has_triton

__all__ = ["DeviceKernels"]

Tensor = torch.Tensor
Signs = npt.NDArray[np.int8] | None
Permutation = npt.NDArray[np.int64] | None


class DeviceKernels:
    """Kernels for tensors that are not on the CPU; on the CPU they are correct, but slower.

    Codes, scales and rotated values are bit-exact with NumPy's, with and without Triton; the sums
    of ``moments`` and ``add_gram`` may be rounded differently.

    Parameters
    ----------
    triton : bool, optional
        Whether to use Triton's kernels; by default on CUDA where Triton is installed.
    """

    name = "torch"

    def __init__(self, triton: bool | None = None) -> None:
        self._wanted = triton

    def _triton(self, x: Tensor) -> bool:
        """Return whether to use Triton's kernels."""
        if self._wanted is not None:
            return self._wanted
        return x.is_cuda and has_triton()

    def describe(self) -> dict[str, str]:
        """Return torch's version."""
        return {"torch": torch.__version__}

    def first_nonfinite(self, x: Tensor) -> tuple[int, tuple[int, ...], float] | None:
        """Return the count of NaN and Inf in ``x``, the first index and its value, or None."""
        good = x.isfinite()
        if all_good(good.all()):
            return None
        flat = torch.nonzero(~good.flatten())[:, 0]
        index = tuple(int(i) for i in np.unravel_index(int(flat[0]), tuple(x.shape)))
        return len(flat), index, float(x[index])

    def block_hadamard(
        self,
        x: Tensor,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Tensor:
        """Rotate blocks of one axis."""
        table = device_table(signs, x)
        if axis == x.ndim - 1 and self._triton(x):
            from corequant_torch.gpu.rotation import rotate

            turned = rotate(x.detach(), block_size, inverse, table, out)
            if turned is not None:
                return turned
        y = rotation.rotate(x.detach(), block_size, axis, inverse, table)
        return y if out is None else out.copy_(y)

    def rotate_quantize(
        self,
        x: Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Quantized | None:
        """Return codes, scales, zero points and a global scale; None without a fused kernel."""
        if not self._triton(x):
            return None
        from corequant_torch.gpu import fusion

        tables = device_table(permutation, x), device_table(signs, x)
        found = fusion.fused(x.detach(), block_size, spec, *tables, fusion.CODES, out)
        if found is None:
            return None
        shape = qparams_shape(tuple(x.shape), spec)
        scales = found.scales.reshape(shape)
        return found.out, scales, _stored(found.zeros, spec, shape), found.global_scale

    def rotate_fake_quantize(
        self,
        x: Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Tensor | None:
        """Return the dequantized codes; None without a fused kernel."""
        if not self._triton(x):
            return None
        from corequant_torch.gpu import fusion

        tables = device_table(permutation, x), device_table(signs, x)
        found = fusion.fused(x.detach(), block_size, spec, *tables, fusion.VALUES, out)
        return None if found is None else found.out

    def token_normalize(self, x: Tensor) -> Tensor:
        """Return rows scaled to mean square 1; zero rows are unchanged."""
        return rotation.token_normalize(x.detach())

    def moments(self, x: Tensor) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        x = x.detach()
        found = None
        if self._triton(x):
            from corequant_torch.gpu import statistics

            found = statistics.moments(x)
        if found is None:
            found = rotation.moments(x)
        a, b, c = torch.stack(found).cpu().numpy()
        return a, b, c

    def add_gram(
        self, total: Any, x: Tensor, other: Tensor | None = None, *, double: bool = False
    ) -> Any:
        """Return ``total`` + XᵀY (d, d) of the rows of ``x`` and ``other``, or of ``x`` alone."""
        product = token_products(x, other, double)
        if total is None:
            return product
        if isinstance(total, np.ndarray):
            total = torch.from_numpy(total)
        summed = total.to(x.device)
        summed += product
        return summed

    def encode(self, x: Tensor, form: NumberFormat) -> Tensor:
        """Return the codes nearest to a finite ``x``, unscaled."""
        x = x.detach()
        if form.kind is FormatKind.POWER:
            return encode_powers(x, form)
        flat = working(x).reshape(1, -1)
        one = flat.new_ones(1, 1)
        grid = Grid(form, flat.dtype, flat.device)
        return grid.encode(flat, one, torch.zeros_like(one)).reshape(x.shape)

    def decode(self, codes: Tensor, form: NumberFormat) -> Tensor:
        """Return the values of codes, unscaled, float32."""
        bits = codes.view(torch.uint8).int() & (2**form.bits - 1)
        return table_of(form, torch.float32, codes.device)[bits]

    def choose_global_scale(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Return the global scale, by which all scales are divided, float32 (1,)."""
        self._refuse_nonfinite(x.detach())
        return _global_scale(working(x.detach()), spec, False)

    def choose_qparams(
        self, x: Tensor, spec: QuantSpec, global_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points in the shape of ``spec``."""
        _, scales, zeros, _ = self._chosen(x.detach(), spec, global_scale, False)
        shape = qparams_shape(tuple(x.shape), spec)
        return scales.reshape(shape), _stored(zeros, spec, shape)

    def quantize(
        self,
        x: Tensor,
        spec: QuantSpec,
        scales: Tensor | None = None,
        zero_points: Tensor | None = None,
        global_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the codes of ``x``, scales and zero points."""
        x = x.detach()
        shape = qparams_shape(tuple(x.shape), spec)
        if scales is None:
            panel, flat, zeros, divisor = self._chosen(x, spec, global_scale, False)
            scales, zero_points = flat.reshape(shape), _stored(zeros, spec, shape)
        else:
            panel = _panel(x, spec)
            self._refuse_nonfinite(x)
            divisor = global_scale
            flat, zeros = _flat(scales, zero_points, panel)
        grid = Grid(spec.format, panel.dtype, panel.device)
        steps = effective(flat, divisor)
        codes = grid.encode(panel, steps[: len(panel), None], zeros[: len(panel), None])
        if zero_points is not None:
            zero_points = zero_points.to(codes.dtype)
        return codes.reshape(x.shape), scales, zero_points

    def dequantize(
        self,
        codes: Tensor,
        spec: QuantSpec,
        scales: Tensor,
        zero_points: Tensor | None = None,
        global_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the values of codes, in the dtype of the scales."""
        if self._triton(codes):
            from corequant_torch.gpu import statistics

            found = statistics.dequantize(codes, spec, scales, zero_points, global_scale)
            if found is not None:
                return found
        panel = codes.reshape(-1, _size(codes, spec)) if codes.numel() else codes.reshape(0, 1)
        flat = scales.reshape(-1)
        zeros = torch.zeros_like(flat)
        if zero_points is not None:
            zeros = zero_points.reshape(-1).to(flat.dtype)
        grid = Grid(spec.format, flat.dtype, flat.device)
        steps = effective(flat, global_scale)[: len(panel), None]
        return grid.decode(panel, steps, zeros[: len(panel), None]).reshape(codes.shape)

    def fake_quantize(
        self,
        x: Tensor,
        spec: QuantSpec,
        global_scale: Tensor | None = None,
        *,
        out: Tensor | None = None,
        propagate: bool = False,
    ) -> Tensor:
        """Return ``x`` quantized and dequantized with scales chosen from it, in its dtype."""
        source = x.detach()
        if not propagate and global_scale is None and self._triton(x):
            from corequant_torch.gpu import fusion

            found = fusion.fused(source, 1, spec, None, None, fusion.VALUES, out)
            if found is not None:
                return found.out
        panel, flat, zeros, divisor = self._chosen(source, spec, global_scale, propagate)
        grid = Grid(spec.format, panel.dtype, panel.device)
        steps, zeros = effective(flat, divisor)[: len(panel), None], zeros[: len(panel), None]
        if propagate:
            good = panel.isfinite()
            rounded = grid.fake(torch.where(good, panel, 0), steps, zeros)
            rounded = torch.where(good, rounded, panel)
        else:
            rounded = grid.fake(panel, steps, zeros)
        if x.dtype.itemsize == 2:
            top = torch.finfo(x.dtype).max
            rounded = torch.where(rounded.isfinite(), rounded.clamp(-top, top), rounded)
        y = rounded.reshape(x.shape).to(x.dtype)
        return y if out is None else out.copy_(y)

    def round_columns(self, method: str, **arguments: Any) -> Any:
        """Round a weight on its device; see ``corequant.protocols.ColumnSolver``."""
        from corequant_torch.rounding import methods
        from corequant_torch.rounding.fitting import fit_scales
        from corequant_torch.rounding.learned import learned_rounding
        from corequant_torch.rounding.magr import magr

        others = (
            methods.round_to_nearest,
            methods.reconstruction_loss,
            learned_rounding,
            magr,
            fit_scales,
        )
        for function in others:
            if method == function.__name__:
                return function(self, **arguments)
        return methods.round_columns(self, self._triton(arguments["W"]), method, **arguments)

    def _chosen(
        self, x: Tensor, spec: QuantSpec, global_scale: Tensor | None, propagate: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the panel (groups, size), flat scales and zero points, and the global scale."""
        panel = _panel(x, spec)
        if not propagate:
            self._refuse_nonfinite(x)
        if not panel.numel():
            count = math.prod(qparams_shape(tuple(x.shape), spec))
            idle = float(rule_for(spec, numpy_dtype(panel.dtype)).idle)
            return panel, panel.new_full((count,), idle), panel.new_zeros(count), global_scale
        if spec.granularity is Granularity.TENSOR_GROUP and global_scale is None:
            global_scale = _global_scale(panel, spec, propagate)
        low, high = ranges(panel, spec.symmetric and spec.format.minimum < 0, propagate)
        scales, zeros = choose(panel, low, high, spec, global_scale, propagate)
        return panel, scales, zeros, global_scale

    def _refuse_nonfinite(self, x: Tensor) -> None:
        bad = self.first_nonfinite(x)
        if bad is not None:
            raise NonFiniteError("x", *bad)


def _size(x: Tensor, spec: QuantSpec) -> int:
    if spec.granularity is Granularity.TENSOR:
        return x.numel()
    return spec.group_size or int(x.shape[-1])


def _panel(x: Tensor, spec: QuantSpec) -> Tensor:
    return working(x).reshape(-1, _size(x, spec)) if x.numel() else working(x).reshape(0, 1)


def _flat(scales: Tensor, zero_points: Tensor | None, panel: Tensor) -> tuple[Tensor, Tensor]:
    flat = scales.reshape(-1).to(panel.dtype)
    if zero_points is None:
        return flat, torch.zeros_like(flat)
    return flat, zero_points.reshape(-1).to(panel.dtype)


def _stored(zeros: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor | None:
    if spec.symmetric:
        return None
    return zeros.to(torch.int8 if spec.format.signed else torch.uint8).reshape(shape)


def _global_scale(x: Tensor, spec: QuantSpec, skip: bool) -> Tensor:
    if not x.numel():
        return torch.ones(1, device=x.device)
    whole = x.reshape(1, -1)
    low, high = ranges(whole, spec.symmetric and spec.format.minimum < 0, skip)
    return global_scale_for(torch.maximum(-low, high), spec)
