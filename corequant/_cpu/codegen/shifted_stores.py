"""Streamed stores to a result that doesn't start on a line of cache.

A store that bypasses the cache pays only if it fills a whole line. Large NumPy arrays start 16
bytes into one. So a unit's numbers are put together in the scratch, as far into a line as the
result is, and then copied line by line; what is left of the last line waits there for the next
unit.
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
    """Emits the copy from ``scratch`` to ``dst``, which must be a multiple of 4."""

    def __init__(self, v: Vectors, dst: Any, scratch: Any) -> None:
        b = self.b = v.builder
        self.v = v
        self.scratch = scratch
        address = b.ptrtoint(dst, _WORD)
        self.shift = b.and_(address, int64(VECTOR_BYTES - 1))
        self.lines = b.inttoptr(b.sub(address, self.shift), dst.type)
        self.place = v.address(scratch, self.shift)
        undefined = ir.Constant(_LINE, ir.Undefined)
        shift = b.trunc(b.lshr(self.shift, int64(2)), _INT32)
        single = b.insert_element(undefined, shift, ir.Constant(_INT32, 0))
        everywhere = b.shuffle_vector(single, undefined, ir.Constant(_LINE, [0] * _LINE.count))
        counted = ir.Constant(_LINE, list(range(_LINE.count)))
        self.ours = b.icmp_unsigned(">=", counted, everywhere)

    def write(self, unit: Any, size: int) -> None:
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
        v.store(self._line(size), self.scratch, VECTOR_BYTES)

    def finish(self, units: Any, size: int) -> None:
        """Write what is left of the last line."""
        end = self.v.address(self.lines, self.b.mul(units, int64(size)))
        self._store_where(self.b.not_(self.ours), self._line(0), end)

    def _line(self, offset: Any) -> Any:
        pointer = self.v.address(self.scratch, offset)
        loaded = self.b.load(self.b.bitcast(pointer, _LINE.as_pointer()))
        loaded.align = VECTOR_BYTES
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
