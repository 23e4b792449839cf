"""What each family of processors likes best: measured, not derived.

Keys of the tables are the vectors in a block: the order p of Sylvester's matrix over the numbers in
64 bytes. The tables for narrower numbers and for streamed stores hold what differs from ``rows``.
``docs/kernels.md`` tells what was measured.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from corequant._cpu.codegen.compiler import processor

__all__ = ["Passes", "Tuning", "split", "tuning"]


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

    ``in_place`` is the number of vectors from which a whole block stays in the result; 0 for never.
    ``inserted`` has permuted numbers put into vectors before they are written.
    """

    rows: Mapping[int, Passes]
    streamed: Mapping[int, Passes]
    float16: Mapping[int, Passes] = field(default_factory=dict)
    bfloat16: Mapping[int, Passes] = field(default_factory=dict)
    ahead: int = 0
    columns_ahead: int = 0
    paired_loads: bool = False
    padding: int = 0
    in_place: int = 0
    mixed: bool = False
    split: bool = False
    inserted: bool = False

    def passes(self, vectors: int, dtype: str, stores: str) -> Passes:
        """Return how a block of so many vectors is best turned."""
        special = {"float16": self.float16, "bfloat16": self.bfloat16}.get(dtype, {})
        table = {**self.rows, **(self.streamed if stores != "ordinary" else {}), **special}
        return table.get(vectors) or Passes(8, split(vectors // 8))


def split(order: int) -> tuple[int, ...]:
    """Split a power of two into radices of at most 16, as even as that gets."""
    bits = order.bit_length() - 1
    count = -(-bits // 4)
    return tuple(1 << ((bits + k) // count) for k in range(count))


# Emerald Rapids. Fetching 4 KiB ahead is 5 % slower, 16 KiB not faster (in place, block size 64).
_INTEL = Tuning(
    rows={
        1: Passes(4),
        2: Passes(4),
        4: Passes(4),
        8: Passes(4, (2,)),
        16: Passes(4, (4,)),
        32: Passes(8, (4,)),
        64: Passes(4, (4, 4)),
        128: Passes(8, (16,)),
        256: Passes(4, (8, 8)),
        512: Passes(4, (8, 4, 4)),
        1024: Passes(8, (16, 8)),
        2048: Passes(8, (16, 16)),
        4096: Passes(8, (8, 8, 8)),
    },
    # Stores that bypass the cache want few lines at a time in the last pass.
    streamed={16: Passes(8, (2,)), 128: Passes(4, (8, 4))},
    ahead=8192,
    columns_ahead=256,
    paired_loads=platform.machine().lower() in ("x86_64", "amd64"),
    padding=1,
)

# Zen 4.
_ZEN4 = Tuning(
    rows={
        1: Passes(4, halved=True),
        2: Passes(4),
        4: Passes(4, halved=True),
        8: Passes(8),
        16: Passes(1, (16,)),
        32: Passes(8, (4,)),
        64: Passes(4, (16,), halved=True),
        128: Passes(8, (16,)),
        256: Passes(4, (8, 8)),
        512: Passes(4, (16, 8)),
        1024: Passes(8, (16, 8)),
        2048: Passes(8, (16, 16)),
        4096: Passes(8, (8, 8, 8)),
    },
    streamed={16: Passes(8, (2,)), 128: Passes(4, (4, 8))},
    float16={
        1: Passes(4, halved=True),
        2: Passes(4, halved=True),
        4: Passes(8, halved=True),
        8: Passes(8, halved=True),
        16: Passes(8, (2,), halved=True),
        32: Passes(8, (4,), halved=True),
        64: Passes(4, (16,), halved=True),
        128: Passes(8, (16,), halved=True),
    },
    bfloat16={
        1: Passes(8),
        2: Passes(8),
        4: Passes(8),
        8: Passes(8),
        16: Passes(2, (8,)),
        32: Passes(4, (8,)),
        64: Passes(8, (8,)),
        128: Passes(4, (4, 8)),
        256: Passes(4, (8, 8)),
    },
    in_place=1,
    mixed=True,
    split=True,
)


_NARROW = {
    1: Passes(16),
    2: Passes(16),
    4: Passes(16),
    8: Passes(16),
    16: Passes(16),
    32: Passes(16, (2,)),
    64: Passes(16, (4,)),
    128: Passes(16, (8,)),
    256: Passes(16, (16,)),
    512: Passes(16, (2, 16)),
    1024: Passes(16, (4, 16)),
    2048: Passes(16, (8, 16)),
    4096: Passes(16, (16, 16)),
}
"""Where conversion takes longer than all else, fewer and larger tiles."""

# Zen 5, whose vectors are 64 bytes wide throughout, and which gains by being asked to fetch.
_ZEN5 = Tuning(
    rows={
        1: Passes(8),
        2: Passes(8),
        4: Passes(8),
        8: Passes(8),
        16: Passes(8, (2,)),
        32: Passes(2, (16,)),
        64: Passes(8, (8,)),
        128: Passes(8, (16,)),
        256: Passes(8, (2, 16)),
        512: Passes(2, (16, 16)),
        1024: Passes(1, (8, 16, 8)),
        2048: Passes(1, (16, 16, 8)),
        4096: Passes(2, (16, 16, 8)),
    },
    streamed={
        1: Passes(2, halved=True),
        2: Passes(2, halved=True),
        4: Passes(2, (2,)),
        8: Passes(1, (8,)),
        16: Passes(1, (2, 8)),
        64: Passes(1, (8, 8)),
        128: Passes(1, (16, 8)),
        512: Passes(8, (8, 8)),
        1024: Passes(8, (4, 4, 8)),
        2048: Passes(16, (16, 8)),
    },
    float16=_NARROW,
    bfloat16=_NARROW,
    ahead=8192,
    in_place=256,
    mixed=True,
    split=True,
    inserted=True,
)


@cache
def tuning() -> Tuning:
    """Return the choices for the processor that is compiled for."""
    name = processor()[0]
    if not name.startswith("znver"):
        return _INTEL
    return _ZEN4 if name in ("znver1", "znver2", "znver3", "znver4") else _ZEN5
