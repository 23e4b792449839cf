"""Primitives of kernels as LLVM instructions, registered with numba; imported only to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, type_callable
from numba.np.arrayobj import make_array

from corequant._cpu.codegen.compiler import processor
from corequant._cpu.loops.bits import HALF, LANES, PRIMITIVES

__all__ = ["register"]

_AHEAD = 384
"""Bytes of codes that are asked for ahead of reading: what is written keeps the processor from
fetching far enough ahead by itself."""

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()

_BITS = {types.float32: types.uint32, types.float64: types.uint64}
_FLOATS = {unsigned: real for real, unsigned in _BITS.items()}

Emit = Callable[..., Any]


_EMITTERS: dict[str, tuple[Callable[..., Any], Emit]] = {}
"""What types a primitive of types returns, and what is emitted for a call."""


def register() -> None:
    """Tell numba of the primitives that are known by now."""
    for name in sorted(_EMITTERS.keys() & PRIMITIVES.keys()):
        _register(PRIMITIVES[name], *_EMITTERS.pop(name))


def _register(function: Callable[..., Any], returned: Callable[..., Any], emit: Emit) -> None:
    def typed(context: Any) -> Any:
        # numba looks for the names of its parameters.
        return functools.wraps(function)(returned)

    def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = emit(context, builder, signature, values)
        return context.get_dummy_value() if value is None else value

    type_callable(function)(typed)
    count = function.__code__.co_argcount
    lower_builtin(function, *(types.Any for _ in range(count)))(lowered)


def _emits(name: str, returned: Callable[..., Any]) -> Callable[[Emit], Emit]:
    """Give what a primitive's call becomes: a value, or None."""

    def keep(emit: Emit) -> Emit:
        _EMITTERS[name] = (returned, emit)
        return emit

    return keep


