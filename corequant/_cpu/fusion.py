"""Fused permute, sign, rotate and quantize for NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.arrays import aligned, is_plain, name_of, new, scratch, storing
from corequant._cpu.codegen.compiler import address_of, compiled_away
from corequant._cpu.codegen.plans import Plan, fitted, plan_rows
from corequant._cpu.codegen.row_kernels import fused_context, fused_kernel, fused_scratch
from corequant._cpu.codegen.row_steps import Task, index_dtype
from corequant._cpu.codegen.vectors import VECTOR_BYTES, compute_dtype, lanes_of
from corequant._cpu.rotation import repeated_bits, scale_of, where_signs
from corequant._cpu.threads import Units
from corequant.formats import FormatKind
from corequant.hadamard import hadamard_factors
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleSearch

__all__ = ["can_fuse", "fuse", "rotate_fake_quantize", "rotate_quantize"]

Array = npt.NDArray[Any]

_MXFP4 = QuantSpec.parse("mxfp4")


def rotate_quantize(
    x: Array,
    block_size: int,
    spec: QuantSpec,
    permutation: npt.NDArray[np.int64] | None,
    signs: npt.NDArray[np.int8] | None,
    out: Array | None,
    threads: int | None,
) -> tuple[Array, Array, Array | None] | None:
    """Return codes, scales and zero points in one pass, None without a kernel or a finite x."""
    if spec == _MXFP4:
        return _microscaled(x, block_size, permutation, signs, out, threads)
    codes = np.empty(x.shape, spec.format.code_dtype) if out is None else out
    fused = _affine(x, block_size, spec, "codes", permutation, signs, codes, threads)
    if fused is None:
        return None
    flat, offsets = fused
    shape = (*x.shape[:-1], flat.size // (x.size // x.shape[-1]))
    zeros = None if spec.symmetric else offsets.astype(np.int8).reshape(shape)
    return codes, flat.reshape(shape), zeros


def rotate_fake_quantize(
    x: Array,
    block_size: int,
    spec: QuantSpec,
    permutation: npt.NDArray[np.int64] | None,
    signs: npt.NDArray[np.int8] | None,
    out: Array | None,
    threads: int | None,
) -> Array | None:
    """Return the values of the codes, in x's dtype; None without a kernel or a finite x."""
    values = new(x.shape, x.dtype) if out is None else out
    apart = values if out is None or not np.may_share_memory(x, out) else np.empty_like(values)
    if _affine(x, block_size, spec, "values", permutation, signs, apart, threads) is None:
        return None
    if apart is not values:
        values[...] = apart
    return values


def _affine(
    x: Array,
    block_size: int,
    spec: QuantSpec,
    grid: str,
    permutation: npt.NDArray[np.int64] | None,
    signs: npt.NDArray[np.int8] | None,
    out: Array,
    threads: int | None,
) -> tuple[Array, Array] | None:
    """Run the kernel for signed integers with plain scales."""
    form = spec.format
    if (
        spec.granularity is Granularity.TENSOR
        or spec.scale_search is not ScaleSearch.ABSMAX
        or spec.scale_format is not ScaleFormat.FLOAT32
        or form.kind is not FormatKind.INTEGER
        or not form.signed
        or form.fraction_bits
    ):
        return None
    limits = (int(form.minimum), int(form.maximum))
    group = spec.group_size or x.shape[-1]
    return _run(
        x,
        block_size,
        group,
        grid,
        out,
        limits=limits,
        symmetric=spec.symmetric,
        permutation=permutation,
        signs=signs,
        threads=threads,
    )


def _microscaled(
    x: Array,
    block_size: int,
    permutation: npt.NDArray[np.int64] | None,
    signs: npt.NDArray[np.int8] | None,
    out: Array | None,
    threads: int | None,
) -> tuple[Array, Array, None] | None:
    if x.dtype.itemsize == 8:
        # The kernel takes the exponent from the bits of a float32.
        return None
    codes = np.empty(x.shape, np.uint8) if out is None else out
    options = {"permutation": permutation, "signs": signs, "threads": threads}
    fused = _run(x, block_size, 32, "float4", codes, **options)
    if fused is None:
        return None
    exponents = fused[0].astype(np.int32) - 127
    scales = np.ldexp(np.float32(1), exponents).reshape(*x.shape[:-1], -1)
    return codes, scales, None


