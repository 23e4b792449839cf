"""Codes to bytes and back: a little-endian bit stream for each row.

Codes are stored offset binary, ``u = code + 2**(bits-1)``. Entry k of a row occupies bits
``[k*bits, (k+1)*bits)`` of its stream, so the even entry of a 4-bit row sits in the low nibble.
Rows are padded with zero bits to whole 32-bit words, which makes the bytes those that
compressed-tensors stores as int32 words (``weight_packed``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import ShapeError

__all__ = ["pack", "packed_words", "unpack"]


def pack(codes: Any, bits: int) -> npt.NDArray[np.int32]:
    """Pack signed codes into 32-bit words.

    Parameters
    ----------
    codes : numpy.ndarray (..., d), integer
        Each in ``[-2**(bits-1), 2**(bits-1) - 1]``.
    bits : int
        Width of a code, 2 to 8.

    Returns
    -------
    numpy.ndarray (..., ceil(d·bits/32)), int32

    Raises
    ------
    ShapeError, TypeError, ValueError
        If codes are not integers or out of range, or bits not 2 to 8.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> [hex(int(w) & 0xFFFFFFFF) for w in cq.pack(np.arange(-8, 8), 4)]
    ['0x76543210', '0xfedcba98']
    """
    _check_bits(bits)
    if not isinstance(codes, np.ndarray):
        raise TypeError(f"codes must be a numpy.ndarray, got {type(codes).__name__}")
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes must have an integer dtype, got {codes.dtype}")
    if codes.ndim == 0:
        raise ShapeError("codes must have at least 1 axis, got a scalar")
    half = 1 << (bits - 1)
    if codes.size and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(
            f"codes must lie in [{-half}, {half - 1}] for {bits} bits, "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    d = codes.shape[-1]
    offset = (codes.astype(np.int16) + half).astype(np.uint8)
    stream = np.unpackbits(offset[..., None], axis=-1, count=bits, bitorder="little")
    padded = np.zeros((*codes.shape[:-1], packed_words(d, bits) * 32), np.uint8)
    padded[..., : d * bits] = stream.reshape(*codes.shape[:-1], d * bits)
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<i4").astype(np.int32, copy=False)


def unpack(packed: Any, bits: int, d: int) -> npt.NDArray[np.int8]:
    """Unpack what ``pack`` packed.

    Parameters
    ----------
    packed : numpy.ndarray (..., ceil(d·bits/32)), int32
    bits : int
        Width of a code, 2 to 8.
    d : int
        Codes per row.

    Returns
    -------
    numpy.ndarray (..., d), int8

    Raises
    ------
    ShapeError, TypeError, ValueError
        If the last axis is not that long, or the dtype not int32.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.unpack(cq.pack(np.array([-4, 3, 0]), 3), 3, 3)
    array([-4,  3,  0], dtype=int8)
    """
    _check_bits(bits)
    check_index("d", d, 0)
    if not isinstance(packed, np.ndarray):
        raise TypeError(f"packed must be a numpy.ndarray, got {type(packed).__name__}")
    if packed.dtype != np.int32:
        raise TypeError(f"packed must have dtype int32, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] != packed_words(d, bits):
        raise ShapeError(
            f"packed must hold {packed_words(d, bits)} words a row for d={d} codes of {bits} bits, "
            f"got shape {packed.shape}"
        )
    words = np.ascontiguousarray(packed).astype("<i4", copy=False)
    stream = np.unpackbits(words.view(np.uint8), axis=-1, count=d * bits, bitorder="little")
    codes = np.packbits(stream.reshape(*packed.shape[:-1], d, bits), axis=-1, bitorder="little")
    return (codes[..., 0].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def packed_words(d: int, bits: int) -> int:
    """Return how many 32-bit words hold ``d`` codes of ``bits`` bits."""
    return -(-d * bits // 32)


def _check_bits(bits: Any) -> None:
    if check_index("bits", bits, 2) > 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
