"""Rotations that have been asked for before: what they need, without checking anything again.

A rotation in the cache takes a few microseconds, less than looking at every argument of it. So the
first call of a kind leaves here what the next one can use as it is. Only the usual kind is kept:
NumPy arrays in C order, the last axis, no signs, small enough for one thread and ordinary stores.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["address_of", "forget", "keep", "repeat"]

_MOST = 1024
"""Kinds of calls that a thread remembers."""

_Call = tuple[Callable[..., None], bytes]

_pointer_at = ctypes.c_void_p.from_address
_FIELD = object.__basicsize__
"""Where an array's object holds its data pointer: first after what every Python object has."""


class _Calls(threading.local):
    """A thread's own calls, since a kernel's scratch belongs to a thread."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], _Call] = {}


_calls = _Calls()


def _by_interface(x: Any) -> int:
    return int(x.ctypes.data)


def _by_field(x: Any) -> int:
    return _pointer_at(id(x) + _FIELD).value or 0


def _choose() -> Callable[[Any], int]:
    """Read the pointer from the object if that is where it is, in a sixth of the time."""
    probe = np.zeros(4)[1:]
    head = ctypes.string_at(id(probe) + _FIELD, ctypes.sizeof(ctypes.c_void_p))
    same = int.from_bytes(head, "little") == probe.ctypes.data
    return _by_field if same else _by_interface


address_of: Callable[[Any], int] = _choose()
"""Address of an array's first number."""


def keep(
    x: Any,
    block_size: int,
    inverse: bool,
    threads: int | None,
    call: Callable[..., None],
    settings: bytes,
) -> None:
    """Remember the kernel and the settings for arrays of ``x``'s shape and dtype."""
    known = _calls.known
    if len(known) >= _MOST:
        known.clear()
    known[x.dtype, x.shape, block_size, inverse, threads] = call, settings


def forget() -> None:
    """Forget this thread's calls."""
    _calls.known.clear()


def repeat(x: Any, block_size: Any, axis: Any, inverse: Any, out: Any, threads: Any) -> Any | None:
    """Rotate NumPy's ``x`` as it has been done before; None if it hasn't."""
    # True and 2.0 are equal to integers, but they are none. (The attribute is quicker than type().)
    if not (
        block_size.__class__ is axis.__class__ is int
        and axis == -1
        and (threads is None or threads.__class__ is int)
        and (inverse is False or inverse is True)
    ):
        return None
    call = _calls.known.get((x.dtype, x.shape, block_size, inverse, threads))
    if call is None:
        return None
    kernel, settings = call
    if out is x:
        if not x.flags.carray:
            return None
        source = address_of(x)
        kernel(source, source, settings)
        return x
    if not x.flags.c_contiguous:
        return None
    source = address_of(x)
    if out is None:
        out = np.empty(x.shape, x.dtype)
        kernel(source, address_of(out), settings)
        return out
    if (
        type(out) is not np.ndarray
        or out.dtype is not x.dtype
        or out.shape != x.shape
        or not out.flags.carray
    ):
        return None
    target = address_of(out)
    if abs(target - source) < x.nbytes:
        return None
    kernel(source, target, settings)
    return out
