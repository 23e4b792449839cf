"""Columns of vectors on lines of cache, in an array that begins anywhere in one.

A pass that combines rows may take its vectors from anywhere in them, as long as it takes the same
place of each. From the first line that begins in a row on, vectors lie on lines, whose stores cost
half as much as those across two, and may bypass the cache. What is left of a row, its beginning and
its end, makes up one more vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64

__all__ = ["Column", "StreamedColumn", "StreamedLines", "WholeLines"]

_WORD = ir.IntType(64)
_INT32 = ir.IntType(32)


class _Lines:
    """Where lines begin in the rows of an array.

    ``array`` is a byte pointer to a vector of it, which begins within a line of cache, between two
    numbers.
    """

    def __init__(self, v: Vectors, array: Any) -> None:
        b = self.b = v.builder
        self.v = v
        self.before = b.and_(b.ptrtoint(array, _WORD), int64(VECTOR_BYTES - 1))
        """Bytes from the beginning of a line to that of a row."""
        kind = ir.VectorType(_WORD, v.lanes)
        places = ir.Constant(kind, [i * v.scalar_bytes for i in range(v.lanes)])
        undefined = ir.Constant(kind, ir.Undefined)
        single = b.insert_element(undefined, self.before, ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, v.lanes), [0] * v.lanes)
        everywhere = b.shuffle_vector(single, undefined, zeros)
        self.begun = b.icmp_unsigned(">=", places, everywhere)
        self.ending = b.not_(self.begun)
        """Which numbers of a row's first line are its own, and which the row before's."""

    def line(self, row: Any) -> Any:
        """Return the line in which a row begins."""
        return self.v.address(row, self.b.neg(self.before))

    def masked_load(self, at: Any, mask: Any, otherwise: Any) -> Any:
        """Read some numbers of a line."""
        pointer, align = self._pointer(at)
        kinds = [pointer.type, _INT32, mask.type, self.v.kind]
        function = self.v.declared(f"llvm.masked.load.{self._name}", self.v.kind, kinds)
        return self.b.call(function, [pointer, align, mask, otherwise])

    def masked_store(self, at: Any, mask: Any, vector: Any) -> None:
        """Write some numbers of a line."""
        pointer, align = self._pointer(at)
        kinds = [self.v.kind, pointer.type, _INT32, mask.type]
        function = self.v.declared(f"llvm.masked.store.{self._name}", ir.VoidType(), kinds)
        self.b.call(function, [vector, pointer, align, mask])

    def _pointer(self, at: Any) -> tuple[Any, Any]:
        pointer = self.b.bitcast(at, self.v.kind.as_pointer())
        return pointer, ir.Constant(_INT32, self.v.scalar_bytes)

    @property
    def _name(self) -> str:
        return f"v{self.v.lanes}f{8 * self.v.scalar_bytes}.p0"


class WholeLines(_Lines):
    """Tells the columns of an array's rows that are combined in the array itself."""

    def columns(self, start: Any, row: int, count: int) -> Iterator[tuple[Any, Column]]:
        """Emit a loop over the columns of rows of ``row`` bytes from ``start`` on, then the last.

        What is emitted for a column is repeated for it; yields its number with it.
        """
        lines = self.line(start)
        with counted(self.b, count, start=1) as number:
            at = self.v.address(lines, self.b.mul(number, int64(VECTOR_BYTES)))
            yield number, Column(self, at, row, whole=True)
        yield int64(0), Column(self, lines, row, whole=False)


