"""Choice and launch of the fused Triton kernel; None where there is none for the case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from corequant._cpu.grids import rule_for
from corequant._cpu.loops.scales import POWER, ROUNDED
from corequant.formats import FormatKind
from corequant.hadamard import hadamard_factors
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleSearch
from corequant_torch.gpu.rotation import KINDS, LARGEST_TILE, TILE, power_of_two
from corequant_torch.gpu.runtime import all_good, interpreted, on_device

__all__ = ["CODES", "PACKED", "VALUES", "Fused", "fused"]

Tensor = torch.Tensor

_FLOAT32 = np.dtype(np.float32)
_INFINITY = 0x7F800000

NOTHING, CODES, PACKED, VALUES = 0, 1, 2, 3
"""What the fused kernel writes."""


@lru_cache(maxsize=256)
def _scheme(spec: QuantSpec) -> dict[str, Any] | None:
    """Return the fused kernel's constants of a spec, or None where it has none."""
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
    kind = {POWER: 2, ROUNDED: 3}.get(rule.kind, 0 if spec.symmetric else 1)
    return {
        "SCALE": kind,
        "STEPS": float(rule.steps),
        "TOP": float(rule.huge / rule.span if spec.symmetric else rule.huge),
        "TINY": float(rule.tiny),
        "IDLE": float(rule.idle),
        "OFFSET": rule.offset,
        "THRESHOLD": rule.threshold,
        "LOWEST": rule.lowest,
        "HIGHEST": rule.highest,
        "INTEGERS": whole,
        "LEAST": float(rule.least),
        "LEAST_CODE": form.least_code,
        "MOST": float(rule.most),
    }


@dataclass(frozen=True, eq=False)
class Fused:
    """What the fused kernel wrote: codes, bytes or numbers, flat scales and zero points."""

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
    """Permute, sign, rotate and quantize; None without a kernel or a finite rotated ``x``."""
    scheme, d = _scheme(spec), int(x.shape[-1])
    group = spec.group_size or power_of_two(d)
    width = max(block_size, group)
    packs = spec.format.bits == 4 and d % 8 == 0
    if (
        scheme is None
        or x.dtype not in KINDS
        or not x.numel()
        or hadamard_factors(block_size)[0] > 1
        or power_of_two(group) != group
        or width > LARGEST_TILE
        or (spec.group_size is not None and d % width)
        or (kind == PACKED and not packs)
    ):
        return None
    source = x.contiguous()
    per_row = max(1, d // width)
    tiles = x.numel() // d * per_row
    runs = max(1, TILE // width)
    programs = -(-tiles // runs)
    if kind == VALUES:
        shape, dtype = x.shape, x.dtype
    elif kind == PACKED:
        shape, dtype = torch.Size((*x.shape[:-1], d // 2)), torch.uint8
    else:
        shape, dtype = x.shape, torch.int8 if spec.format.least_code else torch.uint8
    target = (
        out if out is not None and out.is_contiguous() else source.new_empty(shape, dtype=dtype)
    )
    if target.data_ptr() == source.data_ptr():
        # What turns out not to be finite must still be there to be named.
        target = torch.empty_like(source)
    count = tiles * (width // group)
    scales = source.new_empty(count, dtype=torch.float32)
    zeros = torch.zeros_like(scales) if not spec.symmetric else scales
    tops = torch.empty(programs, dtype=torch.int32, device=x.device)

    def run(what: int, divisor: Tensor) -> None:
        _launch(
            programs,
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
        )

    divisor = None
    if spec.granularity is Granularity.TENSOR_GROUP:
        from corequant_torch.device.scales import global_scale_for

        run(NOTHING, scales)
        divisor = global_scale_for(tops.amax().reshape(1).view(torch.float32), spec)
    run(kind, scales if divisor is None else divisor)
    # Asked once, at the end: each question waits for the device.
    if not all_good(tops.amax() < _INFINITY):
        return None
    if out is not None and target is not out:
        target = out.copy_(target)
    return Fused(target, scales, zeros, divisor)


def _launch(programs: int, *tensors: Any, **constants: Any) -> None:
    from corequant_torch.gpu.fusion_kernels import rotate_quantize_tiles

    with on_device(tensors[0]):
        rotate_quantize_tiles[(programs,)](
            *tensors, **constants, num_warps=8, enable_fp_fusion=False
        )
