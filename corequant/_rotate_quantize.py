"""Fused permute, sign, rotate and quantize for NumPy arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._numba.row_kernels import Task, fused_kernel, fused_scratch
from corequant._numba.machine import compiled_away
from corequant._numba.plans import plan_rows
from corequant._numba.vectors import compute_dtype, lanes_of
from corequant._rotation import aligned, factors, name_of, scratch
from corequant._threads import for_rows
from corequant.hadamard import hadamard_factors

__all__ = ["can_fuse", "fuse"]

Array = npt.NDArray[Any]


def can_fuse(d: int, block_size: int, group: int, dtype: np.dtype[Any]) -> bool:
    """Tell whether there is a fused kernel: rows and groups must be whole vectors."""
    if compiled_away():
        return False
    core, power = hadamard_factors(block_size)
    lanes = lanes_of(name_of(dtype))
    if group % lanes or (core > 1 and power < lanes):
        return False
    plan = plan_rows(name_of(dtype), core, power, False, "none", "ordinary")
    return d % plan.unit == 0


def fuse(
    x: Array,
    block_size: int,
    group: int,
    grid: str,
    *,
    limits: tuple[int, int] = (0, 0),
    symmetric: bool = True,
    permutation: npt.NDArray[np.int64] | None = None,
    signs: npt.NDArray[np.int8] | None = None,
    out: Array,
    threads: int | None = None,
) -> tuple[Array, Array, bool]:
    """Rotate and quantize the rows of ``x`` (rows, d) into ``out``, both C-contiguous.

    Returns scales and zero points, one for each group in the order of memory, and whether every
    rotated number was finite.
    """
    rows, d = x.shape
    name = name_of(x.dtype)
    real = np.dtype(compute_dtype(name))
    where, multipliers, scale = factors(signs, name, block_size, inverse=False)
    core, power = hadamard_factors(block_size)
    plan = plan_rows(name, core, power, False, where, "ordinary")
    if permutation is not None:
        # The gather fetches the next row; what the rotation reads is in the cache already.
        plan = replace(plan, ahead=0)
    task = Task(d, group, grid, symmetric, permutation is not None)
    kernel, room = fused_kernel(plan, task), fused_scratch(plan, task)
    per_row = d // group
    scales = aligned(rows * per_row, np.uint8 if grid == "float4" else real)
    zeros = np.zeros(0 if symmetric else rows * per_row, real)
    indices = np.zeros(0, np.int32) if permutation is None else permutation.astype(np.int32)
    tiny = float(np.finfo(real).smallest_subnormal)
    # The margin that quantize leaves below the largest float.
    huge = float(np.finfo(real).max) * (1 - 2.0**-20)
    starts = [a.ctypes.data for a in (x, out, scales, zeros, indices, multipliers)]
    finite = []

    def work(first: int, last: int) -> None:
        status = np.zeros(1, np.int64)
        source, target, scale_at, zero_at, index_at, sign_at = starts
        kernel(
            source + first * d * x.itemsize,
            target + first * d * out.itemsize,
            scale_at + first * per_row * scales.itemsize,
            zero_at + first * per_row * real.itemsize,
            last - first,
            index_at,
            sign_at,
            scratch.at_least(room),
            status.ctypes.data,
            float(scale),
            float(limits[0]),
            float(limits[1]),
            tiny,
            huge,
        )
        finite.append(not status[0])

    for_rows(rows, d, work, threads)
    return scales, zeros, all(finite)
