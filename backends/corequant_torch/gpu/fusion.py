"""Permute, sign, rotate and quantize in one Triton kernel, in one pass over memory.

NumPy's operations run in NumPy's order: butterflies, true division, exponents from bits. A tile is
R runs of T columns; groups and blocks lie within a run.

Bit-exact twin: `corequant._cpu.codegen.row_kernels`, `corequant._cpu.loops.group_passes`,
`corequant._cpu.loops.scales`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from corequant._cpu.grids import rule_for
from corequant.formats import FormatKind
from corequant.hadamard import hadamard_factors
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleSearch
from corequant_torch.device.graphs import all_good
from corequant_torch.device.scales import global_scale_for
from corequant_torch.gpu.rotation import (
    KINDS,
    LARGEST_TILE,
    TILE,
    butterflies,
    narrowed,
    power_of_two,
)
from corequant_torch.gpu.runtime import interpreted, on_device

__all__ = ["CODES", "NOTHING", "PACKED", "VALUES", "Fused", "fused", "rotate_quantize_tiles"]

Tensor = torch.Tensor

_FLOAT32 = np.dtype(np.float32)
_INFINITY = 0x7F800000
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it leaves no place for a fraction

NOTHING, CODES, PACKED, VALUES = 0, 1, 2, 3
"""Outputs of the fused kernel."""


@lru_cache(maxsize=256)
def _scheme(spec: QuantSpec) -> dict[str, Any] | None:
    """Return the fused kernel's constants of a spec, or None if it isn't supported."""
    form, rule = spec.format, rule_for(spec, _FLOAT32)
    whole = form.kind is FormatKind.INTEGER
    known = (whole and form.signed and not form.fraction_bits) or form.name == "float4_e2m1fn"
    if (
        not known
        or spec.granularity is Granularity.TENSOR
        or spec.scale_search is not ScaleSearch.ABSMAX
        or spec.scale_format in (ScaleFormat.FLOAT16, ScaleFormat.BFLOAT16)
    ):
        return None
    power = rule.power
    kind = 2 if power else 3 if rule.rounder else 0 if spec.symmetric else 1
    return {
        "SCALE": kind,
        "STEPS": float(rule.steps),
        "TOP": float(rule.huge / rule.span if spec.symmetric else rule.huge),
        "TINY": float(rule.tiny),
        "IDLE": float(rule.idle),
        "OFFSET": power.offset if power else 0,
        "THRESHOLD": power.threshold if power else 0,
        "LOWEST": power.lowest if power else 0,
        "HIGHEST": power.highest if power else 0,
        "INTEGERS": whole,
        "LEAST": float(rule.least),
        "LEAST_CODE": form.least_code,
        "MOST": float(rule.most),
    }


@dataclass(frozen=True, eq=False)
class Fused:
    """Results of the fused kernel: codes, packed codes or values; flat scales and zero points."""

    out: Tensor
    scales: Tensor
    zeros: Tensor
    global_scale: Tensor | None


def fused(
    x: Tensor,
    block_size: int,
    spec: QuantSpec,
    permutation: Tensor | None,
    signs: Tensor | None,
    kind: int,
    out: Tensor | None = None,
) -> Fused | None:
    """Permute, sign, rotate and quantize; None without a kernel, or if values aren't finite.

    Parameters
    ----------
    x : torch.Tensor (..., d)
    block_size : int
    spec : QuantSpec
    permutation : torch.Tensor (d,), optional
        int64 on the device of ``x``.
    signs : torch.Tensor (d,), optional
        int8 on the device of ``x``.
    kind : int
        ``CODES``, ``PACKED`` or ``VALUES``.
    out : torch.Tensor, optional
        Memory for the result; may be ``x``.
    """
    d = int(x.shape[-1])
    group = spec.group_size or power_of_two(d)
    width = max(block_size, group)
    scheme = _scheme(spec)
    if scheme is None or not _fits(x, block_size, spec, group, width, kind):
        return None
    source = x.contiguous()
    per_row = max(1, d // width)
    tiles = x.numel() // d * per_row
    runs = max(1, TILE // width)
    programs = -(-tiles // runs)
    target = _target(source, spec, kind, out)
    scales = source.new_empty(tiles * (width // group), dtype=torch.float32)
    zeros = torch.zeros_like(scales) if not spec.symmetric else scales
    tops = torch.empty(programs, dtype=torch.int32, device=x.device)

    def run(what: int, divisor: Tensor) -> None:
        with on_device(source):
            rotate_quantize_tiles[(programs,)](
                source,
                source if permutation is None else permutation,
                source if signs is None else signs,
                divisor,
                target,
                scales,
                zeros,
                tops,
                tiles,
                per_row,
                d,
                1 / math.sqrt(block_size),
                R=runs,
                T=width,
                BLOCK=block_size,
                GROUP=group,
                PERMUTED=permutation is not None,
                SIGNED=signs is not None,
                **scheme,
                OUT=what,
                INTERPRETED=interpreted(),
                num_warps=8,
                enable_fp_fusion=False,
            )

    divisor = None
    if spec.granularity is Granularity.TENSOR_GROUP:
        run(NOTHING, scales)
        divisor = global_scale_for(tops.amax().reshape(1).view(torch.float32), spec)
    run(kind, scales if divisor is None else divisor)
    # Checked once, at the end: each check synchronizes with the device.
    if not all_good(tops.amax() < _INFINITY):
        return None
    if out is not None and target is not out:
        target = out.copy_(target)
    return Fused(target, scales, zeros, divisor)


def _fits(x: Tensor, block_size: int, spec: QuantSpec, group: int, width: int, kind: int) -> bool:
    """Return whether the kernel's tiles of ``width`` columns hold whole groups and blocks."""
    d = int(x.shape[-1])
    return (
        x.dtype in KINDS
        and x.numel() > 0
        and hadamard_factors(block_size)[0] == 1
        and power_of_two(group) == group
        and width <= LARGEST_TILE
        and (spec.group_size is None or d % width == 0)
        and (kind != PACKED or (spec.format.bits == 4 and d % 8 == 0))
    )


