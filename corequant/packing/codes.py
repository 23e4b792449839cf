"""Codes to bytes and back: a little-endian bit stream for each row.

Entry k of a row occupies bits ``[k*bits, (k+1)*bits)`` of its stream, so the even entry of a 4-bit
row sits in the low nibble. ``pack`` stores signed integers offset binary, ``u = code +
2**(bits-1)``, and pads rows with zero bits to whole 32-bit words, which makes the bytes those that
compressed-tensors stores as int32 words (``weight_packed``). ``pack_bytes`` stores codes as they
are in bytes: FP4 two to a byte, FP6 four to three bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.threads import for_rows
from corequant._validation import check_index, check_numpy, check_range
from corequant.errors import ShapeError

__all__ = ["pack", "pack_bytes", "packed_bytes", "packed_words", "unpack", "unpack_bytes"]


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
    half = 1 << (_check_bits(bits) - 1)
    _check_codes(codes, -half, half - 1, bits)
    offset = (codes.astype(np.int16) + np.int16(half)).astype(np.uint8)
    d = codes.shape[-1]
    packed = np.zeros((*codes.shape[:-1], packed_words(d, bits) * 4), np.uint8)
    _pack_rows(offset, bits, packed)
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
    half = 1 << (_check_bits(bits) - 1)
    check_index("d", d, 0)
    check_numpy("packed", packed)
    if packed.dtype != np.int32:
        raise TypeError(f"packed must have dtype int32, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] != packed_words(d, bits):
        raise ShapeError(
            f"packed must hold {packed_words(d, bits)} words a row for d={d} codes of {bits} bits, "
            f"got shape {packed.shape}"
        )
    words = np.ascontiguousarray(packed).astype("<i4", copy=False)
    codes = _unpack_rows(words.view(np.uint8), bits, d)
    return (codes.astype(np.int16) - np.int16(half)).astype(np.int8)


def pack_bytes(codes: Any, bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes, the lowest bits of each as they are, into bytes.

    Parameters
    ----------
    codes : numpy.ndarray (..., d), integer
        Each in ``[0, 2**bits - 1]``.
    bits : int
        Width of a code, 2 to 8.

    Returns
    -------
    numpy.ndarray (..., ceil(d·bits/8)), uint8

    Raises
    ------
    ShapeError, TypeError, ValueError
        If codes are not integers or out of range, or bits not 2 to 8.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.pack_bytes(np.arange(16), 4).tobytes().hex(" ")
    '10 32 54 76 98 ba dc fe'
    """
    _check_bits(bits)
    _check_codes(codes, 0, (1 << bits) - 1, bits)
    packed = np.zeros((*codes.shape[:-1], packed_bytes(codes.shape[-1], bits)), np.uint8)
    _pack_rows(codes.astype(np.uint8, copy=False), bits, packed)
    return packed


def unpack_bytes(packed: Any, bits: int, d: int) -> npt.NDArray[np.uint8]:
    """Unpack what ``pack_bytes`` packed.

    Parameters
    ----------
    packed : numpy.ndarray (..., ceil(d·bits/8)), uint8
    bits : int
        Width of a code, 2 to 8.
    d : int
        Codes per row.

    Returns
    -------
    numpy.ndarray (..., d), uint8

    Raises
    ------
    ShapeError, TypeError, ValueError
        If the last axis is not that long, or the dtype not uint8.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.unpack_bytes(np.array([0x10, 0x32], np.uint8), 4, 4)
    array([0, 1, 2, 3], dtype=uint8)
    """
    _check_bits(bits)
    check_index("d", d, 0)
    check_numpy("packed", packed)
    if packed.dtype != np.uint8:
        raise TypeError(f"packed must have dtype uint8, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] != packed_bytes(d, bits):
        raise ShapeError(
            f"packed must hold {packed_bytes(d, bits)} bytes a row for d={d} codes of {bits} bits, "
            f"got shape {packed.shape}"
        )
    return _unpack_rows(np.ascontiguousarray(packed), bits, d)


def packed_words(d: int, bits: int) -> int:
    """Return how many 32-bit words hold ``d`` codes of ``bits`` bits."""
    return -(-d * bits // 32)


def packed_bytes(d: int, bits: int) -> int:
    """Return how many bytes hold ``d`` codes of ``bits`` bits."""
    return -(-d * bits // 8)


def _pack_rows(codes: npt.NDArray[np.uint8], bits: int, packed: npt.NDArray[np.uint8]) -> None:
    from corequant._cpu.loops.packing import pack_rows

    d = codes.shape[-1]
    if not codes.size:
        return
    rows = np.ascontiguousarray(codes).reshape(-1, d)
    out = packed.reshape(len(rows), -1)
    for_rows(len(rows), d, lambda first, last: pack_rows(rows[first:last], bits, out[first:last]))


def _unpack_rows(packed: npt.NDArray[np.uint8], bits: int, d: int) -> npt.NDArray[np.uint8]:
    from corequant._cpu.loops.packing import unpack_rows

    codes = np.empty((*packed.shape[:-1], d), np.uint8)
    if codes.size:
        rows = packed.reshape(-1, packed.shape[-1])
        out = codes.reshape(len(rows), d)
        for_rows(
            len(rows), d, lambda first, last: unpack_rows(rows[first:last], bits, out[first:last])
        )
    return codes


def _check_codes(codes: Any, least: int, most: int, bits: int) -> None:
    check_numpy("codes", codes)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes must have an integer dtype, got {codes.dtype}")
    if codes.ndim == 0:
        raise ShapeError("codes must have at least 1 axis, got a scalar")
    check_range(f"codes of {bits} bits", codes, least, most)


def _check_bits(bits: Any) -> int:
    if (number := check_index("bits", bits, 2)) > 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    return number
