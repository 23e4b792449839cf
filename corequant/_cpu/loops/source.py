"""What a kernel is before it is compiled, and what compiled code and its callers agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ALLOCATE", "FAILED", "FREE", "UNABLE", "Source"]

FAILED, UNABLE = -(1 << 63), 1 - (1 << 63)
"""What compiled code returns when it runs out of memory, and where a kernel's result is neither an
integer nor a bool: such kernels are for other kernels, and run as plain Python otherwise."""

ALLOCATE, FREE = "corequant_allocate", "corequant_free"
"""Symbols by which compiled code asks for memory: those of Python that need no lock."""


class Source:
    """A function of arrays, numbers and tuples of these, to be compiled.

    Parameters
    ----------
    function : callable
        Its definition in Python.
    reordered : bool
        Whether sums may be taken in any order, so in vectors.
    """

    def __init__(self, function: Callable[..., Any], reordered: bool) -> None:
        self.function = function
        self.reordered = reordered