def _target(source: Tensor, spec: QuantSpec, kind: int, out: Tensor | None) -> Tensor:
    """Return the memory that the kernel writes: ``out`` if it is contiguous and not ``source``."""
    shape, dtype = source.shape, torch.int8 if spec.format.least_code else torch.uint8
    if kind == VALUES:
        dtype = source.dtype
    elif kind == PACKED:
        shape, dtype = torch.Size((*shape[:-1], shape[-1] // 2)), torch.uint8
    # The source is kept: an error must still find its values that aren't finite.
    if out is None or not out.is_contiguous() or out.data_ptr() == source.data_ptr():
        return torch.empty(shape, dtype=dtype, device=source.device)
    return out


@triton.jit
def _field(  # type: ignore[no-untyped-def]
    a,
    largest: tl.constexpr,
    bias: tl.constexpr,
    mantissa: tl.constexpr,
):
    """Return the minifloat code of the magnitude ``a``, and its value.

    As ``corequant._cpu.loops.minifloat_grid``: below the smallest normal number rounding is by a
    sum whose last place is the minifloat's step; above it bits are rounded, and a carry moves the
    exponent.
    """
    origin: tl.constexpr = (127 - bias) << 23
    shift: tl.constexpr = 23 - mantissa
    least_bits: tl.constexpr = (128 - bias) << 23
    magic_bits: tl.constexpr = (128 - bias - mantissa + 23) << 23
    a = tl.minimum(a, largest)
    own = a.to(tl.int32, bitcast=True)
    bits = tl.maximum(own, least_bits) - origin
    field = (bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
    large = ((field << shift) + origin).to(tl.float32, bitcast=True)
    magic = tl.full(a.shape, magic_bits, tl.int32).to(tl.float32, bitcast=True)
    raised = a + magic
    low = own < least_bits
    code = tl.where(low, raised.to(tl.int32, bitcast=True) - magic_bits, field)
    return code, tl.where(low, raised - magic, large)


@triton.jit
def _power_scale(  # type: ignore[no-untyped-def]
    largest,
    offset: tl.constexpr,
    threshold: tl.constexpr,
    lowest: tl.constexpr,
    highest: tl.constexpr,
):
    """Return 2**E of OCP's rules, as ``corequant._cpu.loops.scales.exponent_for``."""
    small = largest < 1.1754943508222875e-38
    scaled = tl.where(small, largest * 8388608.0, largest)
    bits = scaled.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 - offset - tl.where(small, 23, 0)
    exponent += tl.where((bits & 0x7FFFFF) >= threshold, 1, 0)
    exponent = tl.minimum(tl.maximum(exponent, lowest), highest) + 127
    # The smallest E8M0 scale, 2**-127, is a subnormal.
    found = tl.where(exponent > 0, exponent << 23, 1 << 22)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _whole(v):  # type: ignore[no-untyped-def]
    """Round half to even, after clamping beyond the range of any code."""
    return (tl.minimum(tl.maximum(v, -1048576.0), 1048576.0) + _MAGIC) - _MAGIC


@triton.jit
def _group_scales(  # type: ignore[no-untyped-def]
    z,
    tops,
    divisor,
    SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    IDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Return the scales, zero points and steps of groups ``z``, whose largest bits are ``tops``."""
    largest = tops.to(tl.float32, bitcast=True)
    zero = tl.zeros_like(largest)
    unit = zero + 1.0
    if SCALE == 1:
        above = tl.maximum(tl.max(z, 1), 0.0)
        below = tl.maximum(tl.max(-z, 1), 0.0)
        scale = tl.div_rn(above * 0.5 + below * 0.5, unit * STEPS)
        scale = tl.maximum(scale, unit * TINY)
        zero = _whole(tl.div_rn(below, scale) + LEAST)
        zero = tl.minimum(tl.maximum(zero, LEAST), MOST)
        widest = tl.maximum(zero - LEAST, MOST - zero)
        scale = tl.minimum(scale, tl.div_rn(unit * TOP, widest))
        scale = tl.where(largest == 0, unit * IDLE, scale)
        zero = tl.where(largest == 0, 0.0, zero)
    elif SCALE == 2:
        scale = _power_scale(largest, OFFSET, THRESHOLD, LOWEST, HIGHEST)
        scale = tl.where(largest == 0, unit * IDLE, scale)
    else:
        scale = tl.div_rn(largest, unit * STEPS)
        if SCALE == 3:
            whole = tl.load(divisor)
            scale = tl.minimum(scale * whole, unit * TOP)
            _, scale = _field(scale, 448.0, 7, 3)
            scale = tl.where(largest == 0, unit * IDLE, tl.maximum(scale, unit * TINY))
        else:
            scale = tl.maximum(tl.minimum(scale, unit * TOP), unit * TINY)
            scale = tl.where(largest == 0, unit * IDLE, scale)
    # NaN marks them: a replayed graph raises no error.
    infinite = tops >= 0x7F800000
    scale = tl.where(infinite, 0x7FC00000, scale.to(tl.int32, bitcast=True))
    scale = scale.to(tl.float32, bitcast=True)
    step = scale
    if SCALE == 3:
        step = tl.div_rn(scale, unit * whole)
    return scale, zero, step


@triton.jit
def _rounded(  # type: ignore[no-untyped-def]
    z,
    step,
    zero,
    INTEGERS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Return the codes of groups ``z``, and their values."""
    quotient = tl.div_rn(z, tl.broadcast_to(step[:, None], z.shape))
    if INTEGERS:
        code = _whole(quotient) + zero[:, None]
        code = tl.minimum(tl.maximum(code, LEAST), MOST)
        number = (code - zero[:, None]) * step[:, None]
        codes = code.to(tl.int32)
    else:
        negative = quotient.to(tl.int32, bitcast=True) < 0
        codes, number = _field(tl.abs(quotient), 6.0, 1, 1)
        codes = codes | tl.where(negative, 8, 0)
        number = tl.where(negative, -number, number) * step[:, None]
    return codes, number


@triton.jit
def _limited(values, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clamp float32 to the range of a 16-bit dtype; NaN, which clamping would lose, stays."""
    if kind == tl.float16:
        cut = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
        values = tl.where(values == values, cut, values)
    elif kind == tl.bfloat16:
        cut = tl.minimum(tl.maximum(values, -3.3895313892515355e38), 3.3895313892515355e38)
        values = tl.where(values == values, cut, values)
    return values


@triton.jit(do_not_specialize=["tiles", "per_row", "d"])
def rotate_quantize_tiles(  # type: ignore[no-untyped-def]
    x,
    order,
    sign_table,
    divisor,
    out,
    scales,
    zeros,
    largest_bits,
    tiles,
    per_row,
    d,
    factor,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PERMUTED: tl.constexpr,
    SIGNED: tl.constexpr,
    SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    IDLE: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    INTEGERS: tl.constexpr,
    LEAST: tl.constexpr,
    LEAST_CODE: tl.constexpr,
    MOST: tl.constexpr,
    OUT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize runs; ``largest_bits`` gets each program's largest magnitude, as bits.

    Scales and values of a group that isn't finite are NaN.

    SCALE: 0 symmetric floats, 1 asymmetric ones, 2 powers of two, 3 E4M3; the constants after it
    are those of ``corequant._cpu.loops.scales.Rule``. INTEGERS: integers from LEAST to MOST,
    otherwise E2M1. OUT: 0 only the magnitudes, 1 codes, 2 packed nibbles, 3 values.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = program * R + tl.arange(0, R)[:, None]
    row = tile // per_row
    start = (tile % per_row) * T
    column = start + tl.arange(0, T)[None, :]
    inside = (tile < tiles) & (column < d)
    source = column
    if PERMUTED:
        source = tl.load(order + column, mask=inside, other=0).to(tl.int64)
    y = tl.load(x + row * d + source, mask=inside, other=0.0).to(tl.float32)
    if SIGNED:
        y = y * tl.load(sign_table + column, mask=inside, other=1).to(tl.float32)
    y = butterflies(tl.reshape(y, (R * T // BLOCK, BLOCK)), R * T // BLOCK, BLOCK) * factor
    y = narrowed(y, x.dtype.element_ty, INTERPRETED).to(tl.float32)
    z = tl.reshape(y, (R * T // GROUP, GROUP))
    bits = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tops = tl.max(bits, 1)
    tl.store(largest_bits + program, tl.max(tops, 0))
    if OUT > 0:
        scale, zero, step = _group_scales(
            z, tops, divisor, SCALE, STEPS, TOP, TINY, IDLE,
            OFFSET, THRESHOLD, LOWEST, HIGHEST, LEAST, MOST,
        )  # fmt: skip
        group = (program * R * (T // GROUP)) + tl.arange(0, R * T // GROUP)
        known = group < tiles * (T // GROUP)
        tl.store(scales + group, scale, mask=known)
        if SCALE == 1:
            tl.store(zeros + group, zero, mask=known)
        codes, number = _rounded(z, step, zero, INTEGERS, LEAST, MOST)
        if OUT == 1:
            wide = tl.reshape(codes, (R, T))
            tl.store(out + row * d + column, wide.to(out.dtype.element_ty), mask=inside)
        elif OUT == 2:
            # Packed signed integers are offset binary.
            nibbles = codes - LEAST_CODE if INTEGERS else codes
            first, second = tl.split(tl.reshape(nibbles, (R, T // 2, 2)))
            pair = start // 2 + tl.arange(0, T // 2)[None, :]
            held = (tile < tiles) & (pair * 2 < d)
            packed = first | (second << 4)
            tl.store(out + row * (d // 2) + pair, packed.to(tl.uint8), mask=held)
        else:
            wide = _limited(tl.reshape(number, (R, T)), x.dtype.element_ty)
            kept = narrowed(wide, out.dtype.element_ty, INTERPRETED)
            tl.store(out + row * d + column, kept, mask=inside)
