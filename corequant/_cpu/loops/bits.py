"""Primitives: what kernels call that is compiled to instructions of its own, in ``intrinsics``.

Those here treat floats as their bit patterns. Each has a definition in plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "HALF",
    "LANES",
    "PRIMITIVES",
    "larger",
    "like",
    "primitive",
    "smaller",
    "to_bits",
    "to_float",
]


HALF, LANES = 16, 32
"""Numbers that primitives on short vectors take: as many groups as two."""

PRIMITIVES: dict[str, Callable[..., Any]] = {}
"""Definitions by name."""


def primitive(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function known as a primitive."""
    PRIMITIVES[function.__name__] = function
    return function


@primitive
def to_bits(x: Any) -> Any:
    """Return a float's bits as an unsigned integer of its width."""
    return x.view(np.uint32 if x.itemsize == 4 else np.uint64)


@primitive
def to_float(bits: Any) -> Any:
    """Return the float of those bits."""
    return bits.view(np.float32 if bits.itemsize == 4 else np.float64)


@primitive
def like(value: Any, sample: Any) -> Any:
    """Return ``value`` in the type of ``sample``: numba widens integers, vectors must not."""
    return type(sample)(value)


@primitive
def larger(a: Any, b: Any) -> Any:
    """Return ``max(a, b)`` of numbers of one type: a, unless b is larger."""
    return b if b > a else a


@primitive
def smaller(a: Any, b: Any) -> Any:
    """Return ``min(a, b)`` of numbers of one type: a, unless b is smaller."""
    return b if b < a else a
