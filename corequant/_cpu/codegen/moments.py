"""One pass over activations: Σ|x|, Σx² and max|x| of each channel, sums in float64.

Rows are taken eight at a time, so that the sums of a channel are loaded and stored once for eight
numbers. Within a channel numbers are added in the order of the rows, as the plain loop adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.compiler import build
from corequant._cpu.codegen.plans import tuning
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64

__all__ = ["moments_kernel"]

_ROWS = 8
_AHEAD = 1024
"""Bytes fetched ahead in each of the rows."""

_WORD = ir.IntType(64)


@lru_cache(maxsize=8)
def moments_kernel(dtype: str) -> Callable[..., None]:
    """Return the kernel for arrays of a dtype.

    Its parameters are ``src, step, rows, vectors, sum_abs, sum_square, largest``: the address of
    the first row's first channel, bytes from row to row, counts, and the addresses of the sums
    (float64) and of the largest magnitudes (the computed dtype) of these channels.
    """
    return build(f"moments {dtype}", "iiiiiii", lambda b, given: _emit(b, dtype, given))


def _emit(b: Any, dtype: str, given: Any) -> None:
    src, step, rows, vectors, sum_abs, sum_square, largest = given
    v = Vectors(b, dtype)
    byte = ir.IntType(8).as_pointer()
    source, sums, squares, tops = (b.inttoptr(a, byte) for a in (src, sum_abs, sum_square, largest))
    whole = b.sdiv(rows, int64(_ROWS))
    done = b.mul(whole, int64(_ROWS))
    for count, start, together in (
        (whole, int64(0), _ROWS),
        (b.sub(rows, done), done, 1),
    ):
        with counted(b, count) as group:
            row = b.add(start, b.mul(group, int64(together)))
            first = v.address(source, b.mul(row, step))
            with counted(b, vectors) as i:
                _add(v, first, step, i, together, (sums, squares, tops))


def _add(v: Vectors, first: Any, step: Any, i: Any, together: int, kept: Any) -> None:
    """Add ``together`` rows of one vector of channels."""
    b = v.builder
    sums, squares, tops = kept
    wide_bytes = v.lanes * 8
    at = v.address(first, b.mul(i, int64(v.stored_bytes)))
    wide = b.mul(i, int64(wide_bytes))
    kind = ir.VectorType(ir.DoubleType(), v.lanes)
    places = [b.bitcast(v.address(p, wide), kind.as_pointer()) for p in (sums, squares)]
    total, square = (b.load(p) for p in places)
    total.align = square.align = 8
    top_at = v.address(tops, b.mul(i, int64(VECTOR_BYTES)))
    top = v.load(top_at)
    for k in range(together):
        here = v.address(at, b.mul(step, int64(k)))
        if tuning().ahead:
            v.prefetch(v.address(here, _AHEAD))
        size = v.magnitude(v.load_stored(here))
        top = v.maximum(size, top)
        widened = size if v.dtype == "float64" else b.fpext(size, kind)
        total = b.fadd(total, widened)
        square = b.fadd(square, b.fmul(widened, widened))
    b.store(total, places[0]).align = 8
    b.store(square, places[1]).align = 8
    v.store(top, top_at)
