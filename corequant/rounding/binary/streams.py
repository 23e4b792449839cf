"""Planes of signs and of ternary digits as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pack_digits", "plane_bytes", "unpack_digits"]

Array = npt.NDArray[Any]

_TRITS = 5
"""Ternary digits per byte: 3**5 is 243."""

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def plane_bytes(count: int, base: int) -> int:
    """Return the bytes of ``count`` digits of base 2 or 3."""
    return -(-count // (8 if base == 2 else _TRITS))


def pack_digits(digits: Array, base: int) -> npt.NDArray[np.uint8]:
    """Return digits (n,) of base 2, eight to a byte, or of base 3, five to a byte."""
    if base == 2:
        return np.packbits(digits.astype(np.bool_), bitorder="little")
    padded = np.zeros(plane_bytes(len(digits), base) * _TRITS, np.uint8)
    padded[: len(digits)] = digits
    packed: npt.NDArray[np.uint8] = (padded.reshape(-1, _TRITS) * _POWERS).sum(1, dtype=np.uint8)
    return packed


def unpack_digits(packed: Array, base: int, count: int) -> npt.NDArray[np.uint8]:
    """Return the first ``count`` digits packed by ``pack_digits``."""
    if base == 2:
        return np.unpackbits(packed, count=count, bitorder="little")
    digits = packed[:, None] // _POWERS % np.uint8(3)
    return digits.reshape(-1)[:count]
