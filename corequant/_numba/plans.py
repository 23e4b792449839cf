"""Plans: how a rotation is cut into passes over a tile of registers.

A block of K·p numbers is turned by the stages of Sylvester's matrix of order p, butterflies at
distances 1, 2, 4, ..., p/2, then by the core of order K. A pass does several stages on as many
vectors as registers hold. Every plan does the stages in that one order, so that every plan gives
the same bits; plans differ in speed alone. ``docs/kernels.md`` tells why each is as it is.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache

from corequant._numba.cores import mix_scratch
from corequant._numba.machine import processor
from corequant._numba.vectors import VECTOR_BYTES, compute_dtype, lanes_of

__all__ = ["Plan", "fetches_ahead", "plan_columns", "plan_rows"]

_AHEAD = 8192
"""Bytes that a processor which needs it is told to fetch ahead: 4 KiB is 5 % slower, 16 KiB not
faster (Emerald Rapids, in place, block size 64)."""

_SHIFTED_BATCH = 1024
"""Numbers put together before they are streamed, so many that no load waits for a store."""

_LOADS_SHUFFLE = platform.machine().lower() in ("x86_64", "amd64")
"""Whether load ports can do the first butterfly's shuffles; asked together with `fetches_ahead`."""

# Vectors per tile of the first pass, then the radices of the passes across tiles, by the order p
# over the vector's length.
_ROWS: dict[int, tuple[int, tuple[int, ...]]] = {
    1: (4, ()),
    2: (4, ()),
    4: (4, ()),
    8: (4, (2,)),
    16: (4, (4,)),
    32: (8, (4,)),
    64: (4, (4, 4)),
    128: (8, (16,)),
    256: (4, (8, 8)),
    512: (4, (8, 4, 4)),
    1024: (8, (16, 8)),
    2048: (8, (16, 16)),
    4096: (8, (8, 8, 8)),
}
# Stores that bypass the cache want few lines at a time in the last pass.
_STREAMED = {16: (8, (2,)), 128: (4, (8, 4))}


@dataclass(frozen=True)
class Plan:
    """Passes of one kernel.

    Attributes
    ----------
    dtype : str
        Of the arrays; float16 and bfloat16 are computed in float32.
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
        Vectors beside each other in a rotation down columns; 0 along rows.
    signs : {"none", "before", "after"}
        Where signs are multiplied.
    stores : {"ordinary", "streamed", "shifted"}
        Streamed stores bypass the cache, whole lines only. Shifted ones too, for results that
        don't start on a line: they are put together in the scratch first.
    batch : int
        Numbers that the outermost loop along rows takes at least.
    ahead : int
        Bytes to fetch ahead of the first pass; 0 leaves that to the processor.
    paired_loads : bool
        Let the load ports do the first butterfly's shuffles.
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
        """Bytes from tile to tile in the scratch, one vector more than they fill.

        Without it, tiles a power of two apart would share a few sets of the first-level cache.
        """
        return ((self.tile or self.strip) + 1) * VECTOR_BYTES

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
        return self.chunks * self.pitch if self.passes > 1 else 0

    @property
    def scratch(self) -> int:
        """Bytes of scratch that a kernel needs, 64-aligned."""
        assembled = VECTOR_BYTES * (self.unit // self.lanes + 1) if self.stores == "shifted" else 0
        return self.kept + mix_scratch(self.core) + assembled


@lru_cache(maxsize=256)
def plan_rows(dtype: str, core: int, power: int, inverse: bool, signs: str, stores: str) -> Plan:
    """Plan a rotation along the last axis; p at least a vector's length, or K = 1."""
    vectors = max(1, power // lanes_of(dtype))
    table = _ROWS if stores == "ordinary" else _ROWS | _STREAMED
    tile, radices = table[vectors] if vectors in table else _long(vectors)
    if core > 1 and tile > vectors:
        tile = vectors
    plain = dtype == "float32" and power > 1 and signs != "before"
    return Plan(
        dtype=dtype,
        core=core,
        power=power,
        inverse=inverse and core > 1,
        tile=tile,
        radices=radices,
        signs=signs,
        stores=stores,
        batch=_SHIFTED_BATCH if stores == "shifted" and core == 1 else 0,
        ahead=_AHEAD if fetches_ahead() else 0,
        paired_loads=plain and fetches_ahead() and _LOADS_SHUFFLE,
    )


@lru_cache(maxsize=256)
def plan_columns(dtype: str, core: int, power: int, inverse: bool, signs: str, stores: str) -> Plan:
    """Plan a rotation down the first axis: rows are combined, vectors lie along them."""
    radices = _split(power)
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
        ahead=256 if fetches_ahead() else 0,
    )


def _split(order: int) -> tuple[int, ...]:
    """Split a power of two into radices of at most 16, as even as that gets."""
    bits = order.bit_length() - 1
    count = -(-bits // 4)
    return tuple(1 << ((bits + k) // count) for k in range(count))


def _long(vectors: int) -> tuple[int, tuple[int, ...]]:
    return 8, _split(vectors // 8)


@lru_cache(maxsize=1)
def fetches_ahead() -> bool:
    """Tell whether kernels ask for memory ahead of its use on this processor."""
    # Intel's cores are short of scheduler entries: the butterflies that wait for memory fill them
    # before enough lines are under way. AMD's lose by prefetching (Zen 4).
    return not processor()[0].startswith("znver")


def describe(plan: Plan) -> str:
    """Say in words what a plan does."""
    first = [f"{plan.tile} vectors"] if plan.tile else []
    steps = [*first, *(f"radix {r}" for r in plan.radices)]
    if plan.core > 1:
        steps.append(f"core {plan.core}")
    return f"{compute_dtype(plan.dtype)}: " + ", ".join(steps)
