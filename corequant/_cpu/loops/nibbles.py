"""Codes of 4 bits, 32 at a time: packed bytes to numbers and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from corequant._cpu.codegen.compiler import processor
from corequant._cpu.loops.jit import jit
from corequant._cpu.loops.lanes import HALF, LANES, Lanes, address_of, ask_for, prefetch
from corequant._cpu.loops.minifloat_grid import nearest_code, value_of

__all__ = [
    "decode_integers",
    "decode_nibbles",
    "decode_row",
    "encode_nibbles",
    "encode_row",
    "integers_row",
]

_AHEAD = 384
"""Bytes of codes that are asked for ahead of reading: what is written keeps the processor from
fetching far enough ahead by itself."""

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


def encode_nibbles(x: Any, at: Any, low: Any, high: Any, r: Any, packed: Any) -> None:
    """Write ``packed[at/2:]`` from ``x[at:at + 32]``, whose halves have steps ``low``, ``high``."""
    steps = (low,) * HALF + (high,) * HALF
    codes = [nearest_code(x[at + i] / steps[i], r) for i in range(LANES)]
    for i in range(HALF):
        packed[at // 2 + i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))


def decode_nibbles(packed: Any, at: Any, low: Any, high: Any, r: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``; the halves have steps ``low``, ``high``."""
    steps = (low,) * HALF + (high,) * HALF
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = value_of(r.one.dtype.type(code), r) * steps[i]


