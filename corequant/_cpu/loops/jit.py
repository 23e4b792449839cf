"""Kernels: Python functions on arrays and numbers that run as compiled code.

A kernel is compiled for the types of its arguments when it is first called with them. numba turns
it into LLVM's intermediate form (``frontend``); ``codegen.compiler`` compiles that as it does
generated code, and keeps it in the same cache. So a kernel that has been compiled before is called
without numba, which takes longer to import than most calls take. Compiled code releases the
interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from llvmlite import binding

from corequant._cpu.codegen.compiler import address_of, cached, compiled_away, edition
from corequant._cpu.loops.source import ALLOCATE, FREE, UNABLE, Source

__all__ = ["LOCK", "Kernel", "jit", "jit_reordered"]

LOCK = threading.RLock()
"""Held while a kernel is compiled or loaded: one thread does it, others wait."""


class Kernel(Source):
    """A function that is compiled for the types of its arguments when it is called with them."""

    def __init__(self, function: Callable[..., Any], reordered: bool) -> None:
        super().__init__(function, reordered)
        functools.update_wrapper(self, function)
        self._loaded: dict[Any, tuple[Callable[..., int], struct.Struct]] = {}

    def __call__(self, *arguments: Any) -> Any:
        words: list[Any] = []
        kinds: list[Any] = []
        _flatten(arguments, words, kinds)
        key = tuple(kinds)
        found = self._loaded.get(key) or self._load(key, arguments)
        code, packing = found
        result = code(packing.pack(*words))
        if result <= UNABLE:
            if result == UNABLE:
                return self.function(*arguments)
            raise MemoryError(f"{self.function.__name__} needs more memory than there is")
        return result

    def _load(
        self, key: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> tuple[Callable[..., int], struct.Struct]:
        with LOCK:
            if key in self._loaded:
                return self._loaded[key]
            described = "\0".join(
                (
                    edition(*self._packages(), "corequant._cpu.codegen"),
                    metadata.version("numba"),
                    self.function.__module__,
                    self.function.__qualname__,
                    str(key),
                )
            )

            def module() -> Any:
                from corequant._cpu.loops import frontend

                return frontend.lower(self, arguments)

            _provide_memory()
            code = cached(described, "s", ctypes.c_int64, module)
            self._loaded[key] = code, struct.Struct("".join(_letters(key)))
            return self._loaded[key]

    def _packages(self) -> list[str]:
        """Return the packages whose sources the code is made from: its own may lie deeper."""
        common, own = "corequant._cpu.loops", self.function.__module__.rpartition(".")[0]
        return [common, own] if own.startswith(f"{common}.") else [common]


def _provide_memory() -> None:
    for name, function in (
        (ALLOCATE, ctypes.pythonapi.PyMem_RawMalloc),
        (FREE, ctypes.pythonapi.PyMem_RawFree),
    ):
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


def _flatten(values: tuple[Any, ...], words: list[Any], kinds: list[Any]) -> None:
    """Append the words that pass values, and what their types depend on."""
    for value in values:
        kind = type(value)
        if kind is np.ndarray or isinstance(value, np.ndarray):
            flags = value.flags
            words += (address_of(value), *value.shape, *value.strides)
            kinds += (value.dtype, value.ndim, flags.c_contiguous, flags.aligned)
        elif isinstance(value, tuple):
            kinds += (kind, len(value))
            _flatten(value, words, kinds)
        elif value is None:
            kinds.append(kind)
        else:
            words.append(value)
            kinds.append(kind)


def _letters(key: tuple[Any, ...]) -> list[str]:
    """Return the letters that pack the words of arguments: 8 bytes each."""
    letters = []
    at = 0
    while at < len(key):
        kind = key[at]
        if isinstance(kind, np.dtype):
            letters.append("q" * (1 + 2 * key[at + 1]))
            at += 4
            continue
        if issubclass(kind, tuple):
            at += 2
            continue
        if kind is not type(None):
            letters.append(_letter(kind))
        at += 1
    return letters


def _letter(kind: Any) -> str:
    if issubclass(kind, (float, np.floating)):
        return "d"
    if issubclass(kind, np.bool_):
        return "?7x"
    return "Q" if issubclass(kind, np.unsignedinteger) else "q"


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as a kernel; as it is where compilation is switched off."""
    return function if compiled_away() else Kernel(function, reordered=False)


def jit_reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return likewise a kernel whose sums may be taken in any order."""
    return function if compiled_away() else Kernel(function, reordered=True)
