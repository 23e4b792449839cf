"""Floats as their bit patterns, in the same words compiled (``intrinsics``) and in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["larger", "like", "smaller", "to_bits", "to_float"]


def to_bits(x: Any) -> Any:
    """Return a float's bits as an unsigned integer of its width."""
    return x.view(np.uint32 if x.itemsize == 4 else np.uint64)


def to_float(bits: Any) -> Any:
    """Return the float of those bits."""
    return bits.view(np.float32 if bits.itemsize == 4 else np.float64)


def like(value: Any, sample: Any) -> Any:
    """Return ``value`` in the type of ``sample``: numba widens integers, vectors must not."""
    return type(sample)(value)


def larger(a: Any, b: Any) -> Any:
    """Return ``max(a, b)`` of numbers of one type: a, unless b is larger."""
    return b if b > a else a


def smaller(a: Any, b: Any) -> Any:
    """Return ``min(a, b)`` of numbers of one type: a, unless b is smaller."""
    return b if b < a else a
