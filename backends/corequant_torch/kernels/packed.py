"""Permutation, rotation and quantization to packed four-bit codes."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from corequant._validation import check_array, check_divides, check_permutation
from corequant.errors import ShapeError, SpecError
from corequant.formats import find_format
from corequant.fusion import rotate_quantize
from corequant.packing.tensors import PackedTensor
from corequant.quantization import as_spec
from corequant.rotation import check_block_size, check_signs
from corequant.specs import QuantSpec, ScaleFormat, qparams_shape
from corequant.storage.scales import SCALE_BYTES
from corequant_torch.device.tables import device_table
from corequant_torch.gpu.runtime import has_triton
from corequant_torch.kernels.engines import engine_for

__all__ = ["rotate_quantize_packed"]


def rotate_quantize_packed(
    x: torch.Tensor,
    block_size: int | None,
    spec: QuantSpec | str,
    *,
    permutation: npt.NDArray[Any] | None = None,
    signs: npt.NDArray[Any] | None = None,
) -> PackedTensor:
    """Permute, sign, rotate and quantize a tensor to packed codes, two a byte, low bits first.

    Parameters
    ----------
    x : torch.Tensor (..., d)
        Finite floating-point values; d a multiple of 8.
    block_size, permutation, signs
        As for ``corequant.rotate_quantize``.
    spec : QuantSpec or str
        A spec with a 4-bit format, such as ``"mxfp4"``, ``"nvfp4"`` or ``"int4:group32"``.

    Returns
    -------
    PackedTensor
        Tensors on the device of ``x``: bytes (..., d/2) in the order of ``pack_quantized``, and
        scales in their stored form. On CUDA one kernel permutes, rotates, rounds and packs; a
        global scale takes a second one, which finds the largest magnitude first.

    Raises
    ------
    NonFiniteError, BlockSizeError, HadamardOrderError, PermutationError, ShapeError, SpecError
        As ``corequant.rotate_quantize``; SpecError unless the format has 4 bits.

    Examples
    --------
    >>> import torch
    >>> from corequant_torch import rotate_quantize_packed
    >>> packed = rotate_quantize_packed(torch.ones(1, 32), 16, "mxfp4")
    >>> packed.packed.shape, packed.scales
    (torch.Size([1, 16]), tensor([[127]], dtype=torch.uint8))
    """
    spec = as_spec(spec)
    check_array("x", x)
    d = int(x.shape[-1])
    if spec.format.bits != 4:
        raise SpecError(f"spec must have a 4-bit format, got {spec}")
    if d % 8:
        raise ShapeError(f"x must have a last axis divisible by 8, got d={d}")
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, d)
    size = check_block_size("block_size", block_size, d)
    order = None if permutation is None else check_permutation("permutation", permutation, d)
    table = check_signs("signs", signs, d)
    if x.is_cuda and has_triton():
        from corequant_torch.gpu import fusion

        tables = device_table(order, x), device_table(table, x)
        found = fusion.fused(x.detach(), size, spec, *tables, fusion.PACKED)
        if found is not None:
            shape = qparams_shape(tuple(x.shape), spec)
            scales: Any = _stored(found.scales.reshape(shape), spec)
            zeros: Any = None if spec.symmetric else found.zeros.to(torch.int8).reshape(shape)
            written: Any = found.out
            divisor: Any = found.global_scale
            return PackedTensor(written, scales, zeros, spec, d, divisor)
    q = rotate_quantize(x.detach(), size, spec, permutation=order, signs=table)
    nibbles = (q.codes.int() - spec.format.least_code).to(torch.uint8)
    packed: Any = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    kept: Any = _stored(q.scales, spec)
    return PackedTensor(packed, kept, q.zero_points, spec, d, q.global_scale)


def _stored(scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    name = SCALE_BYTES.get(spec.scale_format)
    if name is not None:
        return engine_for(scales).encode(scales, find_format(name))
    half = spec.scale_format is ScaleFormat.FLOAT16
    return scales.half() if half else scales.float()
