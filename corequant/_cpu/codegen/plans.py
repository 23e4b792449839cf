"""Plans: how a rotation is cut into passes over a tile of registers.

A block of K·p numbers is turned by the stages of Sylvester's matrix of order p, butterflies at
distances 1, 2, 4, ..., p/2, then by the core of order K. A pass does several stages on as many
vectors as registers hold. Every plan does the stages in that one order, so that every plan gives
the same bits; plans differ in speed alone. ``docs/kernels.md`` tells why each is as it is.

What each family of processors likes best was measured, not derived; it is a few numbers, from which
the passes of all block sizes follow.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

from corequant._cpu.codegen.compiler import processor
from corequant._cpu.codegen.cores import mix_scratch
from corequant._cpu.codegen.vectors import VECTOR_BYTES, lanes_of

__all__ = ["PAGE", "Passes", "Plan", "fitted", "plan_columns", "plan_rows", "split", "tuning"]

PAGE = 4096
"""Bytes after which addresses look alike to a store's queue."""

_SHIFTED_BATCH = 1024
"""Numbers assembled before they are streamed: enough that no load waits for a store."""


@dataclass(frozen=True)
class Plan:
    """Passes of one kernel.

    Attributes
    ----------
    dtype : str
        Data type of the arrays; float16 and bfloat16 are computed in float32.
    core : int
        K, the order of the core; 1 without one.
    power : int
        p, the order of Sylvester's matrix.
    inverse : bool
        Multiply by the transpose of the core.
    tile : int
        Vectors in a tile of the first pass along rows; 0 for a rotation down columns.
    radices : tuple of int
        Tiles (rows of the matrix, for columns) combined by each pass that follows.
    strip : int
        Adjacent vectors in a rotation down columns; 0 along rows.
    signs : {"none", "before", "after"}
        Step at which signs are multiplied.
    stores : {"ordinary", "streamed", "shifted"}
        Streamed stores bypass the cache, whole lines only. Shifted ones too, for results that
        don't start on a line: they are put together in the scratch first.
    batch : int
        Numbers that the outermost loop along rows takes at least.
    ahead : int
        Bytes to fetch ahead of the first pass; 0 leaves that to the processor.
    paired_loads : bool
        Let the load ports do the first butterfly's shuffles.
    halved : bool
        Do the first pass on vectors of 32 bytes.
    in_place : bool
        Keep a block in the result between passes instead of the scratch.
    mixed : {"", "all", "most"}
        Let the units that multiply take differences of butterflies between vectors: all of them,
        or those of later passes but not of their last stages.
    split : bool
        Load bfloat16 by pairs, so that the first butterfly is one between vectors.
    padding : int
        Vectors left free after each tile in the scratch.
    depth : int
        Tiles of the first pass that are under way at once.
    whole_lines : bool
        Have the last pass go along lines of cache of a result that begins within one. Shifted
        stores then are its own.
    """

    dtype: str
    core: int
    power: int
    inverse: bool = False
    tile: int = 0
    radices: tuple[int, ...] = ()
    strip: int = 0
    signs: str = "none"
    stores: str = "ordinary"
    batch: int = 0
    ahead: int = 0
    paired_loads: bool = False
    halved: bool = False
    in_place: bool = False
    mixed: str = ""
    split: bool = False
    padding: int = 1
    depth: int = 1
    whole_lines: bool = False

    def __str__(self) -> str:
        """Write the form that ``parse`` reads; it is what a compiled kernel is cached under."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the string form."""
        fields = json.loads(text)
        return cls(**{**fields, "radices": tuple(fields["radices"])})

    @property
    def lanes(self) -> int:
        """Numbers in a vector."""
        return lanes_of(self.dtype)

    @property
    def block(self) -> int:
        """Block size K·p."""
        return self.core * self.power

    @property
    def unit(self) -> int:
        """Numbers that one turn of the outermost loop along rows covers: blocks, or one block."""
        return max(self.block, self.tile * self.lanes, self.batch)

    @property
    def passes(self) -> int:
        """How often a number is loaded and stored."""
        return (self.tile > 0) + len(self.radices) + (self.core > 1)

    @property
    def pitch(self) -> int:
        """Bytes from tile to tile in the scratch.

        Without padding, tiles a power of two apart share a few sets of the first-level cache.
        """
        return ((self.tile or self.strip) + self.padding) * VECTOR_BYTES

    @property
    def chunks(self) -> int:
        """Tiles in a unit; rows in a block, for columns."""
        return self.block if self.strip else self.unit // (self.tile * self.lanes)

    @property
    def parts(self) -> int:
        """Parts of a block that the last pass combines."""
        if self.core > 1:
            return self.core
        return self.radices[-1] if self.radices else 1

    @property
    def kept(self) -> int:
        """Bytes of scratch that hold a block between passes; 0 for a single pass."""
        return self.chunks * self.pitch if self.passes > 1 and not self.in_place else 0

    @property
    def joined(self) -> bool:
        """Whether shifted stores copy from where the block has been between passes."""
        wide = self.dtype in ("float32", "float64")
        return self.stores == "shifted" and self.kept > 0 and self.padding == 0 and wide

    @property
    def scratch(self) -> int:
        """Bytes of scratch that a kernel needs, 64-aligned."""
        core = mix_scratch(self.core) if self.core > 1 else 0
        assembled = 0
        if self.stores == "shifted":
            # The line before it is used, too.
            whole = 0 if self.joined else self.unit // self.lanes
            assembled = VECTOR_BYTES * (whole + 1)
        return self.kept + core + assembled + (PAGE if self.kept else 0)


