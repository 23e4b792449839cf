"""Quantized tensors as named arrays, and back: the layouts that files store.

Names and packing follow compressed-tensors' ``pack-quantized`` format: ``weight_packed`` (int32
words of offset-binary codes), ``weight_scale``, ``weight_shape``; zero points, where there are any,
stay one signed byte each in ``weight_zero_point``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import CheckpointError
from corequant.packing import pack, packed_words, unpack
from corequant.quantization import QuantizedTensor
from corequant.specs import QuantSpec, qparams_shape

__all__ = ["from_arrays", "to_arrays"]

Arrays = dict[str, npt.NDArray[Any]]


def to_arrays(name: str, quantized: QuantizedTensor) -> Arrays:
    """Return the arrays that store a quantized weight.

    Parameters
    ----------
    name : str
        Path of the module that the weight belongs to.
    quantized : QuantizedTensor
        Of a matrix (out_features, in_features), NumPy arrays.

    Returns
    -------
    dict of str to numpy.ndarray
        C-contiguous arrays under ``{name}.weight_packed`` and so on.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.export import to_arrays
    >>> q = cq.quantize(np.ones((2, 8), np.float32), "int4:channel:symmetric")
    >>> {k: v.shape for k, v in to_arrays("head", q).items()}
    {'head.weight_packed': (2, 1), 'head.weight_scale': (2, 1), 'head.weight_shape': (2,)}
    """
    arrays = {
        f"{name}.weight_packed": pack(quantized.codes, quantized.spec.format.bits),
        f"{name}.weight_scale": np.ascontiguousarray(quantized.scales),
        f"{name}.weight_shape": np.array(quantized.shape, np.int64),
    }
    if quantized.zero_points is not None:
        arrays[f"{name}.weight_zero_point"] = np.ascontiguousarray(quantized.zero_points)
    return arrays


def from_arrays(
    name: str, arrays: Mapping[str, npt.NDArray[Any]], spec: QuantSpec, shape: tuple[int, int]
) -> QuantizedTensor:
    """Return the quantized weight that ``to_arrays`` stored, checked against what is expected.

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
    parts = qparams_shape(shape, spec)
    words = (shape[0], packed_words(shape[1], spec.format.bits))
    packed = _take(arrays, f"{name}.weight_packed", words, np.int32)
    scales = _take(arrays, f"{name}.weight_scale", parts, np.float32)
    stored = _take(arrays, f"{name}.weight_shape", (2,), np.int64)
    if tuple(stored) != shape:
        raise CheckpointError(f"{name}.weight_shape must be {shape}, got {tuple(stored.tolist())}")
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise CheckpointError(f"{name}.weight_scale must hold positive finite scales")
    zeros = None
    if not spec.symmetric:
        zeros = _take(arrays, f"{name}.weight_zero_point", parts, np.int8)
    return QuantizedTensor(unpack(packed, spec.format.bits, shape[1]), scales, zeros, spec)


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