def _run(
    x: Array, block_size: int, group: int, grid: str, out: Array, **options: Any
) -> tuple[Array, Array] | None:
    """Run the fused kernel; None where there is none, or where something isn't finite."""
    d = x.shape[-1]
    if not x.size or not is_plain(out) or not can_fuse(d, block_size, group, x.dtype):
        return None
    plain = x if is_plain(x) else np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    flat = out.reshape(-1, out.shape[-1])
    scales, zeros, finite = fuse(plain.reshape(-1, d), block_size, group, grid, out=flat, **options)
    return (scales, zeros) if finite else None


@lru_cache(maxsize=4096)
def can_fuse(d: int, block_size: int, group: int, dtype: np.dtype[Any]) -> bool:
    """Return whether there is a fused kernel: rows and groups must be whole vectors."""
    name = name_of(dtype)
    return (
        not compiled_away()
        and group % lanes_of(name) == 0
        and _plan(name, block_size, d, "none") is not None
    )


@lru_cache(maxsize=4096)
def _plan(name: str, block_size: int, d: int, signs: str) -> Plan | None:
    """Return the plan whose units make up a row; None if there is none."""
    core, power = hadamard_factors(block_size)
    if core > 1 and power < lanes_of(name):
        return None
    plan = fitted(plan_rows(name, core, power, False, signs, "across"), d)
    # A row is rotated in the scratch, but fetched from the array, which gains in pages of any size.
    return None if plan is None else replace(plan, whole_lines=False)


@dataclass(frozen=True)
class _Kernel:
    """A fused kernel, and all of it that a call needs."""

    call: Any
    plan: Plan
    scratch: int
    real: np.dtype[Any]
    scale: float
    tiny: float
    huge: float


@lru_cache(maxsize=1024)
def _kernel(
    name: str,
    block_size: int,
    d: int,
    group: int,
    grid: str,
    symmetric: bool,
    permuted: bool,
    stores: str,
    signs: str,
) -> _Kernel:
    """Return what a shape needs; many shapes share one compiled kernel."""
    plan = _plan(name, block_size, d, signs)
    assert plan is not None  # ``can_fuse`` has been asked
    if permuted:
        # The gather fetches the next row; what the rotation reads is in the cache already.
        plan = replace(plan, ahead=0)
    task = Task.of(plan.lanes, d, group, grid, symmetric, permuted, stores)
    real = np.dtype(compute_dtype(name))
    return _Kernel(
        fused_kernel(plan, task),
        plan,
        fused_scratch(plan, d, group),
        real,
        float(scale_of(name, block_size)),
        float(np.finfo(real).smallest_subnormal),
        # The margin that quantize leaves below the largest float.
        float(np.finfo(real).max) * (1 - 2.0**-20),
    )


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
    stores = storing(out.nbytes, address_of(out)) if grid == "values" else "ordinary"
    if stores == "shifted" and out.strides[0] % VECTOR_BYTES:
        stores = "ordinary"
    found = _kernel(
        name_of(x.dtype),
        block_size,
        d,
        group,
        grid,
        symmetric,
        permutation is not None,
        stores,
        where_signs(signs, inverse=False),
    )
    bits = np.zeros(0, np.uint8) if signs is None else repeated_bits(found.plan, signs)
    per_row = d // group
    scales = aligned(rows * per_row, np.uint8 if grid == "float4" else found.real)
    zeros = np.zeros(0 if symmetric else rows * per_row, found.real)
    indices = np.zeros(0, np.uint16)
    if permutation is not None:
        indices = permutation.astype(index_dtype(d))
    status = np.zeros(1, np.int64)
    arrays = (x, out, scales, zeros, indices, bits, status, found.call.choices)
    numbers = (found.scale, float(limits[0]), float(limits[1]), found.tiny, found.huge)
    context = fused_context(d, group, [address_of(a) for a in arrays], numbers)
    room = found.scratch
    Units(found.call, rows, d, room, threads).run(context, scratch.at_least(room))
    return scales, zeros, not status[0]
