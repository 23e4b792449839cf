"""Forks: a child process starts with no half-compiled kernel and no lock left held.

Only the thread that forks lives on in the child. What another thread holds at that moment, it holds
there for ever: the lock around LLVM, numba's around its compiler, that of a module which is being
imported. So the forking thread takes these locks first, which waits until compilations and imports
under way have ended, and releases them on both sides.

What is registered last is done first before a fork. ``logging`` and ``concurrent.futures`` take
locks of their own there, which a compilation may wait for: they are imported here, so that theirs
are taken after ours.
"""

from __future__ import annotations

import _imp
import concurrent.futures.thread  # noqa: F401  (registers what it does before a fork)
import contextlib
import logging  # noqa: F401  (so does this)
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["locks", "register"]

_PATIENCE = 60.0
"""Seconds to wait for each lock; longer waits for the one who forks, and would never end."""

_LOOK = 1e-3
"""Seconds between looks at imports that are under way."""

_IMPORTED = frozenset(
    (
        "corequant",
        "corequant_torch",
        "corequant_transformers",
        "llvmlite",
        "numba",
        "numpy",
        "scipy",
    )
)
"""Packages that calls of this one import while they run."""


class _Held(threading.local):
    """What the thread that forks holds meanwhile."""

    def __init__(self) -> None:
        self.locks: list[Any] = []
        self.missed: list[Any] = []
        self.importing = False


_held = _Held()


def register() -> None:
    """Have all forks of this process prepared, where processes can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_prepare, after_in_parent=_release, after_in_child=_release_in_child
        )


def locks() -> Iterator[Any]:
    """Yield our own lock, and those of numba's compiler and of LLVM, as far as they are loaded.

    Their order is that in which a compilation takes them. numba guards its contexts with two locks
    each, its own and, before Python 3.12, that of ``functools.cached_property``; every use of a
    compiled function holds them for a moment.
    """
    yield from _found("corequant._cpu.loops.jit", "LOCK")
    yield from _found("numba.core.compiler_lock", "global_compiler_lock", "_lock")
    registry: Any = sys.modules.get("numba.core.registry")
    for guarded in vars(getattr(registry, "CPUTarget", object)).values():
        yield from (getattr(guarded, name) for name in ("_lock", "lock") if hasattr(guarded, name))
    yield from _found("llvmlite.binding.ffi", "lib", "_lock", "_lock")


def _found(module: str, *path: str) -> Iterator[Any]:
    found: Any = sys.modules.get(module)
    with contextlib.suppress(AttributeError):
        for name in path:
            found = getattr(found, name)
        yield found


def _prepare() -> None:
    while True:
        found = list(locks())
        for lock in found:
            (_held.locks if lock.acquire(timeout=_PATIENCE) else _held.missed).append(lock)
        _settle_imports()
        # A package whose import ended meanwhile has locks that others may hold by now.
        if len(list(locks())) == len(found):
            return
        _release()


def _settle_imports() -> None:
    """Take the lock without which no import begins, at a moment when none is under way."""
    end = time.monotonic() + _PATIENCE
    while True:
        _imp.acquire_lock()
        if _own_import() or not _importing() or time.monotonic() > end:
            _held.importing = True
            return
        _imp.release_lock()
        time.sleep(_LOOK)


def _importing() -> bool:
    """Return whether a module of ours, or one that we use, is being imported."""
    return any(
        name.partition(".")[0] in _IMPORTED
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
    )


def _own_import() -> bool:
    """Return whether the thread that forks is itself importing, which cannot be waited for."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _release() -> None:
    if _held.importing:
        _held.importing = False
        _imp.release_lock()
    while _held.locks:
        _held.locks.pop().release()
    _held.missed.clear()


def _release_in_child() -> None:
    for lock in _held.missed:
        # Its owner doesn't live here.
        lock._at_fork_reinit()
    _release()
