"""Triton kernels that go through memory once without mixing channels: statistics, decoding."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["channel_moments", "decode_groups"]


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

    Everything is float64: squares of float32 neither overflow nor round there.
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
    """Write what codes stand for; each run of ``size`` of them has a step of its own.

    WHOLE: integers, with zero points where SHIFTED; otherwise ``table`` has all 256 bytes' numbers.
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
