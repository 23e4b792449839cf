"""The column loop in Triton: a program rounds the columns of one block in turn for a few rows.

Bit-exact twin: `corequant._cpu.loops.columns`, `corequant_torch.rounding.loop`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from corequant_torch.device.levels import Levels
from corequant_torch.gpu.rotation import power_of_two
from corequant_torch.gpu.runtime import on_device

__all__ = ["round_block", "solve_block"]

Tensor = torch.Tensor

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it leaves no place for a fraction

_ROWS = 8
"""Rows per program: four tiles of 8 × 128 numbers take 32 registers of each of 128 threads."""


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
    """Round a block of columns of float32 rows.

    Parameters
    ----------
    start : int
        First column of the block.
    values, centers : torch.Tensor (rows, d)
        Rounding arguments, which are updated in place, and what errors are measured from.
    sums : torch.Tensor (rows, size)
        Sums over the columns rounded before.
    mixing, echo : torch.Tensor (size, size)
        Factors of errors and of arguments; ``echo`` may be None.
    steps, zeros : torch.Tensor (rows, groups)
    groups : torch.Tensor (size,)
        Group of each column, int32.
    levels : Levels
    errors : torch.Tensor (rows, d)
        Rounding errors, written.
    """
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


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    v,
    zero,
    thresholds,
    table,
    count,
    WHOLE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the grid's values nearest to ``v``, by bisection of a table unless WHOLE."""
    if WHOLE:
        # Clamped beyond the range of any code.
        near = tl.minimum(tl.maximum(v, -1048576.0), 1048576.0)
        code = ((near + _MAGIC) - _MAGIC) + zero
        found = tl.minimum(tl.maximum(code, LEAST), MOST) - zero
    else:
        first = tl.zeros(v.shape, tl.int32)
        last = first + count
        for _ in tl.static_range(STEPS):
            middle = (first + last) // 2
            open_ = first < last
            limit = tl.load(thresholds + middle, mask=open_, other=0.0)
            above = open_ & (v >= limit)
            last = tl.where(open_ & (v < limit), middle, last)
            first = tl.where(above, middle + 1, first)
        found = tl.load(table + first)
    return found


@triton.jit(do_not_specialize=["rows", "width", "start", "size", "per_row", "count"])
def round_block(  # type: ignore[no-untyped-def]
    values,
    centers,
    sums,
    mixing,
    echo,
    steps,
    zeros,
    groups,
    thresholds,
    table,
    errors,
    rows,
    width,
    start,
    size,
    per_row,
    count,
    R: tl.constexpr,
    B: tl.constexpr,
    ECHO: tl.constexpr,
    WHOLE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Round ``size`` ≤ B columns from ``start`` on, the last first; R rows per program.

    As ``corequant._cpu.loops.columns.solve_block`` without an accumulator. The operands' rows stay
    in registers; a column is extracted by a masked sum.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place = tl.arange(0, B)
    inside = (row < rows)[:, None] & (place < size)[None, :]
    at = row[:, None] * width + start + place[None, :]
    pull = tl.load(sums + row[:, None] * size + place[None, :], mask=inside, other=0.0)
    argument_tile = tl.load(values + at, mask=inside, other=0.0)
    center_tile = tl.load(centers + at, mask=inside, other=0.0)
    error_tile = tl.zeros((R, B), tl.float32)
    for k in range(size):
        j = size - 1 - k
        here = (place == j)[None, :]
        group = tl.load(groups + j)
        step = tl.load(steps + row * per_row + group, mask=row < rows, other=1.0)
        zero = tl.load(zeros + row * per_row + group, mask=row < rows, other=0.0)
        # Adding -0.0 changes no number, not even -0.0.
        pulled = tl.sum(tl.where(here, pull, -0.0), 1)
        argument = tl.sum(tl.where(here, argument_tile, -0.0), 1)
        center = tl.sum(tl.where(here, center_tile, -0.0), 1)
        diagonal = tl.zeros_like(pulled) + tl.load(mixing + j * size + j)
        argument = tl.where(pulled != 0, argument + tl.div_rn(pulled, diagonal), argument)
        level = _nearest(
            tl.div_rn(argument, step), zero, thresholds, table, count, WHOLE, LEAST, MOST, STEPS
        )
        error = center - level * step
        argument_tile = tl.where(here, argument[:, None], argument_tile)
        error_tile = tl.where(here, error[:, None], error_tile)
        before = place < j
        factor = tl.load(mixing + j * size + place, mask=before, other=0.0)
        pull += error[:, None] * factor[None, :]
        if ECHO:
            factor = tl.load(echo + j * size + place, mask=before, other=0.0)
            pull += argument[:, None] * factor[None, :]
    tl.store(values + at, argument_tile, mask=inside)
    tl.store(errors + at, error_tile, mask=inside)
