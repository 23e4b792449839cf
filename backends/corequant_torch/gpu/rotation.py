"""Block rotations in Triton: NumPy's sums in NumPy's order, in float32.

A block of K·p numbers is multiplied by butterflies at the distances 1, 2, 4, ..., p/2, then by the
core of order K. Matrix products are not used: tensor cores truncate their sums instead of rounding
them, and add in another order.

Bit-exact twin: `corequant._cpu.loops.rotation_reference`, `corequant_torch.device.rotation`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from corequant.hadamard import hadamard_factors
from corequant_torch.device.rotation import core_signs
from corequant_torch.gpu.runtime import interpreted, on_device

__all__ = [
    "KINDS",
    "LARGEST_TILE",
    "TILE",
    "butterflies",
    "mix_cores",
    "mixing_tile",
    "narrowed",
    "power_of_two",
    "rotate",
    "rotate_powers",
    "turning_tile",
]

Tensor = torch.Tensor

KINDS = (torch.float16, torch.bfloat16, torch.float32)
"""Input dtypes of the kernels."""

TILE = 4096
"""Minimum of numbers per program."""

LARGEST_TILE = 32768
"""Maximum of numbers that a program holds in registers."""

_NUMBERS_PER_WARP = 512
"""16 per thread: with 32 a thread takes up to all 255 registers, and few threads fit."""

_MOST_WARPS = 32


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _warps(numbers: int) -> int:
    return min(max(4, numbers // _NUMBERS_PER_WARP), _MOST_WARPS)


def turning_tile(power: int) -> tuple[dict[str, int], int]:
    """Return the constants and the number of warps of ``rotate_powers``."""
    rows = max(1, TILE // power)
    return {"L": rows, "P": power}, _warps(rows * power)


def mixing_tile(core: int, power: int) -> tuple[dict[str, int], int]:
    """Return the constants and the number of warps of ``mix_cores``."""
    rows = power_of_two(core)
    columns = max(16, TILE // rows)
    constants = {"K": core, "L": rows, "P": power, "C": columns}
    return constants, _warps(rows * columns)


_factors = lru_cache(maxsize=512)(hadamard_factors)


def rotate(
    x: Tensor, block_size: int, inverse: bool, signs: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Rotate blocks of the last axis; None without a kernel for the case."""
    core, power = _factors(block_size)
    if power > LARGEST_TILE or x.dtype not in KINDS or not x.numel():
        return None
    source = x.contiguous()
    direct = out is not None and out.is_contiguous()
    target = out if out is not None and direct else torch.empty_like(source)
    scale, d = 1 / math.sqrt(block_size), int(x.shape[-1])
    if core == 1:
        _turn(source, target, power, d, scale, signs, inverse)
    else:
        # The core reads entries from all over a block: the butterflies must be finished.
        turned = torch.empty_like(source, dtype=torch.float32)
        _turn(source, turned, power, d, 1.0, None if inverse else signs, False)
        _mix(turned, target, core, power, d, scale, inverse, signs if inverse else None)
    return target if out is None or direct else out.copy_(target)


