"""Numbers that GGUF blocks of any usual type stand for: legacy types, K-quants and some others.

A block is a run of consecutive numbers of a row. Its bytes hold codes, planes of a few bits at
a time, and one or two levels of scales. The products and sums are those of the reference, in its
order and in float32, so that decoded numbers agree with those of other readers bit for bit.

Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import ShapeError, SpecError
from corequant.formats import formats

__all__ = ["DECODED_TYPES", "block_shape", "decode_blocks"]

Array = npt.NDArray[Any]
Decoder = Callable[[Array], Array]

_PANEL = 1 << 13
"""Blocks that are decoded at a time, so that intermediate arrays stay small."""

_SMALL, _LARGE = 32, 256
"""Numbers of a legacy block and of a super-block."""

_NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""The levels of IQ4_NL and IQ4_XS."""

_TWICE_FP4 = (formats["float4_e2m1fn"].values * 2 + 0).astype(np.float32)
"""Adding zero makes both zeros the positive one."""

_THREES = np.array([1, 3, 9, 27, 81], np.uint8)


def decode_blocks(blocks: Array, block_type: str) -> npt.NDArray[np.float32]:
    """Return the numbers that GGUF blocks stand for, written by any program.

    Parameters
    ----------
    blocks : numpy.ndarray (..., bytes), uint8
    block_type : str
        One of ``DECODED_TYPES``.

    Returns
    -------
    numpy.ndarray (..., d), float32

    Raises
    ------
    ShapeError, SpecError
        If the bytes are not whole blocks, or the type is another.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.storage.gguf import decode_blocks, quantize_blocks
    >>> x = np.linspace(-1, 2, 32, dtype=np.float32)[None]
    >>> decode_blocks(quantize_blocks(x, "Q4_1"), "Q4_1")[0, ::8]
    array([-1.        , -0.20019531,  0.5996094 ,  1.3994141 ], dtype=float32)
    """
    size, width = block_shape(block_type)
    if blocks.dtype != np.uint8 or blocks.ndim < 1 or blocks.shape[-1] % width:
        raise ShapeError(
            f"blocks must be uint8 with a multiple of {width} bytes a row, "
            f"got {blocks.dtype} {blocks.shape}"
        )
    each = np.ascontiguousarray(blocks).reshape(-1, width)
    numbers = np.empty((len(each), size), np.float32)
    decode = _LAYOUTS[block_type][2]
    # What isn't finite is for the caller to refuse.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(each), _PANEL):
            panel = slice(start, start + _PANEL)
            numbers[panel] = decode(each[panel])
    return numbers.reshape(*blocks.shape[:-1], blocks.shape[-1] // width * size)


def block_shape(block_type: str) -> tuple[int, int]:
    """Return how many numbers a block of a type holds, and in how many bytes.

    Parameters
    ----------
    block_type : str
        One of ``DECODED_TYPES``.

    Returns
    -------
    numbers, bytes : int

    Raises
    ------
    SpecError
        If the type is another.

    Examples
    --------
    >>> from corequant.storage.gguf_blocks import block_shape
    >>> block_shape("Q4_K")
    (256, 144)
    """
    if block_type not in _LAYOUTS:
        raise SpecError(f"block_type must be one of {', '.join(_LAYOUTS)}, got {block_type!r}")
    size, width, _ = _LAYOUTS[block_type]
    return size, width


def _halves(column: Array) -> npt.NDArray[np.float32]:
    """Return float16 numbers in pairs of bytes as float32, (blocks, numbers)."""
    numbers: npt.NDArray[np.float32] = np.ascontiguousarray(column).view("<f2").astype(np.float32)
    return numbers


def _planes(body: Array, width: int, bits: int) -> npt.NDArray[np.uint8]:
    """Return codes of some bits, of which each run of ``width`` bytes holds planes.

    The first plane are the lowest bits of all bytes of the run.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = body.reshape(len(body), -1, 1, width)
    codes: npt.NDArray[np.uint8] = ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(len(body), -1)
    return codes


def _spread(scales: Array, codes: Array) -> npt.NDArray[np.float32]:
    """Return each group's scale times its codes."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    numbers: npt.NDArray[np.float32] = (scales[..., None] * groups).reshape(len(codes), -1)
    return numbers


def _below(numbers: Array, offsets: Array) -> Array:
    """Return numbers less their group's offset."""
    groups = numbers.reshape(*offsets.shape, -1)
    return (groups - offsets[..., None]).reshape(numbers.shape)


def _q4_0(b: Array) -> Array:
    return _halves(b[:, :2]) * (_planes(b[:, 2:], 16, 4).astype(np.int8) - np.int8(8))


def _q4_1(b: Array) -> Array:
    head = _halves(b[:, :4])
    return head[:, :1] * _planes(b[:, 4:], 16, 4) + head[:, 1:]


def _fifth_bits(packed: Array) -> npt.NDArray[np.uint8]:
    """Return the highest bits of 32 codes, as numbers to be added."""
    highest: npt.NDArray[np.uint8] = np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)
    return highest


def _q5_0(b: Array) -> Array:
    codes = _planes(b[:, 6:], 16, 4) | _fifth_bits(b[:, 2:6])
    return _halves(b[:, :2]) * (codes.astype(np.int8) - np.int8(16))


def _q5_1(b: Array) -> Array:
    head = _halves(b[:, :4])
    return head[:, :1] * (_planes(b[:, 8:], 16, 4) | _fifth_bits(b[:, 4:8])) + head[:, 1:]


