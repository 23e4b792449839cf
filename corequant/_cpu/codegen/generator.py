"""The generator: turns a plan into one LLVM function body, loops and all.

Numbers of a block have the address (chunk, vector): along rows a chunk is a tile of consecutive
vectors, down columns it is a row's share of a strip. The first pass along rows works inside a
chunk; every other pass combines the same vector of several chunks.

Bit-exact twin: `corequant._cpu.loops.rotation_reference`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir

from corequant._cpu.codegen.cores import mix, mix_scratch
from corequant._cpu.codegen.plans import PAGE, Plan
from corequant._cpu.codegen.shifted_stores import ShiftedStores
from corequant._cpu.codegen.staggered import Step, staggered
from corequant._cpu.codegen.vectors import VECTOR_BYTES, Vectors, counted, int64
from corequant._cpu.codegen.whole_lines import Column, StreamedLines, WholeLines

__all__ = ["Body"]

_WORD = ir.IntType(64)


@dataclass(frozen=True)
class _Place:
    """Where vectors lie: a byte pointer, and bytes from chunk to chunk."""

    base: Any
    step: Any
    in_array: bool


@dataclass(frozen=True)
class _Stretch:
    """What one pass works on: its number, the part of the unit, and chunks in a part."""

    number: int
    part: Any
    chunks: Any
    last: bool = False


class Body:
    """A rotation under construction.

    Its arguments are ``src, twin, dst, src_step, dst_step, units, signs, period, phase, scale,
    scratch, choices``. It rotates ``units`` units of ``src`` into ``dst``, addresses that may be
    the same. ``twin`` equals ``src``. The steps are bytes from row to row, used for columns only.
    ``signs`` is the address of ``period`` bits as ``sign_bits`` puts them, of which the first unit
    uses those from ``phase`` on. For columns it is that of a factor for each row of the block,
    which after the rotation takes the place of ``scale``. ``see`` is given the vectors that are
    written. ``choices`` is the address of what the core's function of that name returns.
    """

    def __init__(
        self,
        builder: Any,
        plan: Plan,
        arguments: Any,
        see: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self.b = builder
        self.plan = plan
        self.see = see
        self.v = Vectors(builder, plan.dtype)
        self.half = Vectors(builder, plan.dtype, VECTOR_BYTES // 2)
        (src, twin, dst, src_step, dst_step, units, signs, period, phase, scale) = arguments[:10]
        scratch, choices = arguments[10:]
        self.src, self.twin, self.dst = map(self._pointer, (src, twin, dst))
        self.signs, self.scratch = self._pointer(signs), self._pointer(scratch)
        self.choices = self._pointer(choices)
        self.steps = (src_step, dst_step)
        self.units, self.period, self.phase = units, period, phase
        self.factor = scale
        self.columns: Callable[[int, int], Iterator[tuple[Any, Column]]]

    def emit(self) -> None:
        """Emit the loop over units."""
        plan, b = self.plan, self.b
        with b.goto_entry_block():
            self.signs_at = b.alloca(_WORD)
            self.fused = {v: v.minus_one() if plan.mixed else None for v in (self.v, self.half)}
        b.store(self.phase, self.signs_at)
        self.scratch = self._apart(self.scratch)
        vectors = plan.strip or plan.unit // plan.lanes
        moved = vectors * self.v.stored_bytes
        if self.straight:
            self._look_ahead(int64(0), moved)
            over = _Stretch(0, int64(0), self.units, last=True)
            self._first_pass(over, self._array(self.src, 0), self._array(self.dst, 1))
        else:
            self._each_unit(moved)
        if plan.stores != "ordinary":
            self.v.fence()

    @property
    def straight(self) -> bool:
        """Whether units are tiles of a single pass, so that all of them are one loop."""
        plan = self.plan
        single = plan.tile > 0 and plan.passes == 1 and plan.chunks == 1
        return single and plan.stores != "shifted"

    def _each_unit(self, moved: int) -> None:
        plan, b = self.plan, self.b
        shifted: Any = None
        if plan.stores == "shifted" and plan.whole_lines:
            shifted = StreamedLines(self.v, self.dst, self.scratch)
        elif plan.stores == "shifted":
            after = plan.kept + mix_scratch(plan.core) + VECTOR_BYTES
            place = self.v.address(self.scratch, 0 if plan.joined else after)
            shifted = ShiftedStores(self.v, self.dst, place)
        with self._loop(self.units) as unit:
            offset = b.mul(unit, int64(moved))
            self._look_ahead(offset, moved)
            if plan.signs != "none" and not plan.strip:
                self._next_signs()
            target = self.v.address(self.dst, offset)
            if isinstance(shifted, ShiftedStores):
                target = shifted.place
            source = self.v.address(self.src, offset)
            if isinstance(shifted, StreamedLines):
                self.columns = partial(shifted.columns, unit, moved)
            elif plan.whole_lines:
                self.columns = partial(WholeLines(self.v, self.dst).columns, target)
            self._unit(self._array(source, 0), self._array(target, 1))
            if isinstance(shifted, ShiftedStores):
                shifted.write(unit, moved)
        if shifted is not None:
            shifted.finish(self.units, moved)

    def _apart(self, scratch: Any) -> Any:
        """Return where in the scratch to begin: apart from the source in the cache's sets.

        Where both are as far into a page, or nearly, loads of the one wait for stores to the other.
        """
        if not self.plan.kept:
            return scratch
        b = self.b
        ends = [b.ptrtoint(pointer, _WORD) for pointer in (self.src, scratch)]
        apart = b.add(b.sub(*ends), int64(2 * VECTOR_BYTES))
        start = b.and_(apart, int64(PAGE - VECTOR_BYTES))
        if self.plan.joined:
            start = b.add(start, int64(VECTOR_BYTES))
        return self.v.address(scratch, start)

    def _look_ahead(self, offset: Any, moved: int) -> None:
        """Set what a unit at ``offset`` fetches, and how much of it a pass does."""
        plan, b = self.plan, self.b
        self.from_twin = self.v.address(self.twin, offset)
        self.ahead = self.v.address(self.src, b.add(offset, int64(max(plan.ahead, moved))))
        self.share = -(-moved // VECTOR_BYTES // plan.passes)

    def _next_signs(self) -> None:
        """Step to the signs of the next unit."""
        b = self.b
        at = b.load(self.signs_at)
        self.unit_signs = self.v.address(self.signs, b.lshr(at, int64(3)))
        following = b.add(at, int64(self.plan.unit))
        wraps = b.icmp_signed("==", following, self.period)
        b.store(b.select(wraps, int64(0), following), self.signs_at)

    def _unit(self, source: _Place, target: _Place) -> None:
        """All passes over one unit, all but the last one part after the other.

        A part is what the last pass combines, so that it stays in the first-level cache until then.
        """
        plan = self.plan
        rest = _Place(self.scratch, plan.pitch, in_array=False)
        if plan.in_place:
            rest = target
        if plan.joined:
            target = rest
        steps: list[Callable[..., None]] = [self._first_pass] if plan.tile else []
        distance = 1
        for radix in plan.radices:
            steps.append(partial(self._pass, radix, distance))
            distance *= radix
        if plan.core > 1:
            steps.append(partial(self._core_pass, distance))
        *early, final = steps
        parts = plan.parts if len(early) > 1 else 1
        chunks = plan.chunks // parts
        with self._loop(parts) as part:
            for number, step in enumerate(early):
                step(_Stretch(number, part, chunks), source if number == 0 else rest, rest)
        whole = _Stretch(len(early), int64(0), plan.chunks, last=True)
        if not plan.whole_lines:
            final(whole, rest if early else source, target)
        elif plan.core > 1:
            self._core_pass_on_lines(distance, whole)
        else:
            self._pass_on_lines(plan.radices[-1], distance // plan.radices[-1], whole)

    def _first_pass(self, over: _Stretch, source: _Place, target: _Place) -> None:
        """Stages inside a vector, then between the vectors of a tile."""
        plan = self.plan
        v = self.half if plan.halved else self.v
        parts = 2 if plan.split else 1
        count = plan.tile * VECTOR_BYTES // v.bytes
        stages = min(plan.power, v.lanes * parts).bit_length() - 1
        together = max(parts, min(count, plan.power // v.lanes))
        fused = self._fused(v, "all")

        def load(index: Any, _: list[Any]) -> list[Any]:
            if self.straight and plan.signs == "before":
                self._next_signs()
            chunk = self._prefetch(over, index, over.chunks)
            vectors = []
            for i in range(0, count, parts):
                if plan.paired_loads:
                    at = self._offset(v, source, chunk, i)
                    left, right = v.address(source.base, at), v.address(self.from_twin, at)
                    vectors.append(v.load_butterfly(left, right))
                elif plan.split:
                    vectors += v.butterflies(self._load_split(v, source, chunk, i))
                else:
                    vectors.append(self._load(v, source, chunk, i, first=True))
            return vectors

        def within(distance: int, _: Any, vectors: list[Any]) -> list[Any]:
            return [v.lane_butterfly(vector, distance) for vector in vectors]

        def between(_: Any, vectors: list[Any]) -> list[Any]:
            vectors = list(vectors)
            for start, part in itertools.product(range(0, count, together), range(parts)):
                run = slice(start + part, start + together, parts)
                vectors[run] = v.butterflies(vectors[run], fused)
            return vectors

        def finish(index: Any, vectors: list[Any]) -> list[Any]:
            if self.straight and plan.signs == "after":
                self._next_signs()
            chunk = self._tile(over, index, over.chunks)
            for i in range(0, count, parts):
                self._store_some(v, vectors[i : i + parts], target, chunk, i, over.last)
            return []

        distances = [1 << k for k in range(int(plan.paired_loads), stages - int(plan.split))]
        steps: list[Step] = [load, *(partial(within, d) for d in distances), between, finish]
        staggered(self.b, over.chunks, steps, plan.depth)

    def _fused(self, v: Vectors, *mixed: str) -> Any:
        """Return the vector that lets differences be products, where the plan is one of these."""
        return self.fused[v] if self.plan.mixed in mixed else None

    def _pass(
        self, radix: int, distance: int, over: _Stretch, source: _Place, target: _Place
    ) -> None:
        """Stages between ``radix`` chunks, each ``distance`` chunks from the next."""
        joined = over.last and self.plan.split
        parts = 2 if joined else 1
        v = self.half if joined and self.plan.halved else self.v
        width = (self.plan.tile or self.plan.strip) * VECTOR_BYTES // (v.bytes * parts)
        groups = over.chunks // (radix * distance)
        with self._loop(groups) as group, self._loop(distance) as inner, self._loop(width) as at:
            number = self._number((group, distance), (inner, width), at)
            self._prefetch(over, number, groups * distance * width)
            start = self.b.mul(over.part, int64(over.chunks))
            start = self.b.add(start, self.b.mul(group, int64(radix * distance)))
            start = self.b.add(start, inner)
            chunks = [self.b.add(start, int64(i * distance)) for i in range(radix)]
            place = self.b.mul(at, int64(parts)) if joined else at
            places = [place, self.b.add(place, int64(1))][:parts]
            first = over.number == 0
            turned = []
            for one in places:
                loaded = [self._load(v, source, chunk, one, first) for chunk in chunks]
                turned.append(self._combined(v, loaded))
            for chunk, *vectors in zip(chunks, *turned, strict=True):
                self._store_some(v, vectors, target, chunk, place, over.last)

    def _combined(self, v: Vectors, vectors: list[Any]) -> list[Any]:
        """Do the stages of a pass that combines chunks."""
        fused = self._fused(v, "all", "most")
        return v.butterflies(vectors, fused, plain_last=self.plan.mixed == "most")

    def _pass_on_lines(self, radix: int, distance: int, over: _Stretch) -> None:
        """Do the last pass along the result's lines of cache."""
        count = distance * self.plan.tile
        for number, column in self.columns(count * VECTOR_BYTES, count):
            self._prefetch(over, number, count)
            turned = self._combined(self.v, [column.load(i) for i in range(radix)])
            for i, vector in enumerate(turned):
                column.store(i, self._scaled(self.v, vector, 0, 0, 0))

    def _core_pass_on_lines(self, distance: int, over: _Stretch) -> None:
        """Do the core's stage, the last one, along the result's lines of cache."""
        plan = self.plan
        tables = self.v.address(self.scratch, plan.kept)
        count = distance * plan.tile
        for number, column in self.columns(count * VECTOR_BYTES, count):
            meanwhile = partial(self._prefetch, over, number, count)

            def store(k: Any, mixed: Any, column: Column = column) -> None:
                column.store(k, self._scaled(self.v, mixed, 0, 0, 0))

            parts = (column.load, store, meanwhile, tables, self.choices)
            mix(self.v, plan.core, plan.inverse, *parts)

    def _core_pass(self, distance: int, over: _Stretch, source: _Place, target: _Place) -> None:
        """Emit the core's stage, between K chunks, each p numbers from the next."""
        plan = self.plan
        width = plan.tile or plan.strip
        tables = self.v.address(self.scratch, plan.kept)
        with self._loop(distance) as inner, self._loop(width) as at:
            number = self._number((inner, width), at)

            def meanwhile(part: Any, parts: int) -> None:
                self._prefetch(over, number, distance * width, part, parts)

            def load(k: Any) -> Any:
                chunk = self._chunk(inner, k, distance)
                return self._load(self.v, source, chunk, at, over.number == 0)

            def store(k: Any, mixed: Any) -> None:
                chunk = self._chunk(inner, k, distance)
                self._store_some(self.v, [mixed], target, chunk, at, over.last)

            mix(self.v, plan.core, plan.inverse, load, store, meanwhile, tables, self.choices)

    def _chunk(self, inner: Any, k: Any, distance: int) -> Any:
        step = int64(k * distance) if isinstance(k, int) else self.b.mul(k, int64(distance))
        return self.b.add(inner, step)

    def _load(self, v: Vectors, place: _Place, chunk: Any, vector: Any, first: bool) -> Any:
        pointer = v.address(place.base, self._offset(v, place, chunk, vector))
        if not place.in_array:
            return v.load(pointer)
        if first and self.plan.strip and self.plan.ahead:
            v.prefetch(v.address(pointer, self.plan.ahead))
        loaded = v.load_stored(pointer)
        if first and self.plan.signs == "before":
            loaded = self._signed(v, loaded, chunk, vector)
        return loaded

    def _load_split(self, v: Vectors, place: _Place, chunk: Any, vector: Any) -> list[Any]:
        parted = v.load_split(v.address(place.base, self._offset(v, place, chunk, vector)))
        if self.plan.signs == "before":
            parted = [self._signed(v, half, chunk, vector + i) for i, half in enumerate(parted)]
        return parted

    def _store_some(
        self, v: Vectors, vectors: list[Any], place: _Place, chunk: Any, at: Any, last: bool
    ) -> None:
        """Store vectors from ``at`` on: one, or the two that a split load made."""
        pointer = v.address(place.base, self._offset(v, place, chunk, at))
        if not last:
            for i, vector in enumerate(vectors):
                v.store(vector, v.address(pointer, i * v.bytes), 0 if place.in_array else v.bytes)
            return
        scaled = [self._scaled(v, vector, chunk, at, i) for i, vector in enumerate(vectors)]
        if self.see is not None:
            self.see(scaled)
        stream = self.plan.stores == "streamed"
        if len(scaled) > 1:
            even, odd = scaled
            v.store_split(even, odd, pointer, stream)
        else:
            v.store_stored(scaled[0], pointer, v.stored_bytes if stream else 0, stream)

    def _scaled(self, v: Vectors, vector: Any, chunk: Any, at: Any, i: int) -> Any:
        if self.plan.signs != "after":
            return v.scale(vector, v.splat(self.factor))
        if self.plan.strip:
            return v.scale(vector, self._row_factor(v, chunk))
        place = at + i if isinstance(at, int) else self.b.add(at, int64(i))
        return self._signed(v, v.scale(vector, v.splat(self.factor)), chunk, place)

    def _signed(self, v: Vectors, vector: Any, chunk: Any, at: Any) -> Any:
        """Flip the signs of what is vector ``at`` of a chunk."""
        if self.plan.strip:
            return v.scale(vector, self._row_factor(v, chunk))
        within = int64(0) if self.straight else chunk
        start = self.b.mul(within, int64(self.plan.tile * self.plan.lanes // 8))
        if isinstance(at, int):
            at, nibble = divmod(at * v.lanes // 4, 2)
        else:
            at, nibble = self.b.mul(at, int64(v.lanes // 8)), 0
        pointer = v.address(self.unit_signs, self.b.add(start, int64(at)))
        return v.negate_where(v.load_signs(pointer, nibble), vector)

    def _row_factor(self, v: Vectors, chunk: Any) -> Any:
        return v.load_scalar(v.address(self.signs, self.b.mul(chunk, int64(v.scalar_bytes))))

    def _array(self, pointer: Any, which: int) -> _Place:
        if self.plan.strip:
            return _Place(pointer, self.steps[which], in_array=True)
        return _Place(pointer, self.plan.tile * self.v.stored_bytes, in_array=True)

    def _offset(self, v: Vectors, place: _Place, chunk: Any, vector: Any) -> Any:
        size = v.stored_bytes if place.in_array else v.bytes
        within = vector * size if isinstance(vector, int) else self.b.mul(vector, int64(size))
        return self.b.add(self.b.mul(chunk, int64(place.step)), int64(within))

    def _prefetch(
        self, over: _Stretch, number: Any, tiles: Any, piece: Any = 0, pieces: int = 1
    ) -> Any:
        """Fetch this tile's share of what comes next, so that all passes overlap with memory.

        It may be fetched in ``pieces``. Returns the number of the tile in the unit.
        """
        plan, b = self.plan, self.b
        tile = self._tile(over, number, tiles)
        if plan.ahead and not plan.strip:
            tiles, parts = (1, 1) if self.straight else (tiles, plan.chunks // over.chunks)
            each = -(-self.share // (tiles * parts))
            start = b.mul(tile, int64(each * VECTOR_BYTES))
            offset = over.number * self.share * VECTOR_BYTES
            if isinstance(piece, int):
                lines = range(each * piece // pieces, each * (piece + 1) // pieces)
            else:
                # As many each time, even if the last pieces then fetch a few lines too many.
                lines = range(-(-each // pieces))
                start = b.add(start, b.mul(piece, int64(len(lines) * VECTOR_BYTES)))
            for k in lines:
                at = b.add(start, int64(offset + k * VECTOR_BYTES))
                self.v.prefetch(self.v.address(self.ahead, at))
        return tile

    def _tile(self, over: _Stretch, number: Any, tiles: Any) -> Any:
        """Count a tile of a part from the beginning of the unit."""
        return self.b.add(self.b.mul(over.part, int64(tiles)), number)

    def _number(self, *parts: Any) -> Any:
        """Count the turns of nested loops: ((i, n), (j, m), k) gives (i n + j) m + k."""
        total = int64(0)
        for index, length in parts[:-1]:
            total = self.b.mul(self.b.add(total, index), int64(length))
        return self.b.add(total, parts[-1])

    @contextmanager
    def _loop(self, count: Any) -> Iterator[Any]:
        if isinstance(count, int) and count == 1:
            yield int64(0)
        else:
            with counted(self.b, count) as index:
                yield index

    def _pointer(self, address: Any) -> Any:
        return self.b.inttoptr(address, ir.IntType(8).as_pointer())
