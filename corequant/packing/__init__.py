"""Codes as bytes, and tensors that stay packed."""

from __future__ import annotations

from corequant.packing.codes import (
    pack,
    pack_bytes,
    packed_bytes,
    packed_words,
    unpack,
    unpack_bytes,
)

__all__ = ["pack", "pack_bytes", "packed_bytes", "packed_words", "unpack", "unpack_bytes"]
