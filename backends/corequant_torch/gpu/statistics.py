"""Launch of the Triton kernels for statistics and decoding."""

from __future__ import annotations

import torch

from corequant.exact import integer_unit
from corequant.formats import FormatKind
from corequant.specs import Granularity, QuantSpec
from corequant_torch.device.grids import table_of
from corequant_torch.device.scales import effective
from corequant_torch.gpu.runtime import on_device

__all__ = ["dequantize", "moments"]

Tensor = torch.Tensor

_CHANNELS, _ROWS = 128, 16
_PROGRAMS = 1024
"""Programs that fill a GPU: some for each of its processors."""

_DECODED = 2048


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return float64 Σ|x|, Σx² and max|x| of each channel; None for nothing to look at."""
    from corequant_torch.gpu.statistics_kernels import channel_moments

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
    """Return what codes stand for, in the dtype of the scales; None where no kernel fits."""
    from corequant_torch.gpu.statistics_kernels import decode_groups

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