def _turn(
    x: Tensor, out: Tensor, power: int, d: int, scale: float, signs: Tensor | None, after: bool
) -> None:
    constants, warps = turning_tile(power)
    blocks = x.numel() // power
    table = x if signs is None else signs
    arguments = (x, out, table, blocks, d // power, scale)
    where = 0 if signs is None else (2 if after else 1)
    _launch(rotate_powers, -(-blocks // constants["L"]), arguments, constants, where, warps)


def _mix(
    x: Tensor,
    out: Tensor,
    core: int,
    power: int,
    d: int,
    scale: float,
    inverse: bool,
    signs: Tensor | None,
) -> None:
    constants, warps = mixing_tile(core, power)
    columns = x.numel() // core
    table = x if signs is None else signs
    cores = core_signs(core, inverse, x.device)
    arguments = (x, out, table, cores, columns, d // (core * power), scale)
    where = 0 if signs is None else 2
    _launch(mix_cores, -(-columns // constants["C"]), arguments, constants, where, warps)


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, int],
    signs: int,
    warps: int,
) -> None:
    # No autotuner: it would run the kernel on the caller's memory to measure it.
    with on_device(arguments[0]):
        kernel[(programs,)](
            *arguments,
            **constants,
            SIGNS=signs,
            INTERPRETED=interpreted(),
            num_warps=warps,
            enable_fp_fusion=False,
        )


@triton.jit
def narrowed(y, kind: tl.constexpr, interpreted: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 in the dtype ``kind``, rounded to nearest even.

    The interpreter truncates to bfloat16, and holds it as bits that it can't multiply.
    """
    if interpreted and kind == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        # NaN would carry into infinity.
        rounded = tl.where(y == y, (bits + 0x7FFF + even) & 0xFFFF0000, 0x7FC00000)
        y = rounded.to(tl.uint32).to(tl.float32, bitcast=True)
    return y.to(kind)


@triton.jit
def butterflies(y, rows: tl.constexpr, order: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply rows (rows, order) by Sylvester's matrix, in NumPy's order of sums."""
    for stage in tl.static_range(15):
        if (1 << stage) < order:
            pairs = tl.reshape(y, (rows * order // (2 << stage), 2, 1 << stage))
            a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
            both = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
            y = tl.reshape(both, (rows, order))
    return y


@triton.jit(do_not_specialize=["blocks", "per_row"])
def rotate_powers(  # type: ignore[no-untyped-def]
    x,
    out,
    sign_table,
    blocks,
    per_row,
    scale,
    L: tl.constexpr,
    P: tl.constexpr,
    SIGNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rotate contiguous blocks of P numbers, a power of two; L blocks per program.

    ``SIGNS``: 0 none, 1 before, 2 after the rotation.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program * L + tl.arange(0, L)[:, None]
    inner = tl.arange(0, P)[None, :]
    at = block * P + inner
    channel = (block % per_row) * P + inner
    inside = (block < blocks) & (inner < P)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SIGNS == 1:
        y = y * tl.load(sign_table + channel, mask=inside, other=1).to(tl.float32)
    y = butterflies(y, L, P) * scale
    if SIGNS == 2:
        y = y * tl.load(sign_table + channel, mask=inside, other=1).to(tl.float32)
    tl.store(out + at, narrowed(y, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["columns", "per_row"])
def mix_cores(  # type: ignore[no-untyped-def]
    x,
    out,
    sign_table,
    core_table,
    columns,
    per_row,
    scale,
    K: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    SIGNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply columns of K numbers, P apart, by a core; C columns per program, and L ≥ K.

    Inputs are added in fours, two and two, then from left to right. ``core_table`` (K/4, 4, K) has
    the signs of each four as ``core_signs`` puts them; ``x`` is float32, ``SIGNS`` 2 multiplies
    signs afterwards.
    """
    k = tl.arange(0, L)
    column = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    block = column // P
    first = block * (K * P) + column % P
    known = column < columns
    total = tl.zeros((L, C), tl.float32)
    for four in range(K // 4):
        source = x + first + four * (4 * P)
        a = tl.load(source, mask=known, other=0.0)[None, :]
        b = tl.load(source + P, mask=known, other=0.0)[None, :]
        c = tl.load(source + 2 * P, mask=known, other=0.0)[None, :]
        d = tl.load(source + 3 * P, mask=known, other=0.0)[None, :]
        table = core_table + four * (4 * K) + k
        whole = tl.load(table, mask=k < K, other=1).to(tl.float32)[:, None]
        second = tl.load(table + K, mask=k < K, other=1).to(tl.float32)[:, None]
        right = tl.load(table + 2 * K, mask=k < K, other=1).to(tl.float32)[:, None]
        fourth = tl.load(table + 3 * K, mask=k < K, other=1).to(tl.float32)[:, None]
        term = whole * ((a + second * b) + right * (c + fourth * d))
        # The first is not added to zero: that would change -0.0.
        total = tl.where(four == 0, term, total + term)
    y = total * scale
    at = first[None, :] + (k * P)[:, None]
    inside = (k < K)[:, None] & known[None, :]
    if SIGNS == 2:
        channel = ((block % per_row) * (K * P) + column % P)[None, :] + (k * P)[:, None]
        y = y * tl.load(sign_table + channel, mask=inside, other=1).to(tl.float32)
    tl.store(out + at, narrowed(y, out.dtype.element_ty, INTERPRETED), mask=inside)
