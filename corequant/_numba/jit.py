"""The one way in which kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["jit"]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel that releases the interpreter lock, cached on disk where that is possible.

    numba refuses to cache where neither the package's own folder nor the user's cache folder can
    be written; the kernel is then compiled anew in each process.
    """
    # numba's annotations know no keyword options without a signature.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
