"""Statistics and decoding in Triton: one pass over memory that mixes no channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from corequant.exact import integer_unit
from corequant.formats import FormatKind
from corequant.specs import Granularity, QuantSpec
from corequant_torch.device.grids import table_of
from corequant_torch.device.scales import effective
from corequant_torch.gpu.runtime import on_device

__all__ = ["channel_moments", "decode_groups", "dequantize", "moments"]

Tensor = torch.Tensor

_CHANNELS, _ROWS = 128, 16
_PROGRAMS = 1024
"""Programs that fill a GPU: several per multiprocessor."""

_DECODED = 2048


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return float64 Σ|x|, Σx² and max|x| of each channel; None if ``x`` is empty or integer."""
    if not x.numel() or not x.is_floating_point():
        return None
    d = int(x.shape[-1])
    source = x.contiguous()
    rows = x.numel() // d
    tiles = -(-d // _CHANNELS)
    wanted = max(1, _PROGRAMS // tiles)
    length = -(-rows // wanted)
    length = -(-length // _ROWS) * _ROWS
    chunks = -(-rows // length)
    parts = torch.empty(chunks, 3, d, dtype=torch.float64, device=x.device)
    with on_device(x):
        channel_moments[(tiles, chunks)](source, parts, rows, d, length, R=_ROWS, C=_CHANNELS)
    return parts[:, 0].sum(0), parts[:, 1].sum(0), parts[:, 2].amax(0)


def dequantize(
    codes: Tensor,
    spec: QuantSpec,
    scales: Tensor,
    zero_points: Tensor | None,
    global_scale: Tensor | None,
) -> Tensor | None:
    """Return the values of codes, in the dtype of the scales; None without a kernel."""
    if not codes.numel() or scales.dtype not in (torch.float32, torch.float64):
        return None
    whole = spec.format.kind is FormatKind.INTEGER
    size = codes.numel() if spec.granularity is Granularity.TENSOR else 0
    size = size or spec.group_size or int(codes.shape[-1])
    steps = effective(scales.detach().reshape(-1), global_scale)
    if whole:
        steps = steps * integer_unit(spec.format)
    steps = steps.contiguous()
    zeros = steps if zero_points is None else zero_points.reshape(-1).to(steps.dtype)
    source = codes.contiguous()
    out = torch.empty(source.shape, dtype=scales.dtype, device=codes.device)
    table = steps if whole else table_of(spec.format, scales.dtype, codes.device)
    with on_device(codes):
        decode_groups[(-(-codes.numel() // _DECODED),)](
            source,
            steps,
            zeros,
            table,
            out,
            codes.numel(),
            size,
            WHOLE=whole,
            SHIFTED=zero_points is not None,
            N=_DECODED,
            enable_fp_fusion=False,
        )
    return out


@triton.jit(do_not_specialize=["rows", "d", "length"])
def channel_moments(  # type: ignore[no-untyped-def]
    x,
    parts,
    rows,
    d,
    length,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Write Σ|x|, Σx² and max|x| of C channels over ``length`` rows to ``parts`` (programs, 3, d).

    Sums are float64, where squares of float32 neither overflow nor round.
    """
    channel = tl.program_id(0) * C + tl.arange(0, C)
    chunk = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((R, C), tl.float64)
    squares = tl.zeros((R, C), tl.float64)
    tops = tl.zeros((R, C), tl.float64)
    for first in range(0, length, R):
        row = chunk * length + first + tl.arange(0, R)
        inside = (row < rows)[:, None] & (channel < d)[None, :]
        v = tl.load(x + row[:, None] * d + channel[None, :], mask=inside, other=0.0)
        if x.dtype.element_ty != tl.float64:
            v = v.to(tl.float32)
        size = tl.abs(v).to(tl.float64)
        sums += size
        squares += size * size
        tops = tl.maximum(tops, size)
    at = parts + chunk * 3 * d + channel
    tl.store(at, tl.sum(sums, 0), mask=channel < d)
    tl.store(at + d, tl.sum(squares, 0), mask=channel < d)
    tl.store(at + 2 * d, tl.max(tops, 0), mask=channel < d)


@triton.jit(do_not_specialize=["count", "size"])
def decode_groups(  # type: ignore[no-untyped-def]
    codes,
    steps,
    zeros,
    table,
    out,
    count,
    size,
    WHOLE: tl.constexpr,
    SHIFTED: tl.constexpr,
    N: tl.constexpr,
):
    """Write the values of codes; each run of ``size`` codes has its own step.

    WHOLE: integers, with zero points if SHIFTED; otherwise ``table`` holds the value of each byte.
    """
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = at < count
    group = at // size
    code = tl.load(codes + at, mask=inside, other=0)
    step = tl.load(steps + group, mask=inside, other=1.0)
    if WHOLE:
        number = code.to(out.dtype.element_ty)
        if SHIFTED:
            number = number - tl.load(zeros + group, mask=inside, other=0.0)
    else:
        number = tl.load(table + (code.to(tl.int32) & 255), mask=inside, other=0.0)
    tl.store(out + at, number * step, mask=inside)
