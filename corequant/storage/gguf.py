"""Blocks of 32 numbers as GGUF stores them: Q4_0, Q4_1, Q8_0 and MXFP4 are written.

Nibbles of entries j and j + 16 share a byte, the former in the low one. Scales are float16, or one
byte E8M0. ``to_blocks`` stores what was quantized elsewhere, whatever chose its scales;
``quantize_blocks`` rounds as llama.cpp does it itself: by multiplying with the reciprocal in
float32, halves away from zero, with a scale of the sign that maps the largest magnitude to -8
(Q4_0).

The numbers of a block are its scale times its codes; Q4_1 adds an offset of float16, which stands
for the scale times the zero point and is that product rounded: the only thing that changes when a
quantized tensor is stored.

``decode_blocks`` reads these types and all others that files usually hold.

Source: ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_array, check_divides, check_finite, check_numpy
from corequant.errors import ShapeError, SpecError
from corequant.formats import formats
from corequant.quantization import QuantizedTensor, quantize
from corequant.specs import QuantSpec, presets
from corequant.storage.gguf_blocks import DECODED_TYPES, decode_blocks

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_TYPES",
    "DECODED_TYPES",
    "block_type_of",
    "decode_blocks",
    "from_blocks",
    "quantize_blocks",
    "to_blocks",
]

Array = npt.NDArray[Any]

_SIZE = 32
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q8_0", "MXFP4")
"""Names of the block types that this module writes."""

_SPECS = {
    "Q4_0": QuantSpec.parse("int4:group32:symmetric:float16"),
    "Q4_1": QuantSpec.parse("int4:group32:asymmetric:float16"),
    "Q8_0": QuantSpec.parse("int8:group32:symmetric:float16"),
    "MXFP4": presets["mxfp4"],
}


def _key(spec: QuantSpec) -> tuple[Any, ...]:
    return spec.format, spec.group_size, spec.symmetric, spec.scale_format


_BY_KEY = {_key(spec): name for name, spec in _SPECS.items()}
_HEADERS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2, "MXFP4": 1}
"""Bytes before a block's codes."""

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "MXFP4": 17}
"""Bytes of a block of each type."""


def block_type_of(spec: QuantSpec) -> str:
    """Return the GGUF block type of a spec.

    Raises
    ------
    SpecError
        If GGUF has none; the message names the specs for which it has one.

    Examples
    --------
    >>> from corequant.storage.gguf import block_type_of
    >>> from corequant.specs import QuantSpec
    >>> block_type_of(QuantSpec.parse("int4:group32:asymmetric:float16:mse"))
    'Q4_1'
    """
    name = _BY_KEY.get(_key(spec))
    if name is None:
        wanted = ", ".join(f"{kind} {known}" for kind, known in _SPECS.items())
        raise SpecError(f"GGUF has no block type for {spec}; it has {wanted}")
    return name


def to_blocks(quantized: QuantizedTensor) -> tuple[str, Array]:
    """Return a quantized tensor as GGUF blocks.

    Parameters
    ----------
    quantized : QuantizedTensor
        NumPy arrays: int4, or symmetric int8, in groups of 32 with float16 scales, or MXFP4.

    Returns
    -------
    block_type : str
        One of ``BLOCK_TYPES``.
    blocks : numpy.ndarray (..., bytes), uint8
        What ``GGUFWriter.add_tensor`` takes as raw data of that type.

    Raises
    ------
    SpecError
        If GGUF has no block type for the spec; the message names those that it has.
    ValueError
        If a scale or an offset is not finite in its format.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.storage.gguf import to_blocks
    >>> kind, blocks = to_blocks(cq.quantize(np.ones((1, 32), np.float32), "mxfp4"))
    >>> kind, blocks[0, :3].tobytes().hex(" ")
    ('MXFP4', '7d 66 66')
    """
    from corequant.storage.scales import store_scales

    spec = quantized.spec
    name = block_type_of(spec)
    codes = quantized.codes.reshape(-1, _SIZE)
    head = store_scales(quantized.scales, spec).reshape(-1, 1)
    if name != "MXFP4":
        head = _halves(head)
    if quantized.zero_points is not None:
        zeros = quantized.zero_points.reshape(-1, 1).astype(np.float32)
        scales = quantized.scales.reshape(-1, 1).astype(np.float32)
        offsets = (np.float32(spec.format.least_code) - zeros) * scales
        least = _halves(offsets)
        if not np.isfinite(least.view("<f2")).all():
            worst = float(offsets.flat[np.abs(offsets).argmax()])
            raise ValueError(f"offsets must be numbers of float16, got {worst}")
        head = np.concatenate([head, least], axis=1)
    body = codes.view(np.uint8) if name == "Q8_0" else _nibbles(codes, spec.format.least_code)
    blocks = np.concatenate([head, body], axis=1)
    return name, blocks.reshape(*quantized.codes.shape[:-1], -1)


