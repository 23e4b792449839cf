"""Numbers of a few bits each as one little-endian stream of bits, padded to a byte at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["bits_for", "pack_stream", "stream_bytes", "unpack_stream"]

_CHUNK = 1 << 16
"""Numbers per chunk; a multiple of eight, so that chunks end at byte boundaries."""


def bits_for(count: int) -> int:
    """Return the number of bits that distinguish ``count`` values."""
    return max(0, count - 1).bit_length()


def stream_bytes(count: int, width: int) -> int:
    """Return the bytes of ``count`` numbers of ``width`` bits."""
    return (count * width + 7) // 8


def pack_stream(codes: npt.NDArray[Any], width: int) -> npt.NDArray[np.uint8]:
    """Return ``codes`` (n,), each below ``2**width``, as a stream; width is at most 32."""
    packed = np.empty(stream_bytes(len(codes), width), np.uint8)
    places = np.arange(width, dtype=np.uint32)
    for first in range(0, len(codes) if width else 0, _CHUNK):
        part = codes[first : first + _CHUNK].astype(np.uint32)
        bits = ((part[:, None] >> places) & 1).astype(np.uint8)
        start = stream_bytes(first, width)
        chunk = np.packbits(bits.reshape(-1), bitorder="little")
        packed[start : start + len(chunk)] = chunk
    return packed


def unpack_stream(packed: npt.NDArray[np.uint8], width: int, count: int) -> npt.NDArray[np.uint32]:
    """Return the ``count`` numbers of ``width`` bits of a stream."""
    codes = np.zeros(count, np.uint32)
    places = np.arange(width, dtype=np.uint32)
    for first in range(0, count if width else 0, _CHUNK):
        size = min(_CHUNK, count - first)
        start = stream_bytes(first, width)
        chunk = packed[start : start + stream_bytes(size, width)]
        bits = np.unpackbits(chunk, count=size * width, bitorder="little").reshape(size, width)
        codes[first : first + size] = (bits.astype(np.uint32) << places).sum(1, dtype=np.uint32)
    return codes
