"""Scales in stored form (bytes, halves or floats), and back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import backend_for
from corequant.formats import find_format
from corequant.specs import QuantSpec, ScaleFormat

__all__ = ["SCALE_BYTES", "load_scales", "numbers_of", "store_scales"]

Array = npt.NDArray[Any]

SCALE_BYTES = {
    kind: kind.numbers.name for kind in ScaleFormat if kind.numbers and kind.dtype == "uint8"
}
"""Formats of scales that are stored as a byte."""


def store_scales(scales: Array, spec: QuantSpec) -> Array:
    """Return scales as they are stored: bytes E8M0 or E4M3, float16, otherwise float32.

    Raises ValueError where a scale is not a number of that format.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.storage.scales import store_scales
    >>> from corequant.specs import presets
    >>> store_scales(np.array([[1.0, 0.5]], np.float32), presets["mxfp4"])
    array([[127, 126]], dtype=uint8)
    """
    kind = spec.scale_format
    if kind is ScaleFormat.E8M0 and scales.dtype == np.float32:
        # A power of two is its exponent field, except for the subnormal 2**-127.
        stored: Array = (np.ascontiguousarray(scales).view(np.uint32) >> 23).astype(np.uint8)
        exact = numbers_of(kind)[stored] == scales
    elif kind in SCALE_BYTES:
        form = find_format(SCALE_BYTES[kind])
        backend = backend_for(scales=scales)
        stored = backend.encode(scales, form)
        exact = backend.decode(stored, form) == scales
    else:
        with np.errstate(over="ignore"):
            narrow = np.float16 if kind is ScaleFormat.FLOAT16 else np.float32
            stored = np.ascontiguousarray(scales, narrow)
        exact = stored == scales if kind is ScaleFormat.FLOAT16 else np.isfinite(stored)
    if not exact.all():
        raise ValueError(f"scales must be numbers of {kind.value}, got {scales[~exact][0]}")
    return stored


def load_scales(stored: Array, spec: QuantSpec) -> Array:
    """Return stored scales as float32.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.storage.scales import load_scales
    >>> from corequant.specs import presets
    >>> load_scales(np.array([[127, 126]], np.uint8), presets["mxfp4"])
    array([[1. , 0.5]], dtype=float32)
    """
    if spec.scale_format in SCALE_BYTES:
        if isinstance(stored, np.ndarray):
            return numbers_of(spec.scale_format)[stored]
        decoded: Array = backend_for(stored=stored).decode(
            stored, find_format(SCALE_BYTES[spec.scale_format])
        )
        return decoded
    return stored.astype(np.float32)


@cache
def numbers_of(kind: ScaleFormat) -> Array:
    """Return the numbers that the 256 bytes of a scale stand for, float32."""
    return find_format(SCALE_BYTES[kind]).values.astype(np.float32)