def from_blocks(blocks: Array, block_type: str) -> QuantizedTensor:
    """Return the quantized tensor that GGUF blocks hold.

    Parameters
    ----------
    blocks : numpy.ndarray (..., bytes), uint8
    block_type : str
        Q8_0 or MXFP4, or Q4_0 if its scales are positive, as those of ``to_blocks`` are. Not Q4_1,
        whose offsets are not multiples of the scales.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    ShapeError, SpecError, ValueError
        If the bytes are not whole blocks, the type is another, or a scale is negative.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.storage.gguf import from_blocks, to_blocks
    >>> kind, blocks = to_blocks(cq.quantize(np.ones((1, 32), np.float32), "mxfp4"))
    >>> float(cq.dequantize(from_blocks(blocks, kind))[0, 0])
    1.0
    """
    known = [name for name in _SPECS if name != "Q4_1"]
    if block_type not in known:
        raise SpecError(f"block_type must be one of {', '.join(known)}, got {block_type!r}")
    spec = _SPECS[block_type]
    scales, _, codes = _parts(blocks, block_type)
    if not (scales > 0).all():
        raise ValueError(f"blocks must have positive scales, got {scales[~(scales > 0)][0]}")
    lead, count = blocks.shape[:-1], blocks.shape[-1] // BLOCK_BYTES[block_type]
    return QuantizedTensor(
        codes.reshape(*lead, count * _SIZE), scales.reshape(*lead, count), None, spec
    )


def _parts(blocks: Array, block_type: str) -> tuple[Array, Array | None, Array]:
    """Return scales, offsets (both of one column) and codes of blocks, one a row."""
    header, width = _HEADERS[block_type], BLOCK_BYTES[block_type]
    if blocks.dtype != np.uint8 or blocks.ndim < 1 or blocks.shape[-1] % width:
        raise ShapeError(
            f"blocks must be uint8 with a multiple of {width} bytes a row, "
            f"got {blocks.dtype} {blocks.shape}"
        )
    each = np.ascontiguousarray(blocks).reshape(-1, width)
    head, body = np.ascontiguousarray(each[:, :header]), each[:, header:]
    if block_type == "Q8_0":
        return head.view("<f2").astype(np.float32), None, body.view(np.int8)
    codes = np.concatenate([body & 15, body >> 4], axis=1)
    if block_type == "MXFP4":
        return np.ldexp(np.float32(1), head.astype(np.int32) - 127), None, codes
    numbers = head.view("<f2").astype(np.float32)
    if block_type == "Q4_1":
        return numbers[:, :1], numbers[:, 1:], codes
    return numbers, None, codes.astype(np.int8) + np.int8(_SPECS[block_type].format.least_code)


def quantize_blocks(x: Any, block_type: str) -> Array:
    """Round ``x`` to GGUF blocks by llama.cpp's own rules, byte for byte.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
        Floating and finite, d a multiple of 32; rounded in float32.
    block_type : str
        One of ``BLOCK_TYPES``.

    Returns
    -------
    numpy.ndarray (..., bytes), uint8

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError
        If x is not finite or of another shape or dtype, or the type unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.storage.gguf import quantize_blocks
    >>> quantize_blocks(np.ones((1, 32), np.float32), "Q4_0").tobytes()[:4].hex(" ")
    '00 b0 00 00'
    """
    if block_type not in BLOCK_TYPES:
        raise SpecError(f"block_type must be one of {', '.join(BLOCK_TYPES)}, got {block_type!r}")
    check_numpy("x", x)
    check_array("x", x)
    check_divides("group_size", _SIZE, x.shape[-1])
    if block_type == "MXFP4":
        # Halves go to the code that comes first, which is the smaller magnitude.
        return _towards_zero_mxfp4(x)
    check_finite("x", x)
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, _SIZE)
    if block_type == "Q8_0":
        scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        steps = blocks * _reciprocal(scale)
        # np.rint would round halves to even.
        codes = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps).astype(np.int8)
        joined = np.concatenate([_halves(scale), codes.view(np.uint8)], axis=1)
    else:
        joined = _quantize_4(blocks, block_type)
    return joined.reshape(*x.shape[:-1], -1)


def _quantize_4(blocks: Array, block_type: str) -> Array:
    if block_type == "Q4_0":
        where = np.abs(blocks).argmax(1)[:, None]
        scale = np.take_along_axis(blocks, where, 1) / np.float32(-8)
        codes = blocks * _reciprocal(scale) + np.float32(8.5)
        heads = [_halves(scale)]
    else:
        least = blocks.min(1, keepdims=True)
        scale = (blocks.max(1, keepdims=True) - least) / np.float32(15)
        codes = (blocks - least) * _reciprocal(scale) + np.float32(0.5)
        heads = [_halves(scale), _halves(least)]
    return np.concatenate([*heads, _nibbles(codes.astype(np.uint8).clip(0, 15), 0)], axis=1)


def _towards_zero_mxfp4(x: Array) -> Array:
    quantized = quantize(np.ascontiguousarray(x, np.float32), presets["mxfp4"])
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, _SIZE)
    scales = quantized.scales.reshape(-1, 1)
    numbers = formats["float4_e2m1fn"].values[:8].astype(np.float32)
    ties = np.abs(blocks)[..., None] == ((numbers[:-1] + numbers[1:]) / 2) * scales[..., None]
    magnitude = (quantized.codes.reshape(-1, _SIZE) & 7).astype(np.uint8)
    lower = np.where(ties.any(-1), ties.argmax(-1), magnitude).astype(np.uint8)
    # A negative number that becomes zero has the code of 0.0 there.
    sign = np.where((blocks < 0) & (lower > 0), np.uint8(8), np.uint8(0))
    _, stored = to_blocks(
        QuantizedTensor((lower | sign).reshape(x.shape), quantized.scales, None, quantized.spec)
    )
    return stored


def _reciprocal(scale: Array) -> Array:
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale != 0)
    return inverse


def _halves(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(numbers, "<f2").view(np.uint8).reshape(len(numbers), -1)


def _nibbles(codes: Array, least: int) -> Array:
    plain = (codes.astype(np.int16) - least).astype(np.uint8)
    return plain[:, : _SIZE // 2] | (plain[:, _SIZE // 2 :] << 4)
