"""Codes of 4 bits, 32 numbers at a time as LLVM vectors: packed bytes to numbers and back.

Groups of 16 or 32 are shorter than what the compiler's own vector loops start at, so that plain
loops over them spent most of their time in remainders: 15 against 6 ms for 4096 by 4096 float32.
Outside compiled code the same definitions run on NumPy vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

from corequant._numba.bits import to_float
from corequant._numba.jit import jit
from corequant._numba.machine import processor
from corequant._numba.minifloat import nearest_code, value_of

__all__ = [
    "LANES",
    "all_magnitudes",
    "decode_integers",
    "decode_nibbles",
    "decode_row",
    "encode_nibbles",
    "encode_row",
    "integers_row",
    "largest_bits",
    "magnitudes_of_row",
]

LANES = 32
"""Numbers at a time: 16 bytes, and as many groups as two."""

_AHEAD = 512
"""Bytes of codes that are asked for ahead of reading: what is written keeps the processor from
fetching far enough ahead by itself."""

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_HALF = LANES // 2


def encode_nibbles(x: Any, at: Any, low: Any, high: Any, r: Any, packed: Any) -> None:
    """Write ``packed[at/2:]`` from ``x[at:at + 32]``, whose halves have steps ``low``, ``high``."""
    steps = (low,) * _HALF + (high,) * _HALF
    codes = [nearest_code(x[at + i] / steps[i], r) for i in range(LANES)]
    for i in range(_HALF):
        packed[at // 2 + i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))


def decode_nibbles(packed: Any, at: Any, low: Any, high: Any, r: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``; the halves have steps ``low``, ``high``."""
    steps = (low,) * _HALF + (high,) * _HALF
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = value_of(r.one.dtype.type(code), r) * steps[i]


def decode_integers(packed: Any, at: Any, step: Any, zero: Any, out: Any) -> None:
    """Write ``out[at:at + 32]`` from ``packed[at/2:]``, whose codes count from zero."""
    for i in range(LANES):
        code = (packed[at // 2 + i // 2] >> (4 * (i % 2))) & 15
        out[at + i] = (code - zero) * step


def largest_bits(x: Any, at: Any, count: Any) -> Any:
    """Return the bits of the largest magnitude of ``x[at:at + count]``, in sixteens."""
    return (x[at : at + count].view(np.uint32) & np.uint32(0x7FFFFFFF)).max()


class _Lanes:
    """A few operations on vectors of 32."""

    def __init__(self, builder: Any, r: Any) -> None:
        self.b, self.r = builder, r

    def splat(self, value: Any, count: int = LANES) -> Any:
        kind = ir.VectorType(value.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def const(self, name: str) -> Any:
        return self.splat(getattr(self.r, name))

    def words(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_I32, LANES))

    def floats(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_F32, LANES))

    def join(self, low: Any, high: Any) -> Any:
        """Return a vector of 16 times ``low`` and 16 times ``high``."""
        return self.pick(self.splat(low), self.splat(high), [0] * _HALF + [LANES] * _HALF)

    def pick(self, one: Any, other: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_I32, len(places)), places)
        return self.b.shuffle_vector(one, other, mask)

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
        features = processor()[1]
        if "+avx512f" not in features.split(","):
            return self.value(code)
        half = ir.VectorType(_F32, _HALF)
        indices = ir.VectorType(_I32, _HALF)
        every = ir.Constant(ir.VectorType(_I32, LANES), [k % _HALF for k in range(LANES)])
        whole = self.value(every)
        table = self.pick(whole, whole, list(range(_HALF)))
        kind = ir.FunctionType(half, [half, indices])
        name = "llvm.x86.avx512.permvar.sf.512"
        permute = cgutils.get_or_insert_function(self.b.module, kind, name)
        parts = [
            self.b.call(permute, [table, self.pick(code, code, list(range(k, k + _HALF)))])
            for k in (0, _HALF)
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


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
    """Return a pointer to ``array[at]`` as a pointer to ``element``."""
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), element.as_pointer())


