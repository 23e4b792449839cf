"""32 numbers of float32 at a time: what all kernels of short groups need.

Groups of 16 or 32 are shorter than what the compiler's own vector loops start at, so that plain
loops over them spent most of their time in remainders: 15 against 6 ms for 4096 by 4096 float32.
``intrinsics`` has them as vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from corequant._cpu.loops.bits import HALF, LANES, primitive
from corequant._cpu.loops.jit import jit

__all__ = ["HALF", "LANES", "ask_for", "largest_bits", "largest_of_half"]


@primitive
def ask_for(x: Any, at: Any) -> None:
    """Have float32 ``x[at : at + 32]`` brought into the cache, wherever that is."""


@primitive
def largest_of_half(x: Any, at: Any) -> Any:
    """Return the bits of the largest magnitude of ``x[at : at + 16]``."""
    return (x[at : at + HALF].view(np.uint32) & np.uint32(0x7FFFFFFF)).max()


@jit
def largest_bits(x, at, count):  # type: ignore[no-untyped-def]
    """Return the bits of the largest magnitude of ``x[at : at + count]``, in sixteens."""
    most = np.uint32(0)
    for k in range(at, at + count, HALF):
        most = max(most, largest_of_half(x, k))
    return most
