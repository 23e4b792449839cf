"""Choice and launch of the Triton kernels; None where there is none for the case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from corequant._grids import rule_for
from corequant._numba.scales import POWER, ROUNDED
from corequant.formats import FormatKind
from corequant.hadamard import hadamard_factors, hadamard_matrix
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleSearch
from corequant_torch.runtime import all_good, interpreted, on_device

__all__ = ["Fused", "fused", "power_of_two", "rotate"]

Tensor = torch.Tensor

_FLOAT32 = np.dtype(np.float32)
_KINDS = (torch.float16, torch.bfloat16, torch.float32)
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_INFINITY = 0x7F800000
_TILE = 4096
_LARGEST_TILE = 32768

NOTHING, CODES, PACKED, VALUES = 0, 1, 2, 3
"""What the fused kernel writes."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two from ``n`` on."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=512)
def _shape(block_size: int) -> tuple[int, int, int, int] | None:
    """Return K, L, A and B of ``rotate_blocks``."""
    core, power = hadamard_factors(block_size)
    if power < 16 or power > 16384 or core > 64:
        return None
    a, b = 1, power
    if power > 128:
        a = 1 << ((power.bit_length() - 1) // 2)
        b = power // a
    lead = max(16, power_of_two(core)) if core > 1 else max(1, _TILE // power)
    if a == 1:
        lead = max(lead, 16)
    return (core, lead, a, b) if lead * power <= _LARGEST_TILE else None


@lru_cache(maxsize=64)
def _core_table(order: int, inverse: bool, device: torch.device) -> Tensor:
    matrix = hadamard_matrix(order)
    # The kernel multiplies from the right.
    # A copy in C order: the kernel reads memory, and the matrix itself is read-only.
    turned = np.array(matrix.T if inverse else matrix, np.int8, order="C")
    return torch.from_numpy(turned).to(device)


@cache
def _rotation_kernel() -> Any:
    from corequant_torch.triton_rotation import configurations, rotate_blocks

    if interpreted():
        return rotate_blocks
    import triton

    key = ["K", "L", "A", "B", "FIRST"]
    return triton.autotune(configurations(), key=key, cache_results=True)(rotate_blocks)


def rotate(
    x: Tensor, block_size: int, inverse: bool, signs: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Rotate blocks of the last axis; None where no kernel fits."""
    shape = _shape(block_size)
    if shape is None or x.dtype not in _KINDS or not x.numel():
        return None
    source = x.contiguous()
    direct = out is not None and out.is_contiguous()
    target = out if out is not None and direct else torch.empty_like(source)
    core, lead, a, b = shape
    blocks = x.numel() // block_size
    programs = blocks if core > 1 else -(-blocks // lead)
    table = source if core == 1 else _core_table(core, inverse, x.device)
    with on_device(x):
        _rotation_kernel()[(programs,)](
            source,
            target,
            source if signs is None else signs,
            table,
            blocks,
            x.shape[-1] // block_size,
            1 / math.sqrt(block_size),
            K=core,
            L=lead,
            A=a,
            B=b,
            SIGNS=0 if signs is None else (2 if inverse else 1),
            FIRST=_PARTS[x.dtype],
            LATER=3 if x.dtype == torch.float32 else 2,
            INTERPRETED=interpreted(),
        )
    return target if out is None or direct else out.copy_(target)


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
        or x.dtype not in _KINDS
        or not x.numel()
        or hadamard_factors(block_size)[0] > 1
        or power_of_two(group) != group
        or width > _LARGEST_TILE
        or (spec.group_size is not None and d % width)
        or (kind == PACKED and not packs)
    ):
        return None
    source = x.contiguous()
    per_row = max(1, d // width)
    tiles = x.numel() // d * per_row
    runs = max(1, _TILE // width)
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

    def run(what: int, divisor: Tensor) -> bool:
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
        return all_good(tops.amax() < _INFINITY)

    divisor = None
    if spec.granularity is Granularity.TENSOR_GROUP:
        from corequant_torch.plain_scales import global_scale_for

        if not run(NOTHING, scales):
            return None
        divisor = global_scale_for(tops.amax().reshape(1).view(torch.float32), spec)
    if not run(kind, scales if divisor is None else divisor):
        return None
    if out is not None and target is not out:
        target = out.copy_(target)
    return Fused(target, scales, zeros, divisor)


def _launch(programs: int, *tensors: Any, **constants: Any) -> None:
    from corequant_torch.triton_fused import rotate_quantize_tiles

    options = {} if interpreted() else {"num_warps": 8, "enable_fp_fusion": False}
    with on_device(tensors[0]):
        rotate_quantize_tiles[(programs,)](*tensors, **constants, **options)