@intrinsic
def _encode(typing: Any, x: Any, at: Any, low: Any, high: Any, r: Any, packed: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Lanes(builder, _Constants(context, builder, kinds[4], values[4]))
        wide = ir.VectorType(_F32, LANES)
        numbers = builder.load(_address(context, builder, kinds[0], values[0], values[1], wide))
        numbers.align = 4
        codes = v.code(builder.fdiv(numbers, v.join(values[2], values[3])))
        narrow = builder.trunc(codes, ir.VectorType(_I8, LANES))
        even = v.pick(narrow, narrow, list(range(0, LANES, 2)))
        odd = v.pick(narrow, narrow, list(range(1, LANES, 2)))
        four = ir.Constant(ir.VectorType(_I8, _HALF), [4] * _HALF)
        target = builder.lshr(values[1], ir.Constant(values[1].type, 1))
        place = _address(context, builder, kinds[5], values[5], target, even.type)
        builder.store(builder.or_(even, builder.shl(odd, four)), place, align=1)
        return context.get_dummy_value()

    return types.void(x, at, low, high, r, packed), generate


def _codes(context: Any, builder: Any, v: _Lanes, kind: Any, packed: Any, at: Any) -> Any:
    """Return the 32 codes of ``packed[at/2:]`` as integers of 32 bits."""
    bytes_ = ir.VectorType(_I8, _HALF)
    source = builder.lshr(at, ir.Constant(at.type, 1))
    address = _address(context, builder, kind, packed, source, bytes_)
    _prefetch(builder, address)
    loaded = builder.load(address)
    loaded.align = 1
    even = builder.and_(loaded, ir.Constant(bytes_, [15] * _HALF))
    odd = builder.lshr(loaded, ir.Constant(bytes_, [4] * _HALF))
    turns = [place for i in range(_HALF) for place in (i, _HALF + i)]
    return builder.zext(v.pick(even, odd, turns), ir.VectorType(_I32, LANES))


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for what is read a little later; beyond an array's end that does nothing."""
    first = builder.bitcast(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [first.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To be read, into every level of the cache, as data.
    how = [ir.Constant(_I32, value) for value in (0, 3, 1)]
    builder.call(function, [builder.gep(first, [ir.Constant(_I32, _AHEAD)]), *how])


@intrinsic
def _decode_integers(typing: Any, packed: Any, at: Any, step: Any, zero: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Lanes(builder, None)
        codes = _codes(context, builder, v, kinds[0], values[0], values[1])
        whole = builder.sitofp(codes, ir.VectorType(_F32, LANES))
        numbers = builder.fmul(builder.fsub(whole, v.splat(values[3])), v.splat(values[2]))
        place = _address(context, builder, kinds[4], values[4], values[1], numbers.type)
        builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(packed, at, step, zero, out), generate


@intrinsic
def _decode(typing: Any, packed: Any, at: Any, low: Any, high: Any, r: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = signature.args
        v = _Lanes(builder, _Constants(context, builder, kinds[4], values[4]))
        codes = _codes(context, builder, v, kinds[0], values[0], values[1])
        numbers = builder.fmul(v.look_up(codes), v.join(values[2], values[3]))
        place = _address(context, builder, kinds[5], values[5], values[1], numbers.type)
        builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(packed, at, low, high, r, out), generate


@intrinsic
def _largest(typing: Any, x: Any, at: Any) -> Any:
    """Bits of the largest magnitudes of 16 numbers, reduced."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = ir.VectorType(_I32, _HALF)
        loaded = builder.load(
            _address(context, builder, signature.args[0], values[0], values[1], words)
        )
        loaded.align = 4
        bits = builder.and_(loaded, ir.Constant(words, [0x7FFFFFFF] * _HALF))
        name = f"llvm.vector.reduce.umax.v{_HALF}i32"
        kind = ir.FunctionType(_I32, [words])
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(reduce, [bits])

    return types.uint32(x, at), generate


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


@overload(largest_bits)
def _largest_bits(x, at, count):  # type: ignore[no-untyped-def]
    def run(x, at, count):  # type: ignore[no-untyped-def]
        most = np.uint32(0)
        for k in range(at, at + count, 16):
            most = max(most, _largest(x, k))  # type: ignore[call-arg]
        return most

    return run


@jit
def encode_row(x, size, steps, r, packed):  # type: ignore[no-untyped-def]
    """Packed codes of a row in groups of 16 or of multiples of 32, each with its step."""
    if size < LANES:
        for g in range(0, steps.shape[0], 2):
            encode_nibbles(x, g * _HALF, steps[g], steps[g + 1], r, packed)
    else:
        for g in range(steps.shape[0]):
            for at in range(g * size, (g + 1) * size, LANES):
                encode_nibbles(x, at, steps[g], steps[g], r, packed)


@jit
def decode_row(packed, size, steps, r, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row in groups of 16 or of multiples of 32, each with its step."""
    if size < LANES:
        for g in range(0, steps.shape[0], 2):
            decode_nibbles(packed, g * _HALF, steps[g], steps[g + 1], r, out)
    else:
        for g in range(steps.shape[0]):
            for at in range(g * size, (g + 1) * size, LANES):
                decode_nibbles(packed, at, steps[g], steps[g], r, out)


@jit
def integers_row(packed, size, steps, zeros, out):  # type: ignore[no-untyped-def]
    """Numbers of a packed row of integers in groups of multiples of 32."""
    for g in range(steps.shape[0]):
        for at in range(g * size, (g + 1) * size, LANES):
            decode_integers(packed, at, steps[g], zeros[g], out)


@jit
def magnitudes_of_row(x, size, high):  # type: ignore[no-untyped-def]
    """Largest magnitudes of a row's groups of multiples of 16."""
    for g in range(high.shape[0]):
        high[g] = to_float(largest_bits(x, g * size, size))


@jit
def all_magnitudes(x, high):  # type: ignore[no-untyped-def]
    """Largest magnitude of each row, whose length is a multiple of 16."""
    for row in range(x.shape[0]):
        high[row] = to_float(largest_bits(x[row], 0, x.shape[1]))
