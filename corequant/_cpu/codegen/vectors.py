"""Vector code: the few LLVM instructions that a butterfly network consists of.

A vector is 64 bytes of the dtype that is computed in, whatever the processor: LLVM splits it where
registers are shorter. Storage may be narrower, float16 or bfloat16; conversion happens between
memory and register. Nothing here knows a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.compiler import converts_halves

__all__ = ["VECTOR_BYTES", "Vectors", "compute_dtype", "counted", "int64", "lanes_of"]

VECTOR_BYTES = 64

_WORD = ir.IntType(64)
_INT32 = ir.IntType(32)
_INT16 = ir.IntType(16)
_BYTE = ir.IntType(8)
_EXACT = ("contract",)
"""A product with ±1 is exact, so that fusing it with the sum changes no bit."""

_REBIAS = 2.0**112
"""Exponents are biased by 127 in float32, by 15 in float16."""


def compute_dtype(dtype: str) -> str:
    """Name the dtype that arrays of ``dtype`` are computed in."""
    return "float64" if dtype == "float64" else "float32"


def lanes_of(dtype: str) -> int:
    """Count the numbers in a vector."""
    return 8 if dtype == "float64" else 16


def int64(value: Any) -> Any:
    """Return an integer as a constant of 64 bits; an LLVM value is returned unchanged."""
    return ir.Constant(_WORD, value) if isinstance(value, int) else value


@contextmanager
def counted(builder: Any, stop: Any, start: int = 0, step: int = 1) -> Iterator[Any]:
    """Repeat what is emitted inside for ``range(start, stop, step)``; yields the index."""
    entry = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_WORD)
    index.add_incoming(int64(start), entry)
    builder.cbranch(builder.icmp_signed("<", index, int64(stop)), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, int64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


class Vectors:
    """Emits vector code for arrays of one dtype at the builder's position.

    ``size`` is the bytes of a vector of the computed dtype: 64, or half of it.
    """

    def __init__(self, builder: Any, dtype: str, size: int = VECTOR_BYTES) -> None:
        self.builder = builder
        self.dtype = dtype
        self.lanes = lanes_of(dtype) * size // VECTOR_BYTES
        self.scalar = ir.DoubleType() if dtype == "float64" else ir.FloatType()
        self.kind = ir.VectorType(self.scalar, self.lanes)
        self.bytes = size
        stored = {"float16": ir.HalfType(), "bfloat16": _INT16}.get(dtype, self.scalar)
        self.stored_kind = ir.VectorType(stored, self.lanes)
        self.stored_bytes = size // (2 if dtype in ("float16", "bfloat16") else 1)

    def address(self, base: Any, offset: Any) -> Any:
        """Step ``offset`` bytes, a number or a value, from the byte pointer ``base``."""
        return self.builder.gep(base, [int64(offset)])

    def load(self, pointer: Any) -> Any:
        """Read a vector of the computed dtype."""
        return self._load(pointer, self.kind)

    def load_stored(self, pointer: Any) -> Any:
        """Read a vector as it lies in the array, widened."""
        raw = self._load(pointer, self.stored_kind)
        if self.dtype == "float16" and converts_halves():
            return self.builder.fpext(raw, self.kind)
        if self.dtype == "float16":
            return _widen_halves(self.builder, raw)
        if self.dtype == "bfloat16":
            wide = self.builder.zext(raw, ir.VectorType(_INT32, self.lanes))
            return self.builder.bitcast(self.builder.shl(wide, self._integers(16)), self.kind)
        return raw

    def load_split(self, pointer: Any) -> list[Any]:
        """Read two vectors' worth of bfloat16: the even numbers, and the odd ones.

        Each pair is one word of 32 bits, so that a shift and a mask widen them.
        """
        words = self._load(pointer, ir.VectorType(_INT32, self.lanes))
        even = self.builder.shl(words, self._integers(16))
        odd = self.builder.and_(words, self._integers(0xFFFF0000))
        return [self.builder.bitcast(half, self.kind) for half in (even, odd)]

    def store_split(self, even: Any, odd: Any, pointer: Any, stream: bool = False) -> None:
        """Write the even and the odd numbers of two vectors as bfloat16, rounded half to even."""
        low = self.builder.lshr(self._rounded(even), self._integers(16))
        high = self.builder.and_(self._rounded(odd), self._integers(0xFFFF0000))
        self.store(self.builder.or_(low, high), pointer, self.bytes if stream else 2, stream)

    def load_signs(self, pointer: Any, nibble: int = 0) -> Any:
        """Read a bit for each lane; of four lanes those of the byte's lower or upper half."""
        kind = ir.IntType(max(8, self.lanes))
        bits = self.builder.load(self._cast(pointer, kind))
        bits.align = 1
        if self.lanes < 8:
            shifted = self.builder.lshr(bits, ir.Constant(kind, 4 * nibble))
            bits = self.builder.trunc(shifted, ir.IntType(self.lanes))
        return self.builder.bitcast(bits, ir.VectorType(ir.IntType(1), self.lanes))

    def negate_where(self, negative: Any, vector: Any) -> Any:
        """Flip the signs of the lanes that ``load_signs`` tells."""
        return self.builder.select(negative, self.builder.fneg(vector), vector)

    def narrow(self, number: Any) -> Any:
        """Turn a double into a number of the computed dtype."""
        wide = self.scalar_bytes == 8
        return number if wide else self.builder.fptrunc(number, self.scalar)

    def load_scalar(self, pointer: Any) -> Any:
        """Read one number of the computed dtype into every lane."""
        return self.splat(self.builder.load(self._cast(pointer, self.scalar)))

    def store(self, vector: Any, pointer: Any, align: int = 0, stream: bool = False) -> None:
        """Write a vector of the computed dtype; ``stream`` bypasses the cache."""
        instruction = self.builder.store(vector, self._cast(pointer, vector.type))
        instruction.align = align or self.scalar_bytes
        if stream:
            one = self.builder.module.add_metadata([ir.Constant(_INT32, 1)])
            instruction.set_metadata("nontemporal", one)

    def store_stored(self, vector: Any, pointer: Any, align: int = 0, stream: bool = False) -> None:
        """Write a vector as it lies in the array, rounded half to even."""
        if self.dtype == "float16" and converts_halves():
            vector = self.builder.fptrunc(vector, self.stored_kind)
        elif self.dtype == "float16":
            vector = _narrow_halves(self.builder, vector)
        elif self.dtype == "bfloat16":
            vector = self._round_to_bfloat16(vector)
        self.store(vector, pointer, align or self.stored_bytes // self.lanes, stream)

    @property
    def scalar_bytes(self) -> int:
        """Bytes of one number of the computed dtype."""
        return self.bytes // self.lanes

    def splat(self, value: Any) -> Any:
        """Put one number into every lane."""
        undefined = ir.Constant(self.kind, ir.Undefined)
        single = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self._shuffle(single, [0] * self.lanes)

    def scale(self, vector: Any, factor: Any) -> Any:
        """Multiply, with one rounding of its own."""
        return self.builder.fmul(vector, factor)

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """Return a·b + c of vectors or numbers, rounded once; where ``fuses()``."""
        lanes = f"v{self.lanes}" if isinstance(a.type, ir.VectorType) else ""
        name = f"llvm.fma.{lanes}f{8 * self.scalar_bytes}"
        return self.builder.call(self.declared(name, a.type, [a.type] * 3), [a, b, c])

    def lane_butterfly(self, vector: Any, half: int) -> Any:
        """Replace lanes i and i + half by their sum and difference."""
        partner = self._shuffle(vector, [i ^ half for i in range(self.lanes)])
        return self._add_signed(partner, vector, half)

    def load_butterfly(self, pointer: Any, twin: Any) -> Any:
        """Load and do the first butterfly, both shuffles left to the load ports.

        Both pointers mean the same address. LLVM must not know it, or else it would load once and
        shuffle in registers, on the one port that the other butterflies are short of.
        """
        even = self._shuffle(self._load(pointer, self.kind), [i & ~1 for i in range(self.lanes)])
        odd = self._shuffle(self._load(twin, self.kind), [i | 1 for i in range(self.lanes)])
        return self._add_signed(even, odd, 1)

    def butterflies(
        self, vectors: list[Any], fused: Any = None, plain_last: bool = False
    ) -> list[Any]:
        """Sylvester's transform across a power of two of vectors, small distances first.

        ``fused``, a vector of -1, lets the units that multiply take the differences, with
        ``plain_last`` those of all stages but the last.
        """
        vectors = list(vectors)
        half = 1
        while half < len(vectors):
            if plain_last and 2 * half == len(vectors):
                fused = None
            for i in range(len(vectors)):
                if not i & half:
                    a, b = vectors[i], vectors[i | half]
                    vectors[i] = self.builder.fadd(a, b)
                    vectors[i | half] = self._difference(a, b, fused)
            half *= 2
        return vectors

    def _difference(self, a: Any, b: Any, fused: Any) -> Any:
        if fused is None:
            return self.builder.fsub(a, b)
        negative = self.builder.fmul(b, fused, flags=_EXACT)
        return self.builder.fadd(negative, a, flags=_EXACT)

    def minus_one(self) -> Any:
        """Put -1 into every lane, out of LLVM's sight: it would make subtractions of products."""
        module = self.builder.module
        name = "corequant_minus_one"
        cell = module.globals.get(name)
        if cell is None:
            cell = ir.GlobalVariable(module, self.scalar, name)
            cell.initializer = ir.Constant(self.scalar, -1.0)
        return self.splat(self.builder.load(cell))

    def add(self, a: Any, b: Any) -> Any:
        """Sum of two vectors."""
        return self.builder.fadd(a, b)

    def subtract(self, a: Any, b: Any) -> Any:
        """Difference of two vectors."""
        return self.builder.fsub(a, b)

    def negate(self, a: Any) -> Any:
        """Flip the signs."""
        return self.builder.fneg(a)

    def constant(self, value: float) -> Any:
        """Put one known number into every lane."""
        return ir.Constant(self.kind, [value] * self.lanes)

    def magnitude(self, vector: Any) -> Any:
        """Drop the signs."""
        function = self.declared(
            f"llvm.fabs.v{self.lanes}f{8 * self.scalar_bytes}", vector.type, [vector.type]
        )
        return self.builder.call(function, [vector])

    def minimum(self, a: Any, b: Any) -> Any:
        """Smaller of two vectors or numbers, neither of them NaN, lane by lane."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """Larger of two vectors or numbers, neither of them NaN, lane by lane."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def reduced(self, values: list[Any], choose: Callable[[Any, Any], Any]) -> Any:
        """Reduce vectors to one; what is carried from turn to turn comes first."""
        carried, *others = values
        # Pairs first, so that the carried one waits for one step only.
        while len(others) > 1:
            pairs = zip(others[::2], others[1::2], strict=False)
            left = others[-1:] if len(others) % 2 else []
            others = [choose(a, b) for a, b in pairs] + left
        return choose(others[0], carried) if others else carried

    def across(self, vector: Any, choose: Callable[[Any, Any], Any]) -> Any:
        """Reduce the lanes of a vector to one number."""
        half = self.lanes // 2
        while half:
            other = self._shuffle(vector, [i ^ half for i in range(self.lanes)])
            vector = choose(vector, other)
            half //= 2
        return self.builder.extract_element(vector, ir.Constant(_INT32, 0))

    def nearest(self, value: Any) -> Any:
        """Round a vector or a number to integers, half to even."""
        lanes = f"v{self.lanes}" if isinstance(value.type, ir.VectorType) else ""
        name = f"llvm.rint.{lanes}f{8 * self.scalar_bytes}"
        return self.builder.call(self.declared(name, value.type, [value.type]), [value])

    def prefetch(self, pointer: Any) -> None:
        """Ask for a line of cache, into the second level."""
        parameters = [_BYTE.as_pointer(), _INT32, _INT32, _INT32]
        function = self.declared("llvm.prefetch.p0", ir.VoidType(), parameters)
        read, second_level, data = (ir.Constant(_INT32, k) for k in (0, 2, 1))
        self.builder.call(function, [pointer, read, second_level, data])

    def word(self, table: Any, row: Any) -> Any:
        """Read a 64-bit integer of a table."""
        words = self.builder.bitcast(table, _WORD.as_pointer())
        return self.builder.load(self.builder.gep(words, [row]))

    def fence(self) -> None:
        """Make streamed stores visible before whatever follows."""
        self.builder.fence("seq_cst")

    def declared(self, name: str, result: Any, parameters: list[Any]) -> Any:
        """Return one of LLVM's own functions."""
        module = self.builder.module
        known = module.globals.get(name)
        return known or ir.Function(module, ir.FunctionType(result, parameters), name)

    def _add_signed(self, a: Any, b: Any, half: int) -> Any:
        signs = [-1.0 if i & half else 1.0 for i in range(self.lanes)]
        signed = self.builder.fmul(b, ir.Constant(self.kind, signs), flags=_EXACT)
        return self.builder.fadd(signed, a, flags=_EXACT)

    def _round_to_bfloat16(self, vector: Any) -> Any:
        rounded = self.builder.lshr(self._rounded(vector), self._integers(16))
        return self.builder.trunc(rounded, self.stored_kind)

    def _rounded(self, vector: Any) -> Any:
        """Bits of float32, the upper half of them rounded to bfloat16."""
        # A NaN made from bfloat16 numbers has no bits below the sixteenth: the carry can't harm it.
        b = self.builder
        bits = b.bitcast(vector, ir.VectorType(_INT32, self.lanes))
        odd = b.icmp_unsigned("!=", b.and_(bits, self._integers(0x10000)), self._integers(0))
        return b.add(bits, b.select(odd, self._integers(0x8000), self._integers(0x7FFF)))

    def _integers(self, value: int) -> Any:
        return ir.Constant(ir.VectorType(_INT32, self.lanes), [value] * self.lanes)

    def _shuffle(self, vector: Any, mask: list[int]) -> Any:
        undefined = ir.Constant(vector.type, ir.Undefined)
        places = ir.Constant(ir.VectorType(_INT32, len(mask)), mask)
        return self.builder.shuffle_vector(vector, undefined, places)

    def _cast(self, pointer: Any, kind: Any) -> Any:
        return self.builder.bitcast(pointer, kind.as_pointer())

    def _load(self, pointer: Any, kind: Any) -> Any:
        loaded = self.builder.load(self._cast(pointer, kind))
        loaded.align = self.stored_bytes // self.lanes if kind is self.stored_kind else 4
        return loaded


def _widen_halves(b: Any, raw: Any) -> Any:
    """Convert a vector of float16 to float32, exactly."""
    c = _HalfConstants(raw.type.count)
    bits = b.zext(b.bitcast(raw, c.halves), c.words)
    magnitude = b.shl(b.and_(bits, c.word(0x7FFF)), c.word(13))
    # The product is exact, and brings subnormal numbers to their place.
    value = b.bitcast(b.fmul(b.bitcast(magnitude, c.floats), c.real(_REBIAS)), c.words)
    special = b.icmp_unsigned(">=", magnitude, c.word(0x7C00 << 13))
    value = b.select(special, b.or_(magnitude, c.word(0x7F800000)), value)
    sign = b.shl(b.and_(bits, c.word(0x8000)), c.word(16))
    return b.bitcast(b.or_(value, sign), c.floats)


def _narrow_halves(b: Any, vector: Any) -> Any:
    """Convert a vector of float32 to float16, half to even."""
    c = _HalfConstants(vector.type.count)
    bits = b.bitcast(vector, c.words)
    magnitude = b.and_(bits, c.word(0x7FFFFFFF))
    # Below 2^-14 steps are 2^-24, the last place of 0.5: adding it rounds.
    half = b.fadd(b.bitcast(magnitude, c.floats), c.real(0.5))
    small = b.sub(b.bitcast(half, c.words), c.word(0x3F000000))
    odd = b.and_(b.lshr(magnitude, c.word(13)), c.word(1))
    carried = b.add(b.add(magnitude, c.word(0xFFF)), odd)
    normal = b.lshr(b.sub(carried, c.word(112 << 23)), c.word(13))
    result = b.select(b.icmp_unsigned("<", magnitude, c.word(113 << 23)), small, normal)
    # From 65520 on, half a step above the largest number, the result is infinite.
    infinite = b.icmp_unsigned(">=", magnitude, c.word(0x477FF000))
    result = b.select(infinite, c.word(0x7C00), result)
    unknown = b.icmp_unsigned(">", magnitude, c.word(0x7F800000))
    result = b.select(unknown, c.word(0x7E00), result)
    sign = b.and_(b.lshr(bits, c.word(16)), c.word(0x8000))
    return b.bitcast(b.trunc(b.or_(result, sign), c.halves), ir.VectorType(ir.HalfType(), c.count))


class _HalfConstants:
    """Types and constants of one length of vector."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.words = ir.VectorType(_INT32, count)
        self.halves = ir.VectorType(ir.IntType(16), count)
        self.floats = ir.VectorType(ir.FloatType(), count)

    def word(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.count)

    def real(self, value: float) -> Any:
        return ir.Constant(self.floats, [value] * self.count)
