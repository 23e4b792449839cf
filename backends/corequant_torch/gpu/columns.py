"""Launch of the Triton kernel of the column loop."""

from __future__ import annotations

import torch

from corequant_torch.gpu.rotation import power_of_two
from corequant_torch.gpu.runtime import on_device
from corequant_torch.rounding.levels import Levels

__all__ = ["solve_block"]

Tensor = torch.Tensor

_ROWS = 8
"""Rows of a program: four tiles of 8 × 128 numbers take 32 registers of each of 128 threads."""


def solve_block(
    start: int,
    values: Tensor,
    centers: Tensor,
    sums: Tensor,
    mixing: Tensor,
    echo: Tensor | None,
    steps: Tensor,
    zeros: Tensor,
    groups: Tensor,
    levels: Levels,
    errors: Tensor,
) -> None:
    """Round a block's columns of float32 rows; writes arguments to ``values``, D to ``errors``."""
    from corequant_torch.gpu.column_kernels import round_block

    rows, width = values.shape
    size = len(groups)
    count = len(levels.thresholds)
    with on_device(values):
        round_block[(-(-rows // _ROWS),)](
            values,
            centers,
            sums.contiguous(),
            mixing.contiguous(),
            sums if echo is None else echo.contiguous(),
            steps,
            zeros,
            groups,
            values if levels.whole else levels.thresholds,
            values if levels.whole else levels.table,
            errors,
            rows,
            width,
            start,
            size,
            steps.shape[1],
            count,
            R=_ROWS,
            B=power_of_two(size),
            ECHO=echo is not None,
            WHOLE=levels.whole,
            LEAST=levels.least,
            MOST=levels.most,
            STEPS=count.bit_length(),
            num_warps=4,
            enable_fp_fusion=False,
        )