def _q8_0(b: Array) -> Array:
    return _halves(b[:, :2]) * b[:, 2:].view(np.int8)


def _q2_k(b: Array) -> Array:
    head = _halves(b[:, 80:])
    scales = head[:, :1] * (b[:, :16] & np.uint8(15))
    offsets = head[:, 1:] * (b[:, :16] >> np.uint8(4))
    return _below(_spread(scales, _planes(b[:, 16:80], 32, 2)), offsets)


def _q3_k(b: Array) -> Array:
    # 16 scales of six bits: nibbles, then pairs of bits.
    six = _planes(b[:, 96:104], 8, 4) | (_planes(b[:, 104:108], 4, 2) << np.uint8(4))
    scales = _halves(b[:, 108:]) * (six.astype(np.int8) - np.int8(32))
    # A third bit that is set means that nothing is subtracted.
    lacking = (_planes(b[:, :32], 32, 1) ^ np.uint8(1)) << np.uint8(2)
    return _spread(scales, _planes(b[:, 32:96], 32, 2).astype(np.int8) - lacking.astype(np.int8))


def _eight_scales(b: Array) -> tuple[Array, Array]:
    """Return scales and offsets of the groups of Q4_K and Q5_K, each of six bits."""
    head, packed = _halves(b[:, :4]), b[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six, two = np.uint8(63), np.uint8(0x30)
    scales = np.concatenate(
        [first & six, (third & np.uint8(15)) | ((first >> np.uint8(2)) & two)], axis=1
    )
    offsets = np.concatenate(
        [second & six, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & two)], axis=1
    )
    return head[:, :1] * scales, head[:, 1:] * offsets


def _q4_k(b: Array) -> Array:
    scales, offsets = _eight_scales(b)
    return _below(_spread(scales, _planes(b[:, 16:], 32, 4)), offsets)


def _q5_k(b: Array) -> Array:
    scales, offsets = _eight_scales(b)
    codes = _planes(b[:, 48:], 32, 4) | (_planes(b[:, 16:48], 32, 1) << np.uint8(4))
    return _below(_spread(scales, codes), offsets)


def _q6_k(b: Array) -> Array:
    codes = _planes(b[:, :128], 64, 4) | (_planes(b[:, 128:192], 32, 2) << np.uint8(4))
    scales = _halves(b[:, 208:]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _spread(scales, codes.astype(np.int8) - np.int8(32))


def _iq4_nl(b: Array) -> Array:
    return _halves(b[:, :2]) * _NONLINEAR[_planes(b[:, 2:], 16, 4)]


def _iq4_xs(b: Array) -> Array:
    low = np.stack([b[:, 4:8] & np.uint8(15), b[:, 4:8] >> np.uint8(4)], axis=2).reshape(-1, 8)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    six = low | ((high & 3).astype(np.uint8) << np.uint8(4))
    scales = _halves(b[:, :2]) * (six.astype(np.int8) - np.int8(32))
    return _spread(scales, _NONLINEAR[_planes(b[:, 8:], 16, 4)])


def _trits(body: Array, width: int, count: int) -> Array:
    """Return digits of base three, of which a byte holds ``count``, the highest first."""
    shifted = body.reshape(len(body), 1, width) * _THREES[:count, None]
    return ((shifted.astype(np.uint16) * 3) >> 8).reshape(len(body), -1)


def _tq1_0(b: Array) -> Array:
    digits = [_trits(b[:, :32], 32, 5), _trits(b[:, 32:48], 16, 5), _trits(b[:, 48:52], 4, 4)]
    return _halves(b[:, 52:]) * (np.concatenate(digits, axis=1).astype(np.int8) - np.int8(1))


def _tq2_0(b: Array) -> Array:
    return _halves(b[:, 64:]) * (_planes(b[:, :64], 32, 2).astype(np.int8) - np.int8(1))


def _mxfp4(b: Array) -> Array:
    # Half the scales and twice the numbers: 2 ** 128 is not a float32 number.
    scales = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return scales * _TWICE_FP4[_planes(b[:, 1:], 16, 4)]


_LAYOUTS: dict[str, tuple[int, int, Decoder]] = {
    "Q4_0": (_SMALL, 18, _q4_0),
    "Q4_1": (_SMALL, 20, _q4_1),
    "Q5_0": (_SMALL, 22, _q5_0),
    "Q5_1": (_SMALL, 24, _q5_1),
    "Q8_0": (_SMALL, 34, _q8_0),
    "Q2_K": (_LARGE, 84, _q2_k),
    "Q3_K": (_LARGE, 110, _q3_k),
    "Q4_K": (_LARGE, 144, _q4_k),
    "Q5_K": (_LARGE, 176, _q5_k),
    "Q6_K": (_LARGE, 210, _q6_k),
    "IQ4_NL": (_SMALL, 18, _iq4_nl),
    "IQ4_XS": (_LARGE, 136, _iq4_xs),
    "TQ1_0": (_LARGE, 54, _tq1_0),
    "TQ2_0": (_LARGE, 66, _tq2_0),
    "MXFP4": (_SMALL, 17, _mxfp4),
}
"""Numbers and bytes of a block, and how it is decoded."""

DECODED_TYPES = tuple(_LAYOUTS)
"""Names of the block types that ``decode_blocks`` takes."""