@lru_cache(maxsize=256)
def plan_rows(dtype: str, core: int, power: int, inverse: bool, signs: str, stores: str) -> Plan:
    """Plan a rotation along the last axis; p at least a vector's length, or K = 1.

    ``stores`` is that of ``Plan``, or "across", for ordinary ones to a result that begins within a
    line of cache.
    """
    best = tuning()
    across, stores = stores == "across", stores.replace("across", "ordinary")
    vectors = max(1, power // lanes_of(dtype))
    passes = best.passes(vectors, dtype, stores)
    several = bool(passes.radices) or core > 1
    wide = dtype in ("float32", "float64")
    if stores == "streamed" and dtype == "float16" and max(core, *passes.radices, 0) > 8:
        # A vector is half a line; more than about eight lines don't wait for their other halves.
        stores = "shifted"
        passes = best.passes(vectors, dtype, stores)
    tile = min(passes.tile, vectors) if core > 1 else passes.tile
    in_place = 0 < best.in_place <= core * vectors and several and wide and stores == "ordinary"
    # Vectors in a row of those that the last pass combines.
    last = passes.radices[-1] if core == 1 and several else 1
    row = vectors // last
    least = best.whole_lines
    along = across and in_place and 0 < least <= row // (1 if core == 1 else 2)
    few = len(passes.radices) < 2 or last <= 8
    direct = stores == "shifted" and several and wide and few and 0 < least // 2 <= row
    whole_lines = (along or direct) and signs != "after"
    return Plan(
        dtype=dtype,
        core=core,
        power=power,
        inverse=inverse and core > 1,
        tile=tile,
        radices=passes.radices,
        signs=signs,
        stores=stores,
        batch=_SHIFTED_BATCH if stores == "shifted" and core == 1 and not whole_lines else 0,
        ahead=best.fetched(core * vectors, stores, across if in_place else None),
        paired_loads=best.paired_loads and dtype == "float32" and power > 1 and signs != "before",
        halved=passes.halved,
        in_place=in_place,
        mixed=best.mixed if passes.radices else "",
        split=best.split and dtype == "bfloat16" and core == 1 and power > 1 and tile > 1,
        padding=best.padding,
        depth=best.depth,
        whole_lines=whole_lines,
    )


def fitted(plan: Plan, length: int) -> Plan | None:
    """Return a plan whose units make up ``length`` numbers, with smaller tiles if need be."""
    while length % plan.unit and plan.tile * plan.lanes > max(plan.power, plan.lanes):
        tile = plan.tile // 2
        plan = replace(plan, tile=tile, split=plan.split and tile > 1)
    return None if length % plan.unit else plan


@lru_cache(maxsize=256)
def plan_columns(dtype: str, core: int, power: int, inverse: bool, signs: str, stores: str) -> Plan:
    """Plan a rotation down the first axis: rows are combined, vectors lie along them."""
    best = tuning()
    radices = split(power, _least_count(power, best.columns_radix))
    single = len(radices) + (core > 1) == 1
    return Plan(
        dtype=dtype,
        core=core,
        power=power,
        inverse=inverse and core > 1,
        radices=radices,
        strip=1 if single else 4,
        signs=signs,
        stores=stores,
        ahead=best.columns_ahead,
        padding=1,
    )


@dataclass(frozen=True)
class Passes:
    """How the stages are cut: vectors in a tile of the first pass, then the later passes' radices.

    ``halved`` does the first pass on vectors of 32 bytes.
    """

    tile: int
    radices: tuple[int, ...] = ()
    halved: bool = False


@dataclass(frozen=True)
class Tuning:
    """A family's choices; the fields that ``Plan`` has too mean what they mean there.

    There are as few passes as there can be, each later one of a radix up to ``radix``, the largest
    first, after one of ``tiles[0]`` vectors or, to save a pass, up to ``tiles[1]``. Small blocks
    fill a tile of ``single`` vectors; ``halved`` is for them alone. ``narrow`` takes the place of
    these numbers for 16-bit dtypes. ``in_place`` is the number of vectors from which a whole block
    stays in the result; 0 for never. ``paused`` is that from which a streamed block takes so long
    that the processor stops fetching ahead; an ordinary one does from twice as many on, and of
    blocks that stay in the result those of ``refetched`` do. ``whole_lines`` is the number of
    vectors in a row from which the last pass goes along lines of cache, twice that before a core
    and half of it on the way to streamed stores; 0 for never.
    ``columns_radix`` is the largest of rotations down columns. ``inserted`` has permuted numbers
    put into vectors before they are written.
    """

    single: int
    tiles: tuple[int, int]
    radix: int
    narrow: int = 0
    halved: bool = False
    ahead: int = 0
    paused: int = 0
    refetched: range = range(0)
    whole_lines: int = 0
    columns_ahead: int = 0
    paired_loads: bool = False
    padding: int = 0
    in_place: int = 0
    mixed: str = ""
    depth: int = 1
    split: bool = False
    inserted: bool = False
    columns_radix: int = 16

    def passes(self, vectors: int, dtype: str, stores: str = "ordinary") -> Passes:
        """Cut the stages of a block of a number of vectors."""
        single, (least, most) = self.single, self.tiles
        # Tiles of one vector cost an eighth of the speed where lines are copied afterwards.
        least = max(least, 2) if stores == "shifted" else least
        if self.narrow and dtype in ("float16", "bfloat16"):
            single = least = most = self.narrow
        count = 0
        while vectors > most * self.radix**count:
            count += 1
        if not count:
            return Passes(max(single, vectors), halved=self.halved and vectors <= single)
        tile = max(least, -(-vectors // self.radix**count))
        if stores == "shifted" and self.whole_lines and count == 1 and vectors >= 4 * most:
            tile = most
        return Passes(tile, split(vectors // tile, count)[::-1])

    def fetched(self, vectors: int, stores: str, in_place: bool | None) -> int:
        """Return the bytes that blocks of a number of vectors fetch ahead.

        ``in_place`` is None for blocks that leave the result between passes, and else whether the
        result begins within a line: NumPy's arrays do, which are in large pages.
        """
        if in_place is not None:
            pauses = in_place and vectors in self.refetched
        else:
            pauses = 0 < self.paused * (2 if stores == "ordinary" else 1) <= vectors
        return VECTOR_BYTES * vectors if pauses else self.ahead


def _least_count(order: int, radix: int) -> int:
    """Return how few radices up to ``radix`` a power of two splits into."""
    return -(-(order.bit_length() - 1) // (radix.bit_length() - 1))


def split(order: int, count: int = 0) -> tuple[int, ...]:
    """Split a power of two into even radices: ``count`` of them, or as few as keep to 16."""
    bits = order.bit_length() - 1
    count = count or _least_count(order, 16)
    return tuple(1 << ((bits + k) // count) for k in range(count))


# Emerald Rapids, and processors with 16 registers: more than four vectors leave the loads of the
# next tile no room to start early, and radix 16 no registers. Fetching 4 KiB ahead is 5 % slower,
# 16 KiB not faster (in place, block size 64).
_INTEL = Tuning(
    single=4,
    tiles=(4, 4),
    radix=8,
    ahead=8192,
    columns_ahead=256,
    paired_loads=platform.machine().lower() in ("x86_64", "amd64"),
    padding=1,
)

# Zen 4, whose units are 32 bytes wide; there are registers for that in tiles of up to 4 vectors.
_ZEN4 = Tuning(
    single=4,
    tiles=(1, 8),
    radix=16,
    halved=True,
    paused=256,
    refetched=range(448, 769),
    whole_lines=16,
    in_place=1,
    mixed="most",
    depth=3,
    split=True,
)

# Zen 5, whose vectors are 64 bytes wide throughout, and which gains by being asked to fetch.
# Where conversion takes longer than all else, tiles are large.
_ZEN5 = Tuning(
    single=8,
    tiles=(1, 8),
    radix=16,
    narrow=16,
    ahead=8192,
    in_place=256,
    mixed="all",
    split=True,
    inserted=True,
)

# NEON has 32 registers of 16 bytes. Passes of four vectors take 16 of these and spill next to none;
# with radix 8 a pass touches the stack as often as the data. Counted in what LLVM emits.
_NEON = Tuning(single=4, tiles=(4, 4), radix=4, columns_radix=4, columns_ahead=256, padding=1)


@cache
def tuning() -> Tuning:
    """Return the choices for the processor that is compiled for."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _NEON
    name = processor()[0]
    # Zen 1 to 3 have 16 registers, and are best served by what serves others of that kind.
    if not name.startswith("znver") or name in ("znver1", "znver2", "znver3"):
        return _INTEL
    return _ZEN4 if name == "znver4" else _ZEN5
