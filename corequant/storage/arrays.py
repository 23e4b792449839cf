"""Quantized tensors as named arrays, and back: the layouts that files store.

Names, dtypes and packing are those of compressed-tensors. Signed integers: ``weight_packed`` (int32
words of offset-binary codes), ``weight_scale``, ``weight_shape`` and, where there are any,
``weight_zero_point``, packed alike but along the output axis. Other formats: ``weight_packed`` in
bytes; ``weight_scale``, as bytes for E8M0 and E4M3; and ``weight_global_scale``. Bytes are uint8
here: compressed-tensors wants E4M3 scales as float8_e4m3fn, and 8-bit floats as float8_e4m3fn under
the name ``weight``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import CheckpointError
from corequant.packing.codes import (
    pack,
    pack_bytes,
    packed_bytes,
    packed_words,
    unpack,
    unpack_bytes,
)
from corequant.quantization import QuantizedTensor
from corequant.specs import Granularity, QuantSpec, qparams_shape
from corequant.storage.scales import load_scales, store_scales
from corequant.storage.tensor_file import ITEM_BYTES

__all__ = ["Layout", "from_arrays", "layout_of", "stored_bytes", "to_arrays"]

Arrays = dict[str, npt.NDArray[Any]]

_TAGS = {"float32": "F32", "float16": "F16", "uint8": "U8"}

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensors' dtypes, as safetensors files name them, and shapes by their names."""


def to_arrays(name: str, quantized: QuantizedTensor) -> Arrays:
    """Return the arrays that store a quantized weight.

    Parameters
    ----------
    name : str
        Path of the module that the weight belongs to.
    quantized : QuantizedTensor
        Matrix (out_features, in_features), NumPy arrays.

    Returns
    -------
    dict of str to numpy.ndarray
        C-contiguous arrays under ``{name}.weight_packed`` and so on.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.storage.arrays import to_arrays
    >>> q = cq.quantize(np.ones((2, 8), np.float32), "int4:channel:symmetric")
    >>> {k: v.shape for k, v in to_arrays("head", q).items()}
    {'head.weight_packed': (2, 1), 'head.weight_scale': (2, 1), 'head.weight_shape': (2,)}
    """
    spec, codes = quantized.spec, quantized.codes
    bits = spec.format.bits
    arrays = {f"{name}.weight_scale": store_scales(quantized.scales, spec)}
    if spec.format.least_code:
        arrays[f"{name}.weight_packed"] = pack(codes, bits)
        arrays[f"{name}.weight_shape"] = np.array(quantized.shape, np.int64)
    else:
        arrays[f"{name}.weight_packed"] = pack_bytes(codes, bits)
    if quantized.zero_points is not None:
        arrays[f"{name}.weight_zero_point"] = _pack_zeros(quantized.zero_points, spec)
    if quantized.global_scale is not None:
        # A copy, since layers that share it would share memory, which files can't.
        arrays[f"{name}.weight_global_scale"] = np.array(quantized.global_scale)
    return dict(sorted(arrays.items()))


def layout_of(name: str, shape: tuple[int, int], spec: QuantSpec) -> Layout:
    """Return what ``to_arrays`` would return for a weight, without its numbers.

    Parameters
    ----------
    name : str
        Path of the module that the weight belongs to.
    shape : tuple of int
        (out_features, in_features).
    spec : QuantSpec

    Examples
    --------
    >>> from corequant.specs import QuantSpec
    >>> from corequant.storage.arrays import layout_of
    >>> layout_of("head", (2, 8), QuantSpec.parse("int4:channel"))["head.weight_packed"]
    ('I32', (2, 1))
    """
    rows, columns = shape
    parts, bits = qparams_shape(shape, spec), spec.format.bits
    found: Layout = {f"{name}.weight_scale": (_TAGS[spec.scale_format.dtype], parts)}
    if spec.format.least_code:
        found[f"{name}.weight_packed"] = ("I32", (rows, packed_words(columns, bits)))
        found[f"{name}.weight_shape"] = ("I64", (2,))
    else:
        found[f"{name}.weight_packed"] = ("U8", (rows, packed_bytes(columns, bits)))
    if not spec.symmetric:
        packed = ("I32", (packed_words(parts[0], bits), parts[1]))
        found[f"{name}.weight_zero_point"] = packed if spec.format.least_code else ("U8", parts)
    if spec.granularity is Granularity.TENSOR_GROUP:
        found[f"{name}.weight_global_scale"] = ("F32", (1,))
    return dict(sorted(found.items()))


