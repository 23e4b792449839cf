"""Floats as their bit patterns, in the same words compiled and in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

__all__ = ["like", "to_bits", "to_float"]


def to_bits(x: Any) -> Any:
    """Return a float's bits as an unsigned integer of its width."""
    return x.view(np.uint32 if x.itemsize == 4 else np.uint64)


def to_float(bits: Any) -> Any:
    """Return the float of those bits."""
    return bits.view(np.float32 if bits.itemsize == 4 else np.float64)


def like(value: Any, sample: Any) -> Any:
    """Return ``value`` in the type of ``sample``: numba widens integers, vectors must not."""
    return type(sample)(value)


@overload(to_bits)
def _to_bits(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: np.float32(x).view(np.uint32)
    if x == types.float64:
        return lambda x: np.float64(x).view(np.uint64)
    return None


@overload(to_float)
def _to_float(bits):  # type: ignore[no-untyped-def]
    if bits == types.uint32:
        return lambda bits: np.uint32(bits).view(np.float32)
    if bits == types.uint64:
        return lambda bits: np.uint64(bits).view(np.float64)
    return None


_CASTS: dict[Any, Any] = {
    types.uint32: lambda value, sample: np.uint32(value),
    types.uint64: lambda value, sample: np.uint64(value),
    types.float32: lambda value, sample: np.float32(value),
    types.float64: lambda value, sample: np.float64(value),
}


@overload(like)
def _like(value, sample):  # type: ignore[no-untyped-def]
    return _CASTS.get(sample)