class Column:
    """The same vector of each of the rows.

    One that is not ``whole`` is the beginnings of all rows, from within a line, and their ends.
    """

    def __init__(self, lines: _Lines, start: Any, row: int, *, whole: bool) -> None:
        self.lines, self.v, self.b = lines, lines.v, lines.b
        self.start, self.row, self.whole = start, row, whole

    def load(self, k: Any) -> Any:
        """Read the vector of row ``k``, a number or a value."""
        at = self._line(self.start, k)
        if self.whole:
            return self.v.load(at)
        nothing = ir.Constant(self.v.kind, ir.Undefined)
        beginning = self.lines.masked_load(at, self.lines.begun, nothing)
        return self.lines.masked_load(self.v.address(at, self.row), self.lines.ending, beginning)

    def store(self, k: Any, vector: Any) -> None:
        """Write the vector of row ``k``; rows are written in their order."""
        at = self._line(self.start, k)
        if self.whole:
            self.v.store(vector, at)
            return
        self.lines.masked_store(at, self.lines.begun, vector)
        self.lines.masked_store(self.v.address(at, self.row), self.lines.ending, vector)

    def _line(self, start: Any, k: Any) -> Any:
        offset = k * self.row if isinstance(k, int) else self.b.mul(k, int64(self.row))
        return self.v.address(start, offset)


class StreamedLines(_Lines):
    """Tells the columns of rows that come from the scratch and bypass the cache on their way.

    The scratch holds one unit. What ends a unit waits for the beginning of the next one, with which
    it makes up a line.
    """

    def __init__(self, v: Vectors, dst: Any, scratch: Any) -> None:
        super().__init__(v, dst)
        self.dst, self.scratch = dst, scratch
        with self.b.goto_entry_block():
            self.end = self.b.alloca(v.kind)
        self.end.align = VECTOR_BYTES

    def columns(
        self, unit: Any, size: int, row: int, count: int
    ) -> Iterator[tuple[Any, StreamedColumn]]:
        """Emit a loop over the columns of rows of ``row`` bytes in a unit of ``size``."""
        source = self.line(self.scratch)
        target = self.v.address(self.line(self.dst), self.b.mul(unit, int64(size)))
        with counted(self.b, count, start=1) as number:
            at = self.b.mul(number, int64(VECTOR_BYTES))
            places = (self.v.address(source, at), self.v.address(target, at))
            yield number, StreamedColumn(self, unit, *places, row, whole=True)
        yield int64(0), StreamedColumn(self, unit, source, target, row, whole=False)

    def finish(self, units: Any, size: int) -> None:
        """Write what is left of the last line."""
        at = self.v.address(self.line(self.dst), self.b.mul(units, int64(size)))
        self.masked_store(at, self.ending, self.b.load(self.end))


class StreamedColumn(Column):
    """A column of ``StreamedLines``; ``source`` and ``target`` are lines of the first row."""

    lines: StreamedLines

    def __init__(
        self, lines: StreamedLines, unit: Any, source: Any, target: Any, row: int, *, whole: bool
    ) -> None:
        super().__init__(lines, target, row, whole=whole)
        self.unit, self.source = unit, source

    def load(self, k: Any) -> Any:
        """Read the vector of row ``k``."""
        at = self._line(self.source, k)
        first = self.v.load(at)
        if self.whole:
            return first
        # What doesn't belong to the row is another one's, or lies beside the unit in the scratch.
        last = self.v.load(self.v.address(at, self.row))
        return self.b.select(self.lines.begun, first, last)

    def store(self, k: Any, vector: Any) -> None:
        """Write the vector of row ``k``."""
        at = self._line(self.start, k)
        if self.whole:
            self.v.store(vector, at, VECTOR_BYTES, stream=True)
            return
        before = self.b.load(self.lines.end)
        self.b.store(vector, self.lines.end)
        line = self.b.select(self.lines.begun, vector, before)
        if isinstance(k, int) and k > 0:
            self.v.store(line, at, VECTOR_BYTES, stream=True)
            return
        number = self.b.or_(int64(k), self.unit)
        with self.b.if_else(self.b.icmp_unsigned("==", number, int64(0))) as (first, later):
            with first:
                self.lines.masked_store(at, self.lines.begun, vector)
            with later:
                self.v.store(line, at, VECTOR_BYTES, stream=True)