def stored_bytes(shape: tuple[int, int], spec: QuantSpec) -> int:
    """Return the bytes of what ``to_arrays`` returns for a weight.

    Parameters
    ----------
    shape : tuple of int
        (out_features, in_features).
    spec : QuantSpec
        Scales of bfloat16 count as stored, two bytes each.

    Examples
    --------
    >>> from corequant.specs import QuantSpec
    >>> from corequant.storage.arrays import stored_bytes
    >>> stored_bytes((2, 8), QuantSpec.parse("int4:channel"))
    32
    """
    arrays = layout_of("", shape, spec)
    scales = math.prod(arrays.pop(".weight_scale")[1]) * spec.scale_format.bits // 8
    return scales + sum(math.prod(part) * ITEM_BYTES[tag] for tag, part in arrays.values())


def from_arrays(
    name: str, arrays: Mapping[str, npt.NDArray[Any]], spec: QuantSpec, shape: tuple[int, int]
) -> QuantizedTensor:
    """Return the quantized weight that ``to_arrays`` stored, checked against spec and shape.

    Parameters
    ----------
    name : str
        Path of the module.
    arrays : mapping of str to numpy.ndarray
    spec : QuantSpec
    shape : tuple of int
        (out_features, in_features).

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    CheckpointError
        If an array is missing or of another shape or dtype than expected, or scales are not
        positive and finite.
    """
    parts, bits = qparams_shape(shape, spec), spec.format.bits
    scales = load_scales(
        _take(arrays, f"{name}.weight_scale", parts, spec.scale_format.dtype), spec
    )
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise CheckpointError(f"{name}.weight_scale must hold positive finite scales")
    if spec.format.least_code:
        words = (shape[0], packed_words(shape[1], bits))
        packed = _take(arrays, f"{name}.weight_packed", words, np.int32)
        told = _take(arrays, f"{name}.weight_shape", (2,), np.int64)
        if tuple(told) != shape:
            got = tuple(told.tolist())
            raise CheckpointError(f"{name}.weight_shape must be {shape}, got {got}")
        codes: npt.NDArray[Any] = unpack(packed, bits, shape[1])
    else:
        wanted = (shape[0], packed_bytes(shape[1], bits))
        stream = _take(arrays, f"{name}.weight_packed", wanted, np.uint8)
        codes = unpack_bytes(stream, bits, shape[1])
        if codes.size and int(codes.max()) > spec.format.most_code:
            raise CheckpointError(f"{name} holds a code that {spec.format.name} lacks")
    zeros = None if spec.symmetric else _unpack_zeros(name, arrays, parts, spec)
    divisor = None
    if spec.granularity is Granularity.TENSOR_GROUP:
        divisor = _take(arrays, f"{name}.weight_global_scale", (1,), np.float32)
        if not 0 < float(divisor[0]) < np.inf:
            raise CheckpointError(f"{name}.weight_global_scale must be positive and finite")
    return QuantizedTensor(codes, scales, zeros, spec, divisor)


def _pack_zeros(zeros: npt.NDArray[Any], spec: QuantSpec) -> npt.NDArray[Any]:
    if not spec.format.least_code:
        return np.ascontiguousarray(zeros)
    return np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), spec.format.bits).T)


def _unpack_zeros(
    name: str, arrays: Mapping[str, npt.NDArray[Any]], parts: tuple[int, ...], spec: QuantSpec
) -> npt.NDArray[Any]:
    key, bits = f"{name}.weight_zero_point", spec.format.bits
    if not spec.format.least_code:
        return _take(arrays, key, parts, np.uint8)
    packed = _take(arrays, key, (packed_words(parts[0], bits), parts[1]), np.int32)
    return np.ascontiguousarray(unpack(np.ascontiguousarray(packed.T), bits, parts[0]).T)


def _take(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], dtype: Any
) -> npt.NDArray[Any]:
    if name not in arrays:
        raise CheckpointError(f"the tensor {name} is missing")
    array = arrays[name]
    if array.shape != shape or array.dtype != dtype:
        raise CheckpointError(
            f"the tensor {name} must be {np.dtype(dtype)} of shape {shape}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array
