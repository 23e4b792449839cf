"""Scales and means as an additive weight stores them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_numpy
from corequant.errors import ShapeError
from corequant.rounding.codebooks.coded import LARGEST_STORED

__all__ = ["check_scales", "halved"]

Array = npt.NDArray[Any]


def check_scales(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``value`` is a finite floating array of this shape."""
    check_numpy(name, value)
    if value.shape != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {value.shape}")
    check_floating(name, value)
    check_finite(name, value)


def halved(name: str, values: Array, exponent: int) -> npt.NDArray[np.float16]:
    """Return finite numbers as they are stored, or raise if they are too large."""
    wide = values.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0))
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(wide, -exponent)
        stored = scaled.astype(np.float16)
    if not np.abs(scaled).max(initial=0) <= 65504 or largest > LARGEST_STORED:
        limit = min(65504 * 2.0 ** min(exponent, 112), LARGEST_STORED)
        raise ValueError(f"{name} must be at most {limit:.4g} for {exponent=}, got {largest:g}")
    return stored