def decode_integers(packed: Any, at: Any, step: Any, zero: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``, whose codes count from zero."""
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = (code - zero) * step


class _Nibbles(Lanes):
    """Codes of 4 bits and what they stand for, for a rounder's constants ``r``."""

    def __init__(self, builder: Any, r: Any) -> None:
        super().__init__(builder)
        self.r = r

    def const(self, name: str) -> Any:
        return self.splat(getattr(self.r, name))

    def code(self, v: Any) -> Any:
        """``minifloat.nearest_code``, where -0.0 has a code."""
        b, c = self.b, self.const
        bits = self.words(v)
        a = self.floats(b.and_(bits, c("magnitude_mask")))
        a = b.select(b.fcmp_ordered(">", a, c("largest")), c("largest"), a)
        normal = b.select(b.fcmp_ordered(">", a, c("least_normal")), a, c("least_normal"))
        t = b.sub(self.words(normal), c("origin"))
        odd = b.and_(b.lshr(t, c("shift")), c("one"))
        t = b.lshr(b.add(b.add(t, c("half")), odd), c("shift"))
        small = b.sub(self.words(b.fadd(a, c("magic"))), c("magic_bits"))
        code = b.select(b.fcmp_ordered("<", a, c("least_normal")), small, t)
        return b.or_(code, b.and_(b.lshr(bits, c("sign_shift")), c("sign_bit")))

    def look_up(self, code: Any) -> Any:
        """``minifloat.value_of`` of codes up to 15, by a permutation of the 16 numbers if it can.

        The numbers are the same in every turn of a loop, so that the compiler finds them once.
        """
        if not _permutes():
            return self.value(code)
        every = ir.Constant(ir.VectorType(_I32, LANES), [k % HALF for k in range(LANES)])
        whole = self.value(every)
        return self.permute(self.pick(whole, whole, list(range(HALF))), code)

    def integers(self, code: Any, step: Any, zero: Any) -> Any:
        """Return ``(code - zero) * step`` of codes up to 15; a group needs its 16 numbers once."""
        count = HALF if _permutes() else LANES
        every = ir.Constant(ir.VectorType(_I32, HALF), list(range(HALF)))
        whole = self.b.sitofp(every if _permutes() else code, ir.VectorType(_F32, count))
        whole = self.b.fsub(whole, self.splat(zero, count))
        numbers = self.b.fmul(whole, self.splat(step, count))
        return self.permute(numbers, code) if _permutes() else numbers

    def permute(self, table: Any, code: Any) -> Any:
        """Look up 32 codes in 16 numbers."""
        half = ir.VectorType(_F32, HALF)
        kind = ir.FunctionType(half, [half, ir.VectorType(_I32, HALF)])
        name = "llvm.x86.avx512.permvar.sf.512"
        permute = cgutils.get_or_insert_function(self.b.module, kind, name)
        parts = [
            self.b.call(permute, [table, self.pick(code, code, list(range(k, k + HALF)))])
            for k in (0, HALF)
        ]
        return self.pick(parts[0], parts[1], list(range(LANES)))

    def value(self, code: Any) -> Any:
        """``minifloat.value_of``."""
        b, c = self.b, self.const
        magnitude = b.and_(code, b.sub(c("sign_bit"), c("one")))
        large = self.floats(b.add(b.shl(magnitude, c("shift")), c("origin")))
        whole = b.sitofp(magnitude, ir.VectorType(_F32, LANES))
        below = b.fcmp_ordered("<", large, c("least_normal"))
        value = b.select(below, b.fmul(whole, c("tiny")), large)
        sign = b.shl(b.and_(code, c("sign_bit")), c("sign_shift"))
        return self.floats(b.or_(self.words(value), sign))


def _permutes() -> bool:
    """Return whether the processor picks from 16 numbers by one instruction."""
    return "+avx512f" in processor()[1].split(",")


@intrinsic
def _encode(typing: Any, x: Any, at: Any, low: Any, high: Any, r: Any, packed: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Nibbles(builder, _Constants(context, builder, kinds[4], values[4]))
        wide = ir.VectorType(_F32, LANES)
        numbers = builder.load(address_of(context, builder, kinds[0], values[0], values[1], wide))
        numbers.align = 4
        codes = v.code(builder.fdiv(numbers, v.join(values[2], values[3])))
        narrow = builder.trunc(codes, ir.VectorType(_I8, LANES))
        even = v.pick(narrow, narrow, list(range(0, LANES, 2)))
        odd = v.pick(narrow, narrow, list(range(1, LANES, 2)))
        four = ir.Constant(ir.VectorType(_I8, HALF), [4] * HALF)
        target = builder.lshr(values[1], ir.Constant(values[1].type, 1))
        place = address_of(context, builder, kinds[5], values[5], target, even.type)
        builder.store(builder.or_(even, builder.shl(odd, four)), place, align=1)
        return context.get_dummy_value()

    return types.void(x, at, low, high, r, packed), generate


def _codes(context: Any, builder: Any, v: _Nibbles, kind: Any, packed: Any, at: Any) -> Any:
    """Return the 32 codes of ``packed[at/2:]`` as integers of 32 bits."""
    bytes_ = ir.VectorType(_I8, HALF)
    source = builder.lshr(at, ir.Constant(at.type, 1))
    address = address_of(context, builder, kind, packed, source, bytes_)
    prefetch(builder, address, _AHEAD)
    loaded = builder.load(address)
    loaded.align = 1
    even = builder.and_(loaded, ir.Constant(bytes_, [15] * HALF))
    odd = builder.lshr(loaded, ir.Constant(bytes_, [4] * HALF))
    turns = [place for i in range(HALF) for place in (i, HALF + i)]
    return builder.zext(v.pick(even, odd, turns), ir.VectorType(_I32, LANES))


@intrinsic
def _decode_integers(typing: Any, packed: Any, at: Any, step: Any, zero: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Nibbles(builder, None)
        codes = _codes(context, builder, v, kinds[0], values[0], values[1])
        numbers = v.integers(codes, values[2], values[3])
        place = address_of(context, builder, kinds[4], values[4], values[1], numbers.type)
        builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(packed, at, step, zero, out), generate


@intrinsic
def _decode(typing: Any, packed: Any, at: Any, low: Any, high: Any, r: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Nibbles(builder, _Constants(context, builder, kinds[4], values[4]))
        codes = _codes(context, builder, v, kinds[0], values[0], values[1])
        numbers = builder.fmul(v.look_up(codes), v.join(values[2], values[3]))
        place = address_of(context, builder, kinds[5], values[5], values[1], numbers.type)
        builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(packed, at, low, high, r, out), generate


class _Constants:
    """Fields of a rounder as LLVM values."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        for place, name in enumerate(kind.fields):
            setattr(self, name, builder.extract_value(value, place))


@overload(encode_nibbles)
def _encode_nibbles(x, at, low, high, r, packed):  # type: ignore[no-untyped-def]
    return lambda x, at, low, high, r, packed: _encode(x, at, low, high, r, packed)  # type: ignore[call-arg]


@overload(decode_nibbles)
def _decode_nibbles(packed, at, low, high, r, out):  # type: ignore[no-untyped-def]
    return lambda packed, at, low, high, r, out: _decode(packed, at, low, high, r, out)  # type: ignore[call-arg]


@overload(decode_integers)
def _decode_integers_compiled(packed, at, step, zero, out):  # type: ignore[no-untyped-def]
    return lambda packed, at, step, zero, out: _decode_integers(packed, at, step, zero, out)  # type: ignore[call-arg]


@jit
def encode_row(x, size, steps, r, packed):  # type: ignore[no-untyped-def]
    """Packed codes of a row in groups of 16 or of multiples of 32, each with its step.

    What follows the row in memory is asked for.
    """
    d = x.shape[0]
    if size < LANES:
        for g in range(0, steps.shape[0], 2):
            ask_for(x, d + g * HALF)
            encode_nibbles(x, g * HALF, steps[g], steps[g + 1], r, packed)
    else:
        for g in range(steps.shape[0]):
            for at in range(g * size, (g + 1) * size, LANES):
                ask_for(x, d + at)
                encode_nibbles(x, at, steps[g], steps[g], r, packed)


@jit
def decode_row(packed, size, stored, table, r, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row in groups of 16 or of multiples of 32.

    ``table`` has the step of each byte of ``stored`` scales, one for each group.
    """
    if size < LANES:
        for g in range(0, stored.shape[0], 2):
            low, high = table[stored[g]], table[stored[g + 1]]
            decode_nibbles(packed, g * HALF, low, high, r, out)
    else:
        for g in range(stored.shape[0]):
            step = table[stored[g]]
            for at in range(g * size, (g + 1) * size, LANES):
                decode_nibbles(packed, at, step, step, r, out)


@jit
def integers_row(packed, size, steps, zeros, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row of integers in groups of multiples of 32."""
    for g in range(steps.shape[0]):
        for at in range(g * size, (g + 1) * size, LANES):
            decode_integers(packed, at, steps[g], zeros[g], out)
