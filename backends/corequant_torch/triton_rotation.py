"""Triton kernel of block rotations: a tile is turned by products with ±1 on the tensor cores.

A block of ``K·A·B`` numbers is a tensor (K, A, B); ``core ⊗ H_A ⊗ H_B`` acts on its axes one after
another, and for K = 1 the first axis holds several blocks. Factors of ±1 are exact in bfloat16, and
so is a float32 as the sum of three bfloat16: products are exact, sums are float32, and nothing is
rounded to half precision between the steps.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["butterflies", "narrowed", "rotate_blocks", "split_dot", "sylvester"]


@triton.jit
def narrowed(y, kind: tl.constexpr, interpreted: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 in the dtype ``kind``, rounded to nearest even.

    The interpreter cuts bfloat16 off, and holds it as bits that it can't multiply.
    """
    if interpreted and kind == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        # NaN would carry into infinity.
        rounded = tl.where(y == y, (bits + 0x7FFF + even) & 0xFFFF0000, 0x7FC00000)
        y = rounded.to(tl.uint32).to(tl.float32, bitcast=True)
    return y.to(kind)


@triton.jit
def _factor(y, interpreted: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what the tensor cores multiply: bfloat16, in the interpreter the same in float32."""
    half = narrowed(y, tl.bfloat16, interpreted)
    return half.to(tl.float32) if interpreted else half


@triton.jit
def sylvester(order: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return Sylvester's matrix, ±1: the parity of the ones that two indices share."""
    i = tl.arange(0, order)
    shared = i[:, None] & i[None, :]
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    return (1 - 2 * (shared & 1)).to(tl.float32)


@triton.jit
def split_dot(x, signs, parts: tl.constexpr, interpreted: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 ``x @ signs`` with ``x`` as the sum of so many bfloat16."""
    right = _factor(signs, interpreted)
    left = _factor(x, interpreted)
    total = tl.dot(left, right)
    rest = x
    for _ in tl.static_range(parts - 1):
        rest = rest - left.to(tl.float32)
        left = _factor(rest, interpreted)
        total += tl.dot(left, right)
    return total


@triton.jit
def butterflies(y, rows: tl.constexpr, order: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply the rows (rows, order) by Sylvester's matrix, in NumPy's order of sums."""
    for stage in tl.static_range(15):
        if (1 << stage) < order:
            pairs = tl.reshape(y, (rows * order // (2 << stage), 2, 1 << stage))
            a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
            both = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
            y = tl.reshape(both, (rows, order))
    return y


@triton.jit
def rotate_blocks(  # type: ignore[no-untyped-def]
    x,
    out,
    sign_table,
    core_table,
    blocks,
    per_row,
    scale,
    K: tl.constexpr,
    L: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    SIGNS: tl.constexpr,
    FIRST: tl.constexpr,
    LATER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rotate contiguous blocks of K·A·B; ``SIGNS`` 0 none, 1 before, 2 after the rotation.

    For K = 1 a program takes L blocks; otherwise one, with L ≥ K rows, those from K on empty.
    FIRST and LATER are the numbers of bfloat16 that numbers are split into.
    """
    program = tl.program_id(0).to(tl.int64)
    lead = tl.arange(0, L)[:, None]
    inner = tl.arange(0, A * B)[None, :]
    if K == 1:
        block = program * L + lead
        at = block * (A * B) + inner
        channel = (block % per_row) * (A * B) + inner
        inside = (block < blocks) & (inner < A * B)
    else:
        at = program * (K * A * B) + lead * (A * B) + inner
        channel = (program % per_row) * (K * A * B) + lead * (A * B) + inner
        inside = (lead < K) & (inner < A * B)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SIGNS == 1:
        y = y * tl.load(sign_table + channel, mask=inside, other=1).to(tl.float32)
    y = split_dot(tl.reshape(y, (L * A, B)), sylvester(B), FIRST, INTERPRETED)
    if A > 1:
        y = tl.permute(tl.reshape(y, (L, A, B)), (0, 2, 1))
        y = split_dot(tl.reshape(y, (L * B, A)), sylvester(A), LATER, INTERPRETED)
        y = tl.permute(tl.reshape(y, (L, B, A)), (0, 2, 1))
    y = tl.reshape(y, (L, A * B))
    if K > 1:
        i = tl.arange(0, L)
        known = (i[:, None] < K) & (i[None, :] < K)
        core = tl.load(core_table + i[:, None] * K + i[None, :], mask=known, other=0)
        turned = split_dot(tl.trans(y), core.to(tl.float32), LATER, INTERPRETED)
        y = tl.trans(turned)
    y = y * scale
    if SIGNS == 2:
        y = y * tl.load(sign_table + channel, mask=inside, other=1).to(tl.float32)
    tl.store(out + at, narrowed(y, out.dtype.element_ty, INTERPRETED), mask=inside)


def configurations() -> list[Any]:
    """Return what the autotuner tries."""
    return [triton.Config({}, num_warps=w, num_stages=1) for w in (4, 8)]
