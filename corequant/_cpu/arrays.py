"""NumPy arrays as the compiled code sees them: addresses, layouts, and memory on lines of cache."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.codegen.compiler import address_of
from corequant._cpu.codegen.vectors import VECTOR_BYTES

__all__ = [
    "aligned",
    "is_plain",
    "name_of",
    "new",
    "scratch",
    "storing",
]

Array = npt.NDArray[Any]

_STREAMED_BYTES = 1 << 25
"""Results of at least 32 MiB bypass the cache: they would push everything else out of it."""


def storing(size: int, target: int) -> str:
    """Return a plan's ``stores`` for a result of ``size`` bytes at the address ``target``."""
    if size < _STREAMED_BYTES or target % 4:
        return "ordinary"
    return "shifted" if target % VECTOR_BYTES else "streamed"


@lru_cache(maxsize=64)
def name_of(dtype: np.dtype[Any]) -> str:
    """Return ``dtype.name``, which NumPy composes on every access."""
    return dtype.name


def is_plain(x: Array) -> bool:
    """Return whether an array is C-contiguous and of the processor's byte order."""
    return x.flags.c_contiguous and x.dtype.isnative


def aligned(size: int, dtype: Any = np.uint8) -> Array:
    """Return an uninitialised vector that starts on a line of cache."""
    kind = np.dtype(dtype)
    raw = np.empty(size * kind.itemsize + VECTOR_BYTES, np.uint8)
    start = -address_of(raw) % VECTOR_BYTES
    return raw[start : start + size * kind.itemsize].view(kind)


def new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised array, on a line of cache where it is large enough to be streamed."""
    size = math.prod(shape)
    if size * dtype.itemsize < _STREAMED_BYTES:
        return np.empty(shape, dtype)
    return aligned(size, dtype).reshape(shape)


class _Scratch(threading.local):
    """A thread's own scratch, kept from call to call.

    What a larger one replaces is kept too: a signal's handler may ask for more between the moment
    when its thread was told the address and the kernel that writes there. Sizes at least double, so
    that all of it is at most twice the largest.
    """

    def __init__(self) -> None:
        self.size = 0
        self.address = 0
        self.memory: list[Array] = []

    def at_least(self, size: int) -> int:
        """Return the address of at least ``size`` bytes, 64-aligned."""
        if size > self.size:
            size = max(size, 2 * self.size)
            self.memory.append(aligned(size))
            self.size, self.address = size, address_of(self.memory[-1])
        return self.address


scratch = _Scratch()
