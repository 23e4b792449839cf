"""The one way in which kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["jit", "jit_signature"]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel that releases the interpreter lock, cached on disk where that is possible.

    numba refuses to cache where neither the package's own folder nor the user's cache folder can
    be written; the kernel is then compiled anew in each process.
    """
    return _compile(function)


def jit_signature(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Like ``jit``, for one signature: compiled, or taken from the disk, at once."""
    return lambda function: _compile(function, signature)


def _compile(function: Callable[..., Any], *signature: str) -> Callable[..., Any]:
    # numba's annotations know no keyword options without a signature.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(*signature, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(*signature, **options)(function)  # type: ignore[no-any-return]
