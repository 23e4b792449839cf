"""Columns of vectors on lines of cache, in an array that begins anywhere in one.

A pass that combines rows may take its vectors from anywhere in them, as long as it takes the same
place of each. From the first line that begins in a row on, vectors lie on lines, whose stores cost
half as much as those across two. What is left of a row, its beginning and its end, makes up one
more vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64

__all__ = ["Column", "WholeLines"]

_WORD = ir.IntType(64)
_INT32 = ir.IntType(32)


class WholeLines:
    """Tells the columns of an array's rows.

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

    def columns(self, start: Any, row: int, count: int) -> Iterator[tuple[Any, Column]]:
        """Emit a loop over the columns of rows of ``row`` bytes from ``start`` on, then the last.

        What is emitted for a column is repeated for it; yields its number with it.
        """
        lines = self.v.address(start, self.b.neg(self.before))
        with counted(self.b, count, start=1) as number:
            at = self.v.address(lines, self.b.mul(number, int64(VECTOR_BYTES)))
            yield number, Column(self, at, row, whole=True)
        yield int64(0), Column(self, lines, row, whole=False)


class Column:
    """The same vector of each of the rows.

    One that is not ``whole`` is the beginnings of all rows, from within a line, and their ends.
    """

    def __init__(self, lines: WholeLines, start: Any, row: int, *, whole: bool) -> None:
        self.lines, self.v, self.b = lines, lines.v, lines.b
        self.start, self.row, self.whole = start, row, whole

    def load(self, k: Any) -> Any:
        """Read the vector of row ``k``, a number or a value."""
        at = self._line(k)
        if self.whole:
            return self.v.load(at)
        nothing = ir.Constant(self.v.kind, ir.Undefined)
        beginning = self._masked_load(at, self.lines.begun, nothing)
        return self._masked_load(self.v.address(at, self.row), self.lines.ending, beginning)

    def store(self, k: Any, vector: Any) -> None:
        """Write the vector of row ``k``."""
        at = self._line(k)
        if self.whole:
            self.v.store(vector, at)
            return
        self._masked_store(at, self.lines.begun, vector)
        self._masked_store(self.v.address(at, self.row), self.lines.ending, vector)

    def _line(self, k: Any) -> Any:
        offset = k * self.row if isinstance(k, int) else self.b.mul(k, int64(self.row))
        return self.v.address(self.start, offset)

    def _masked_load(self, at: Any, mask: Any, otherwise: Any) -> Any:
        pointer, align = self._pointer(at)
        kinds = [pointer.type, _INT32, mask.type, self.v.kind]
        function = self.v.declared(f"llvm.masked.load.{self._name}", self.v.kind, kinds)
        return self.b.call(function, [pointer, align, mask, otherwise])

    def _masked_store(self, at: Any, mask: Any, vector: Any) -> None:
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
