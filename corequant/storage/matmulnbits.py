"""Weights as the initialisers of onnxruntime's operator MatMulNBits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import ShapeError, SpecError
from corequant.formats import FormatKind
from corequant.packing.codes import pack_bytes
from corequant.quantization import QuantizedTensor
from corequant.specs import Granularity

__all__ = ["matmul_nbits"]


def matmul_nbits(
    quantized: QuantizedTensor,
) -> tuple[dict[str, int], dict[str, npt.NDArray[Any]]]:
    """Return attributes and initialisers of a MatMulNBits node that multiplies by this weight.

    Parameters
    ----------
    quantized : QuantizedTensor
        Matrix (out_features N, in_features K), NumPy arrays, int2, int4 or int8 (or uint) in
        groups of 16, 32, 64, ... entries.

    Returns
    -------
    attributes : dict of str to int
        K, N, bits and block_size.
    initializers : dict of str to numpy.ndarray
        ``B`` (N, K/block_size, block_size·bits/8) uint8, the low bits of a byte first, codes
        offset binary; ``scales`` (N·K/block_size) float32; ``zero_points``
        (N·ceil(K/block_size·bits/8)) uint8, only where there are any: without them the operator
        takes ``2**(bits-1)``.

    Raises
    ------
    ShapeError, SpecError
        If the weight is not a matrix, or the operator can't read the spec.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.storage.matmulnbits import matmul_nbits
    >>> q = cq.quantize(np.ones((2, 64), np.float32), "int4:group32")
    >>> attributes, initializers = matmul_nbits(q)
    >>> attributes
    {'K': 64, 'N': 2, 'bits': 4, 'block_size': 32}
    >>> {k: v.shape for k, v in initializers.items()}
    {'B': (2, 2, 16), 'scales': (4,)}
    """
    spec = quantized.spec
    form, size = spec.format, spec.group_size
    if (
        form.kind is not FormatKind.INTEGER
        or form.fraction_bits
        or form.bits not in (2, 4, 8)
        or spec.granularity is not Granularity.GROUP
        or size is None
        or size < 16
        or size & (size - 1)
        or (spec.symmetric and not form.signed)
    ):
        raise SpecError(
            "MatMulNBits reads 2, 4 or 8 bit integers in groups of a power of two of at least 16 "
            f"entries, got {spec}"
        )
    if quantized.codes.ndim != 2:
        raise ShapeError(f"a weight must be (out_features, in_features), got {quantized.shape}")
    n, k = quantized.shape
    packed = pack_bytes(_offset(quantized.codes, form.least_code), form.bits)
    initializers: dict[str, npt.NDArray[Any]] = {
        "B": packed.reshape(n, k // size, size * form.bits // 8),
        "scales": np.ascontiguousarray(quantized.scales, np.float32).reshape(-1),
    }
    if quantized.zero_points is not None:
        zeros = _offset(quantized.zero_points, form.least_code)
        initializers["zero_points"] = pack_bytes(zeros, form.bits).reshape(-1)
    return {"K": k, "N": n, "bits": form.bits, "block_size": size}, initializers


def _offset(codes: npt.NDArray[Any], least: int) -> npt.NDArray[np.uint8]:
    return (codes.astype(np.int16) - least).astype(np.uint8)
