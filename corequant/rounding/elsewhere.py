"""Methods on arrays that aren't NumPy's: handed to the backend that owns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from corequant._dispatch import backend_for
from corequant.errors import BackendError
from corequant.protocols import ColumnSolver

__all__ = ["is_elsewhere", "solve_elsewhere"]

_ARRAYS = ("W", "quantized", "H", "G", "scales", "zero_points", "global_scale")


def is_elsewhere(W: Any) -> bool:
    """Tell whether ``W`` is an array of another backend than NumPy's."""
    return not isinstance(W, np.ndarray) and hasattr(W, "shape") and hasattr(W, "dtype")


def solve_elsewhere(method: str, arguments: Mapping[str, Any]) -> Any:
    """Return what the arrays' own backend makes of a method's arguments, each by its name.

    Raises
    ------
    BackendError
        If that backend has no adaptive rounding, or the arrays are on several devices.
    TypeError
        If the arrays belong to several backends, or to none.
    """
    arrays = {n: arguments[n] for n in _ARRAYS if _is_array(arguments.get(n))}
    backend: Any = backend_for(**arrays)
    if not isinstance(backend, ColumnSolver):
        raise BackendError(
            f"{method} must have a backend with round_columns, got arrays of {backend.name!r}, "
            "which has none; convert them to NumPy's"
        )
    return backend.round_columns(method, **arguments)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
