"""Triton kernels of block rotations: NumPy's sums in NumPy's order, in float32.

A block of K·p numbers is turned by butterflies at the distances 1, 2, 4, ..., p/2, then by the core
of order K, as ``corequant._cpu.loops.rotation_reference`` says. There is no product of matrices:
tensor cores cut off what their sums can't hold instead of rounding it, and sum in an order of their
own. So the results are NumPy's bit for bit, whether a block is rotated by itself or on the way to
its codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["butterflies", "mix_cores", "narrowed", "rotate_powers"]


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
def butterflies(y, rows: tl.constexpr, order: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply the rows (rows, order) by Sylvester's matrix, in NumPy's order of sums."""
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
    """Rotate contiguous blocks of P numbers, a power of two; L of them a program.

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
    """Multiply columns of K numbers, P apart, by a core; C columns a program, and L ≥ K.

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
