"""Permute, sign, rotate and quantize in one pass over memory, a row at a time.

A row is brought into the scratch, rotated there, measured and rounded while it is in the cache.
Each step does what its own kernel does, operation by operation, so that the codes are the same
bits: the affine grids are those of ``group_passes``, the block-scaled ones those of the OCP's
microscaling formats. Between rotating and rounding the row is held in the array's own dtype, as it
would be.

Bit-exact twin: `corequant._cpu.loops.group_passes`, `corequant_torch.gpu.fusion`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

from llvmlite import ir

from corequant._cpu.codegen.compiler import build, fuses
from corequant._cpu.codegen.cores import choices
from corequant._cpu.codegen.generator import Body
from corequant._cpu.codegen.plans import Plan, tuning
from corequant._cpu.codegen.row_steps import (
    TOGETHER,
    Extremes,
    Inverse,
    Task,
    corrected,
    divided,
    integers_of,
    inverse,
    narrows,
    usual,
)
from corequant._cpu.codegen.shifted_stores import ShiftedStores
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64

__all__ = ["fused_context", "fused_kernel", "fused_scratch"]

_WORD = ir.IntType(64)
_INT32 = ir.IntType(32)
_BYTE = ir.IntType(8)

_CONTEXT = struct.Struct("10q5d")

_FUSED = ("contract",)
"""Products with zero are exact, so that fusing them with a sum changes no bit."""


def fused_scratch(plan: Plan, length: int, group: int) -> int:
    """Bytes of scratch that a fused kernel needs for rows of ``length``, 64-aligned."""
    row = length * (Vectors(None, plan.dtype).stored_bytes // plan.lanes) + 3 * VECTOR_BYTES
    each = -(-(length // group) // plan.lanes) * VECTOR_BYTES
    return row + len(_Parameters._fields) * each + plan.scratch


@lru_cache(maxsize=256)
def fused_kernel(plan: Plan, task: Task) -> Callable[..., None]:
    """Return the kernel.

    Its parameters are the address of what ``fused_context`` returns, the first row, how many rows,
    and a scratch. Its attribute ``choices`` belongs into the context.
    """
    key = f"fused {plan} {sorted(asdict(task).items())}"
    kernel: Any = build(key, "siii", lambda b, given: _Rows(b, plan, task, given).emit())
    kernel.choices = choices(plan.core, plan.inverse)
    return kernel  # type: ignore[no-any-return]


def fused_context(
    length: int, group: int, addresses: Sequence[int], numbers: Sequence[float]
) -> bytes:
    """Pack what a fused kernel needs in addition to its rows.

    Parameters
    ----------
    length, group : int
        Numbers in a row, a multiple of the plan's unit, and in a group, which divides it.
    addresses : sequence of int
        Addresses of the array, the codes, scales and zero points of all rows, the permutation (d
        numbers of ``index_dtype(d)``), ``sign_bits``, an int64 that becomes 1 if a rotated number
        is not finite, and the core's ``choices``.
    numbers : sequence of float
        The scale of the rotation, the ends of the grid, the smallest scale, and the largest number
        that a code may stand for.
    """
    return _CONTEXT.pack(*addresses, length, group, *numbers)


class _Parameters(NamedTuple):
    """What a group has of its own, or the addresses of it for all groups of a row."""

    low: Any
    high: Any
    scale: Any
    zero: Any
    reciprocal: Any
    rest: Any
    """What the reciprocal lacks, for it is rounded."""


class _Rows:
    """The body of a fused kernel."""

    def __init__(self, builder: Any, plan: Plan, task: Task, arguments: Any) -> None:
        self.b = builder
        self.plan = plan
        self.task = task
        self.v = Vectors(builder, plan.dtype)
        context, self.first, self.rows, self.scratch = arguments
        words, reals = (self._given(context, kind) for kind in (_WORD, ir.DoubleType()))
        (self.src, self.out, self.scales, self.zeros) = words[:4]
        (self.permutation, self.signs, self.status, self.choices, self.length) = words[4:9]
        self.scale, self.least, self.most, self.tiny, self.huge = map(self.v.narrow, reals[10:])
        self.group = int64(task.group) if task.group else words[9]
        self.vectors = builder.udiv(self.group, int64(self.v.lanes))
        self.groups = int64(1) if task.whole else builder.udiv(self.length, self.group)
        """Numbers in a row and in a group, vectors in a group, groups in a row."""

    def emit(self) -> None:
        """Emit the loop over rows."""
        b, v, task = self.b, self.v, self.task
        stored = v.stored_bytes // v.lanes
        row_bytes = self._times(self.length, stored)
        lines = b.and_(b.add(row_bytes, int64(2 * VECTOR_BYTES - 1)), int64(-VECTOR_BYTES))
        zero = ir.Constant(v.scalar, 0.0)
        self.doubt = self._variable(zero)
        self.extremes = Extremes(v, task.symmetric)
        # What is rounded to the array's dtype after the rotation has another range, and ``see``
        # takes whole vectors only.
        whole = v.stored_bytes == VECTOR_BYTES and not self.plan.halved
        self.seen = whole and task.whole
        # The line before the row is for shifted stores.
        rotated = b.add(self.scratch, int64(VECTOR_BYTES))
        kept = b.add(rotated, lines)
        self.scale_vectors = b.udiv(b.add(self.groups, int64(v.lanes - 1)), int64(v.lanes))
        each = b.mul(self.scale_vectors, int64(VECTOR_BYTES))
        count = len(_Parameters._fields)
        rest = b.add(kept, b.mul(each, int64(count)))
        own = _Parameters(
            *(self._pointer(b.add(kept, b.mul(each, int64(i)))) for i in range(count))
        )
        units = b.udiv(self.length, int64(self.plan.unit))
        written = stored if task.grid == "values" else 1
        begin = self._pointer(b.add(self.out, b.mul(self.first, row_bytes)))
        shifted = ShiftedStores(v, begin, self._pointer(rotated))
        with counted(b, self.rows) as turn:
            row = b.add(self.first, turn)
            source = b.add(self.src, b.mul(row, row_bytes))
            if task.permuted:
                self._gather(source, rotated)
                source = rotated
            if self.seen:
                self.extremes.begin()
            nothing = int64(0)
            Body(
                b,
                self.plan,
                (
                    *(source, source, rotated, nothing, nothing, units, self.signs),
                    *(self.length, nothing, self.scale, rest, self.choices),
                ),
                self.extremes.see if self.seen else None,
            ).emit()
            width = self._times(self.length, written)
            target = self._pointer(b.add(self.out, b.mul(row, width)))
            values = self._pointer(rotated)
            target = values if task.stores == "shifted" else target
            if task.grid == "float4":
                with counted(b, self.groups) as group:
                    here = v.address(target, b.mul(group, self.group))
                    number = b.add(b.mul(row, self.groups), group)
                    self._float4(self._group(values, group), here, number)
            else:
                self._affine(values, target, row, own, self._following(source))
            if task.stores == "shifted":
                shifted.write(turn, row_bytes)
        if task.stores == "shifted":
            shifted.finish(self.rows, row_bytes)
        if task.stores != "ordinary":
            v.fence()
        with b.if_then(b.fcmp_unordered("!=", b.load(self.doubt), zero)):
            status = b.inttoptr(self.status, _WORD.as_pointer())
            b.store(int64(1), status)

    def _gather(self, source: Any, target: Any) -> None:
        """Copy the channels in their new order, and fetch the next row meanwhile."""
        b, v = self.b, self.v
        line = self.task.line
        stored = v.stored_bytes // v.lanes
        number = ir.IntType(8 * stored)
        base, to = (b.inttoptr(a, number.as_pointer()) for a in (source, target))
        next_row = v.address(self._pointer(source), self._times(self.length, stored))
        # Gather instructions take 18 cycles for 16 numbers, single stores 13 on Zen 5, this 10.5.
        with counted(b, b.udiv(self.length, int64(line))) as turn:
            start = b.mul(turn, int64(line))
            for k in range(0, line * stored, VECTOR_BYTES):
                v.prefetch(v.address(next_row, b.add(b.mul(start, int64(stored)), int64(k))))
            gathered = ir.Constant(ir.VectorType(number, line), ir.Undefined)
            for k, chosen in enumerate(self._indices(start)):
                loaded = b.load(b.gep(base, [chosen]))
                if tuning().inserted:
                    gathered = b.insert_element(gathered, loaded, ir.Constant(_INT32, k))
                else:
                    b.store(loaded, b.gep(to, [b.add(start, int64(k))]))
            if tuning().inserted:
                v.store(gathered, v.address(self._pointer(target), b.mul(start, int64(stored))))

    def _indices(self, start: Any) -> Iterator[Any]:
        """Read the indices of a line, several at a time: loads are what gathering is short of."""
        b = self.b
        bits = 32 if self.task.wide else 16
        words = b.inttoptr(self.permutation, _WORD.as_pointer())
        each = 64 // bits
        for k in range(0, self.task.line, each):
            word = b.load(b.gep(words, [b.udiv(b.add(start, int64(k)), int64(each))]))
            for _ in range(each):
                yield b.and_(word, int64((1 << bits) - 1))
                word = b.lshr(word, int64(bits))

    def _range(self, values: Any) -> tuple[Any, Any]:
        """Return the ends of a group's range, and note what is not finite.

        ``values`` is None for those that have been seen already.
        """
        if values is not None:
            self.extremes.begin()
            with self._runs(values) as (_, loaded):
                self.extremes.see(loaded)
        ends = self.extremes.ends()
        b = self.b
        for end in ends[self.task.symmetric :]:
            doubt = b.fmul(end, ir.Constant(self.v.scalar, 0.0), flags=_FUSED)
            b.store(b.fadd(doubt, b.load(self.doubt), flags=_FUSED), self.doubt)
        return ends

    @contextmanager
    def _runs(self, values: Any, ahead: Any = None) -> Iterator[tuple[Any, list[Any]]]:
        """Go through the vectors of a group, several at a time; yields the first's number, too.

        As much is fetched from the address ``ahead``.
        """
        b, v = self.b, self.v
        with counted(b, self.vectors, step=self.task.together) as first:
            start = b.mul(first, int64(v.stored_bytes))
            places = [b.add(start, int64(k * v.stored_bytes)) for k in range(self.task.together)]
            if ahead is not None:
                for place in places:
                    v.prefetch(v.address(ahead, place))
            yield first, [v.load_stored(v.address(values, place)) for place in places]

    def _following(self, source: Any) -> Any:
        """Address of the next row where it is to be fetched while codes are written, or None.

        The processor fetches ahead only while it rotates, and the gather for itself.
        """
        if self.task.permuted or self.plan.ahead:
            return None
        stored = self.v.stored_bytes // self.v.lanes
        return self._pointer(self.b.add(source, self._times(self.length, stored)))

    def _group(self, values: Any, group: Any) -> Any:
        """Address of a group of the row."""
        stored = self.v.stored_bytes // self.v.lanes
        return self.v.address(values, self.b.mul(group, self._times(self.group, stored)))

    def _affine(self, values: Any, target: Any, row: Any, own: _Parameters, ahead: Any) -> None:
        """Measure all groups of a row, find their scales as vectors, then round them.

        One group after the other, each step would wait for the one before.
        """
        b, v, task = self.b, self.v, self.task
        groups = self.groups
        stored = v.stored_bytes // v.lanes
        written = stored if task.grid == "values" else 1
        with counted(b, groups) as group:
            low, high = self._range(None if self.seen else self._group(values, group))
            self._put(own.low, group, low)
            self._put(own.high, group, high)
        with counted(b, self.scale_vectors) as i:
            # Where groups are no whole vector, the rest of the last one is never looked at.
            at = [v.address(array, b.mul(i, int64(VECTOR_BYTES))) for array in own]
            wanted = self._parameters(v.load(at[0]), v.load(at[1]))
            for place, value in zip(at[2:], wanted, strict=True):
                v.store(value, place)
        with counted(b, groups) as group:
            number = b.add(b.mul(row, groups), group)
            found = _Parameters(*(self._get(array, group) for array in own))
            self._keep(self.scales, number, found.scale)
            if not task.symmetric:
                self._keep(self.zeros, number, found.zero)
            there = v.address(target, b.mul(group, self._times(self.group, written)))
            following = None if ahead is None else self._group(ahead, group)
            self._round(self._group(values, group), there, found, following)

    def _round(self, values: Any, target: Any, own: _Parameters, ahead: Any) -> None:
        """Write the codes of a group, or what they stand for."""
        v = self.v
        scales = v.splat(own.scale)

        def emit(quotient: Callable[[Any], Any]) -> None:
            with self._runs(values, ahead) as (first, loaded):
                turned = [quotient(x) for x in loaded]
                if self.task.grid == "codes" and narrows(v) and len(turned) == TOGETHER:
                    self._write_together(turned, own, target, first)
                else:
                    self._write_each(turned, own, target, first)

        if not fuses():
            emit(lambda x: divided(v, x, scales))
            return
        by = Inverse(v.splat(own.reciprocal), v.splat(own.rest))
        with self.b.if_else(usual(v, own.scale), likely=True) as (then, otherwise):
            with then:
                emit(lambda x: corrected(v, x, scales, by))
            with otherwise:
                emit(lambda x: divided(v, x, scales))

    def _write_together(self, four: list[Any], own: _Parameters, target: Any, first: Any) -> None:
        b = self.b
        zero, least, most = (b.fptosi(x, _BYTE) for x in (own.zero, self.least, self.most))
        codes = integers_of(self.v, four, zero, least, most)
        self.v.store(codes, self.v.address(target, b.mul(first, int64(self.v.lanes))), 1)

    def _write_each(self, turned: list[Any], own: _Parameters, target: Any, first: Any) -> None:
        b, v = self.b, self.v
        scales, zeros, shift = v.splat(own.scale), v.splat(own.zero), v.splat(self._shift)
        least, most = (
            v.splat(b.fadd(b.fsub(end, own.zero), self._shift)) for end in (self.least, self.most)
        )
        for k, quotient in enumerate(turned):
            i = b.add(first, int64(k))
            # The addition rounds half to even, and leaves an integer in the last bits.
            step = v.minimum(v.maximum(b.fadd(quotient, shift), least), most)
            if self.task.grid == "codes":
                code = step if self.task.symmetric else b.fadd(step, zeros)
                whole = ir.VectorType(ir.IntType(8 * v.scalar_bytes), v.lanes)
                self._write_bytes(b.bitcast(code, whole), target, i)
            else:
                value = b.fmul(b.fsub(step, shift), scales)
                at = v.address(target, b.mul(i, int64(v.stored_bytes)))
                streamed = self.task.stores == "streamed"
                v.store_stored(value, at, v.stored_bytes if streamed else 0, streamed)

    @property
    def _shift(self) -> Any:
        """A number from which on numbers are whole; an integer added to it lies in its last bits.

        Numbers too large for it end up beyond the ends of the grid, as they should.
        """
        scalar = self.v.scalar
        return ir.Constant(scalar, 1.5 * 2.0 ** (23 if self.v.scalar_bytes == 4 else 52))

    def _parameters(self, low: Any, high: Any) -> tuple[Any, Any, Any, Any]:
        """Find what follows from the ranges of as many groups as a vector has lanes.

        Scales and zero points are as ``quantize.py`` has them.
        """
        b, v = self.b, self.v
        nought, one, two = (v.constant(k) for k in (0.0, 1.0, 2.0))
        least, most, tiny, huge = map(v.splat, (self.least, self.most, self.tiny, self.huge))
        steps = b.fdiv(b.fsub(most, least), two)
        if self.task.symmetric:
            width = high
            widest = v.maximum(b.fneg(least), most)
        else:
            width = b.fsub(b.fdiv(high, two), b.fdiv(low, two))
        scale = v.maximum(b.fdiv(width, steps), tiny)
        empty = b.and_(b.fcmp_ordered("==", low, nought), b.fcmp_ordered("==", high, nought))
        zero = nought
        if not self.task.symmetric:
            zero = v.nearest(b.fsub(least, b.fdiv(low, scale)))
            zero = v.minimum(v.maximum(zero, least), most)
            widest = v.maximum(b.fsub(zero, least), b.fsub(most, zero))
            zero = b.select(empty, nought, zero)
        scale = b.select(empty, one, v.minimum(scale, b.fdiv(huge, widest)))
        return scale, zero, *inverse(v, scale)

    def _float4(self, values: Any, target: Any, number: Any) -> None:
        """Scale 2^(floor(log2 max|x|) - 2), at least 2^-127, and codes rounded half to even."""
        b, v = self.b, self.v
        bits = b.bitcast(self._range(values)[1], _INT32)
        exponent = b.lshr(bits, ir.Constant(_INT32, 23))
        biased = b.sub(exponent, ir.Constant(_INT32, 2))
        nought = ir.Constant(_INT32, 0)
        biased = b.select(b.icmp_signed("<", biased, nought), nought, biased)
        scales = self._pointer(self.scales)
        b.store(b.trunc(biased, _BYTE), v.address(scales, number))
        inverse = b.shl(b.sub(ir.Constant(_INT32, 254), biased), ir.Constant(_INT32, 23))
        factor = v.splat(b.bitcast(inverse, v.scalar))
        with counted(b, self.vectors) as i:
            x = v.load_stored(v.address(values, b.mul(i, int64(v.stored_bytes))))
            code = self._float4_code(b.fmul(x, factor))
            self._write_bytes(b.fptosi(code, ir.VectorType(_INT32, v.lanes)), target, i)

    def _float4_code(self, x: Any) -> Any:
        """Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6: three runs of even steps; 8 is the sign."""
        b, v = self.b, self.v
        constant = v.constant
        kind = ir.VectorType(_INT32, v.lanes)
        bits = b.bitcast(x, kind)
        magnitude = b.bitcast(b.and_(bits, ir.Constant(kind, [0x7FFFFFFF] * v.lanes)), v.kind)
        fine = v.nearest(b.fmul(magnitude, constant(2.0)))
        middle = b.fadd(v.nearest(magnitude), constant(2.0))
        coarse = b.fadd(v.nearest(b.fmul(magnitude, constant(0.5))), constant(4.0))
        code = b.select(b.fcmp_ordered("<", magnitude, constant(4.0)), middle, coarse)
        code = b.select(b.fcmp_ordered("<", magnitude, constant(2.0)), fine, code)
        code = v.minimum(code, constant(7.0))
        negative = b.icmp_signed("<", bits, ir.Constant(kind, [0] * v.lanes))
        return b.select(negative, b.fadd(code, constant(8.0)), code)

    def _write_bytes(self, codes: Any, target: Any, i: Any) -> None:
        """Write the lowest byte of each integer."""
        b, v = self.b, self.v
        small = b.trunc(codes, ir.VectorType(_BYTE, v.lanes))
        at = v.address(target, b.mul(i, int64(v.lanes)))
        b.store(small, b.bitcast(at, small.type.as_pointer())).align = 1

    def _times(self, value: Any, factor: int) -> Any:
        return self.b.mul(value, int64(factor))

    def _keep(self, array: Any, number: Any, value: Any) -> None:
        self._put(self._pointer(array), number, value)

    def _put(self, array: Any, number: Any, value: Any) -> None:
        pointer = self.b.bitcast(array, self.v.scalar.as_pointer())
        self.b.store(value, self.b.gep(pointer, [number]))

    def _get(self, array: Any, number: Any) -> Any:
        pointer = self.b.bitcast(array, self.v.scalar.as_pointer())
        return self.b.load(self.b.gep(pointer, [number]))

    def _given(self, context: Any, kind: Any) -> list[Any]:
        """Everything in the context, read as if it were of this kind."""
        b = self.b
        base = b.inttoptr(context, kind.as_pointer())
        return [b.load(b.gep(base, [int64(i)])) for i in range(_CONTEXT.size // 8)]

    def _variable(self, initial: Any) -> Any:
        with self.b.goto_entry_block():
            slot = self.b.alloca(initial.type)
        self.b.store(initial, slot)
        return slot

    def _pointer(self, address: Any) -> Any:
        return self.b.inttoptr(address, _BYTE.as_pointer())