@_emits("to_bits", lambda x: _BITS.get(x))
@_emits("to_float", lambda bits: _FLOATS.get(bits))
def _reinterpret(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return builder.bitcast(values[0], context.get_value_type(signature.return_type))


@_emits("larger", lambda a, b: a)
def _larger(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return _chosen(">", context, builder, signature, values)


@_emits("smaller", lambda a, b: a)
def _smaller(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return _chosen("<", context, builder, signature, values)


def _chosen(relation: str, context: Any, builder: Any, signature: Any, values: Any) -> Any:
    """Return the first number, unless the second is in this relation to it."""
    kind = signature.args[0]
    first, second = values[0], context.cast(builder, values[1], signature.args[1], kind)
    if isinstance(kind, types.Float):
        return builder.select(builder.fcmp_ordered(relation, second, first), second, first)
    # The form that LLVM makes vectors of, whatever stands before and behind.
    name = ("s" if kind.signed else "u") + {">": "max", "<": "min"}[relation]
    whole = first.type
    types_ = ir.FunctionType(whole, [whole, whole])
    function = builder.module.declare_intrinsic(f"llvm.{name}", [whole], types_)
    return builder.call(function, [first, second])


@_emits("like", lambda value, sample: sample)
def _like(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return context.cast(builder, values[0], signature.args[0], signature.return_type)


class _Lanes:
    """A few operations on vectors of 32."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def splat(self, value: Any, count: int = LANES) -> Any:
        kind = ir.VectorType(value.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def words(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_I32, LANES))

    def floats(self, value: Any) -> Any:
        return self.b.bitcast(value, ir.VectorType(_F32, LANES))

    def join(self, low: Any, high: Any) -> Any:
        """Return a vector of 16 times ``low`` and 16 times ``high``."""
        return self.pick(self.splat(low), self.splat(high), [0] * HALF + [LANES] * HALF)

    def pick(self, one: Any, other: Any, places: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_I32, len(places)), places)
        return self.b.shuffle_vector(one, other, mask)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
    """Return a pointer to ``array[at]`` as a pointer to ``element``."""
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), element.as_pointer())


def _prefetch(builder: Any, address: Any, bytes_: int) -> None:
    """Ask for what is read a little later; beyond an array's end that does nothing."""
    first = builder.bitcast(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [first.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To be read, into every level of the cache, as data.
    how = [ir.Constant(_I32, value) for value in (0, 3, 1)]
    builder.call(function, [builder.gep(first, [ir.Constant(_I32, bytes_)]), *how])


@_emits("ask_for", lambda x, at: types.none)
def _ask_for(context: Any, builder: Any, signature: Any, values: Any) -> None:
    address = _place(context, builder, signature.args[0], values[0], values[1], _F32)
    for line in range(0, 4 * LANES, 64):
        _prefetch(builder, address, line)


@_emits("largest_of_half", lambda x, at: types.uint32)
def _largest(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    words = ir.VectorType(_I32, HALF)
    loaded = builder.load(_place(context, builder, signature.args[0], values[0], values[1], words))
    loaded.align = 4
    bits = builder.and_(loaded, ir.Constant(words, [0x7FFFFFFF] * HALF))
    name = f"llvm.vector.reduce.umax.v{HALF}i32"
    kind = ir.FunctionType(_I32, [words])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [bits])


class _Nibbles(_Lanes):
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


class _Constants:
    """Fields of a rounder as LLVM values."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        for place, name in enumerate(kind.fields):
            setattr(self, name, builder.extract_value(value, place))


def _codes(context: Any, builder: Any, v: _Nibbles, kind: Any, packed: Any, at: Any) -> Any:
    """Return the 32 codes of ``packed[at/2:]`` as integers of 32 bits."""
    bytes_ = ir.VectorType(_I8, HALF)
    source = builder.lshr(at, ir.Constant(at.type, 1))
    address = _place(context, builder, kind, packed, source, bytes_)
    _prefetch(builder, address, _AHEAD)
    loaded = builder.load(address)
    loaded.align = 1
    even = builder.and_(loaded, ir.Constant(bytes_, [15] * HALF))
    odd = builder.lshr(loaded, ir.Constant(bytes_, [4] * HALF))
    turns = [place for i in range(HALF) for place in (i, HALF + i)]
    return builder.zext(v.pick(even, odd, turns), ir.VectorType(_I32, LANES))


@_emits("encode_nibbles", lambda x, at, low, high, r, packed: types.none)
def _encode(context: Any, builder: Any, signature: Any, values: Any) -> None:
    kinds = signature.args
    v = _Nibbles(builder, _Constants(context, builder, kinds[4], values[4]))
    wide = ir.VectorType(_F32, LANES)
    numbers = builder.load(_place(context, builder, kinds[0], values[0], values[1], wide))
    numbers.align = 4
    codes = v.code(builder.fdiv(numbers, v.join(values[2], values[3])))
    narrow = builder.trunc(codes, ir.VectorType(_I8, LANES))
    even = v.pick(narrow, narrow, list(range(0, LANES, 2)))
    odd = v.pick(narrow, narrow, list(range(1, LANES, 2)))
    four = ir.Constant(ir.VectorType(_I8, HALF), [4] * HALF)
    target = builder.lshr(values[1], ir.Constant(values[1].type, 1))
    place = _place(context, builder, kinds[5], values[5], target, even.type)
    builder.store(builder.or_(even, builder.shl(odd, four)), place, align=1)


@_emits("decode_integers", lambda packed, at, step, zero, out: types.none)
def _decode_integers(context: Any, builder: Any, signature: Any, values: Any) -> None:
    kinds = signature.args
    v = _Nibbles(builder, None)
    codes = _codes(context, builder, v, kinds[0], values[0], values[1])
    numbers = v.integers(codes, values[2], values[3])
    place = _place(context, builder, kinds[4], values[4], values[1], numbers.type)
    builder.store(numbers, place, align=4)


@_emits("decode_nibbles", lambda packed, at, low, high, r, out: types.none)
def _decode(context: Any, builder: Any, signature: Any, values: Any) -> None:
    kinds = signature.args
    v = _Nibbles(builder, _Constants(context, builder, kinds[4], values[4]))
    codes = _codes(context, builder, v, kinds[0], values[0], values[1])
    numbers = builder.fmul(v.look_up(codes), v.join(values[2], values[3]))
    place = _place(context, builder, kinds[5], values[5], values[1], numbers.type)
    builder.store(numbers, place, align=4)
