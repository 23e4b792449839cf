"""Streamed stores to a result that doesn't start on a line of cache.

A store that bypasses the cache pays only if it fills a whole line. Large NumPy arrays start 16
bytes into one. So a unit's numbers are put together in the scratch and copied from there line by
line; a line of the result lies across two of the scratch, which costs loads less than stores. The
last vector stays in front of the unit's place, for the next unit's first line.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64

__all__ = ["ShiftedStores"]

_WORD = ir.IntType(64)
_INT32 = ir.IntType(32)
_LINE = ir.VectorType(_INT32, VECTOR_BYTES // 4)


class ShiftedStores:
    """Emits the copy from ``place`` to ``dst``, which must be a multiple of 4.

    ``place`` is on a line of cache; the line before it is used, too.
    """

    def __init__(self, v: Vectors, dst: Any, place: Any) -> None:
        b = self.b = v.builder
        self.v = v
        self.place = place
        address = b.ptrtoint(dst, _WORD)
        self.shift = b.and_(address, int64(VECTOR_BYTES - 1))
        self.lines = b.inttoptr(b.sub(address, self.shift), dst.type)
        undefined = ir.Constant(_LINE, ir.Undefined)
        shift = b.trunc(b.lshr(self.shift, int64(2)), _INT32)
        single = b.insert_element(undefined, shift, ir.Constant(_INT32, 0))
        everywhere = b.shuffle_vector(single, undefined, ir.Constant(_LINE, [0] * _LINE.count))
        counted = ir.Constant(_LINE, list(range(_LINE.count)))
        self.ours = b.icmp_unsigned(">=", counted, everywhere)

    def write(self, unit: Any, size: Any) -> None:
        """Copy all whole lines of a unit of ``size`` bytes."""
        b, v = self.b, self.v
        start = v.address(self.lines, b.mul(unit, int64(size)))
        with b.if_else(b.icmp_unsigned("==", unit, int64(0))) as (first, later):
            with first:
                self._store_where(self.ours, self._line(0), start)
            with later:
                v.store(self._line(0), start, VECTOR_BYTES, stream=True)
        with counted(b, size, VECTOR_BYTES, VECTOR_BYTES) as at:
            v.store(self._line(at), v.address(start, at), VECTOR_BYTES, stream=True)
        last = self._load(v.address(self.place, b.sub(int64(size), int64(VECTOR_BYTES))))
        v.store(last, v.address(self.place, -VECTOR_BYTES), VECTOR_BYTES)

    def finish(self, units: Any, size: Any) -> None:
        """Write what is left of the last line."""
        end = self.v.address(self.lines, self.b.mul(units, int64(size)))
        self._store_where(self.b.not_(self.ours), self._line(0), end)

    def _line(self, offset: Any) -> Any:
        """Load what belongs into a line of the result."""
        return self._load(self.v.address(self.place, self.b.sub(int64(offset), self.shift)))

    def _load(self, pointer: Any) -> Any:
        loaded = self.b.load(self.b.bitcast(pointer, _LINE.as_pointer()))
        loaded.align = 4
        return loaded

    def _store_where(self, mask: Any, line: Any, pointer: Any) -> None:
        module = self.b.module
        name = f"llvm.masked.store.v{_LINE.count}i32.p0"
        function = module.globals.get(name)
        at = self.b.bitcast(pointer, _LINE.as_pointer())
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [_LINE, at.type, _INT32, mask.type])
            function = ir.Function(module, kind, name)
        self.b.call(function, [line, at, ir.Constant(_INT32, 4), mask])
