"""The two ways in which kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["jit", "jit_reordered"]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel that releases the interpreter lock, cached on disk where that is possible.

    numba refuses to cache where neither the package's own folder nor the user's cache folder can
    be written; the kernel is then compiled again in each process.
    """
    return _compiled(function, False)


def jit_reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile likewise a kernel whose sums may be taken in any order, so in vectors."""
    return _compiled(function, {"reassoc", "nsz", "contract"})


def _compiled(function: Callable[..., Any], fastmath: Any) -> Callable[..., Any]:
    # numba's annotations know no keyword options without a signature.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
