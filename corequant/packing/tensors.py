"""Tensors that stay packed: rounded straight into bytes, and read straight out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import backend_for
from corequant._validation import (
    check_array,
    check_divides,
    check_index,
    check_numpy,
    check_writeable,
)
from corequant.errors import ShapeError
from corequant.formats import find_format
from corequant.packing.codes import packed_bytes, packed_words
from corequant.quantization import (
    QuantizedTensor,
    as_spec,
    check_fit,
    check_global,
    choose_global_scale,
)
from corequant.specs import Granularity, QuantSpec, ScaleFormat
from corequant.storage.scales import SCALE_BYTES, load_scales, numbers_of, store_scales

__all__ = [
    "PackedTensor",
    "dequantize_packed",
    "pack_quantized",
    "quantize_packed",
    "unpack_quantized",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A quantized tensor as its bytes.

    Attributes
    ----------
    packed : numpy.ndarray (..., bytes), uint8
        The stream of each row as ``corequant.packing`` describes: signed integers offset binary and
        padded to 32-bit words, other codes as they are, padded to bytes.
    scales : numpy.ndarray
        In their format: uint8 for E8M0 and E4M3, float16, or float32 (bfloat16 scales too).
    zero_points : numpy.ndarray or None
    spec : QuantSpec
    d : int
        Length of the last axis before packing.
    global_scale : numpy.ndarray (1,) or None
    """

    packed: Array
    scales: Array
    zero_points: Array | None
    spec: QuantSpec
    d: int
    global_scale: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return (*self.packed.shape[:-1], self.d)

    @property
    def nbytes(self) -> int:
        """Bytes of all the arrays."""
        arrays = (self.packed, self.scales, self.zero_points, self.global_scale)
        return sum(a.nbytes for a in arrays if a is not None)


def quantize_packed(
    x: Any, spec: QuantSpec | str, *, global_scale: Any = None, out: Any = None
) -> PackedTensor:
    """Round ``x`` straight to packed codes: ``pack_quantized(quantize(x, spec))`` in one pass.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
        Floating and finite.
    spec : QuantSpec or str
        The quantizer, such as ``"mxfp4"``.
    global_scale : numpy.ndarray (1,), optional
        As for ``quantize``.
    out : numpy.ndarray (..., bytes), uint8, optional
        Destination of the packed codes; C-contiguous, without overlap with ``x``.

    Returns
    -------
    PackedTensor

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError, ValueError
        As for ``quantize``, and for another ``out``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.zeros((1, 32), np.float32)
    >>> x[0, :4] = 6, -3, 1.4, 0.3
    >>> p = cq.quantize_packed(x, "mxfp4")
    >>> p.packed[0, :2].tobytes().hex(" "), p.scales
    ('d7 13', array([[127]], dtype=uint8))
    """
    from corequant._cpu.quantization import quantize_packed as quantize_array

    spec = as_spec(spec)
    check_numpy("x", x)
    check_array("x", x)
    d = x.shape[-1]
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, d)
    shape = (*x.shape[:-1], _row_bytes(d, spec))
    if out is None:
        out = np.empty(shape, np.uint8)
    else:
        _check_packed_out(out, shape, ("uint8",), x)
    if global_scale is not None:
        check_numpy("global_scale", global_scale)
        global_scale = check_global(spec, global_scale)
    if spec.granularity is Granularity.TENSOR_GROUP and global_scale is None:
        global_scale = choose_global_scale(x, spec)
    rows_out = out.reshape(math.prod(shape[:-1]), shape[-1])
    # Rows are padded to whole words, and the kernels write what holds codes.
    rows_out[:, packed_bytes(d, spec.format.bits) :] = 0
    scales, zeros = quantize_array(x, spec, global_scale, rows_out)
    if spec.scale_format is ScaleFormat.E4M3:
        # Chosen as numbers of their format: nothing to verify.
        form = find_format(SCALE_BYTES[spec.scale_format])
        stored: Array = backend_for(scales=scales).encode(scales, form)
    else:
        stored = store_scales(scales, spec)
    return PackedTensor(out, stored, zeros, spec, d, global_scale)


def dequantize_packed(packed: PackedTensor, *, out: Any = None) -> Array:
    """Return the numbers of a packed tensor, without the codes in between.

    Parameters
    ----------
    packed : PackedTensor
    out : numpy.ndarray (..., d), float32 or float64, optional
        Destination; C-contiguous, without overlap with ``packed``. A new float32 array by default.

    Returns
    -------
    numpy.ndarray (..., d)

    Raises
    ------
    ShapeError, TypeError, ValueError
        If ``packed`` isn't a PackedTensor, its arrays don't fit each other, or ``out`` doesn't.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> p = cq.quantize_packed(np.full((1, 32), 1.5, np.float32), "mxfp4")
    >>> float(cq.dequantize_packed(p)[0, 0])
    1.5
    """
    from corequant._cpu.grids import fits_nibbles, grid_for, rounder_for
    from corequant._cpu.loops import group_passes
    from corequant._cpu.quantization import each_panel, flat_qparams
    from corequant._cpu.scales import effective

    scales, zero_points = _check_packed(packed)
    spec, d = packed.spec, packed.d
    if out is None:
        out = np.empty(packed.shape, np.float32)
    else:
        _check_packed_out(out, packed.shape, ("float32", "float64"), packed.packed)
    if not out.size:
        return out  # type: ignore[no-any-return]
    size = spec.group_size or d
    target = out.reshape(-1, d)
    width = packed.packed.shape[-1]
    if spec.scale_format in SCALE_BYTES and fits_nibbles(spec.format, out.dtype, size, d):
        # Scales are read where they are used: as numbers they would pass through memory twice.
        rounder = rounder_for(spec.format, out.dtype)
        table = effective(numbers_of(spec.scale_format), packed.global_scale)
        stored = np.ascontiguousarray(scales).reshape(-1)

        def straight(panel: Array, rows: slice, groups: slice) -> None:
            own = stored[groups]
            group_passes.decode_nibbles(panel, size, own, table, rounder, target[rows])

        whole = np.dtype(np.uint8)
        each_panel(packed.packed, width, whole, straight, d // size, d, whole=True)
        return out  # type: ignore[no-any-return]
    loaded = load_scales(scales, spec)
    flat, zeros = flat_qparams(loaded, zero_points, out.dtype, target.size // size)
    steps, grid = effective(flat, packed.global_scale), grid_for(spec.format, out.dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        grid.decode_packed(panel, size, steps[groups], zeros[groups], target[rows])

    each_panel(packed.packed, width, np.dtype(np.uint8), work, d // size, d, whole=True)
    return out  # type: ignore[no-any-return]


def pack_quantized(quantized: QuantizedTensor) -> PackedTensor:
    """Return a quantized tensor (of NumPy arrays) packed.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.pack_quantized(cq.quantize(np.ones((2, 32), np.float32), "mxfp4")).nbytes
    34
    """
    from corequant.packing.codes import pack, pack_bytes

    if not isinstance(quantized, QuantizedTensor):
        raise TypeError(f"quantized must be a QuantizedTensor, got {type(quantized).__name__}")
    spec, codes = quantized.spec, quantized.codes
    scales, zero_points = check_fit(quantized.shape, quantized)
    if spec.format.least_code:
        packed = pack(codes, spec.format.bits).astype("<i4", copy=False).view(np.uint8)
    else:
        packed = pack_bytes(codes, spec.format.bits)
    stored = store_scales(scales, spec)
    return PackedTensor(packed, stored, zero_points, spec, codes.shape[-1], quantized.global_scale)


def unpack_quantized(packed: PackedTensor) -> QuantizedTensor:
    """Return what ``pack_quantized`` packed; scales as float32.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> p = cq.pack_quantized(cq.quantize(np.ones((2, 32), np.float32), "mxfp4"))
    >>> cq.unpack_quantized(p).codes[0, :3]
    array([6, 6, 6], dtype=uint8)
    """
    from corequant.packing.codes import unpack, unpack_bytes

    scales, zero_points = _check_packed(packed)
    spec = packed.spec
    if spec.format.least_code:
        words = np.ascontiguousarray(packed.packed).view("<i4").astype(np.int32, copy=False)
        codes: Array = unpack(words, spec.format.bits, packed.d)
    else:
        codes = unpack_bytes(packed.packed, spec.format.bits, packed.d)
    loaded = load_scales(scales, spec)
    return QuantizedTensor(codes, loaded, zero_points, spec, packed.global_scale)


def _check_packed(packed: Any) -> tuple[Array, Array | None]:
    """Return scales and zero points in full; raise unless all arrays fit each other.

    They may come from a file.
    """
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"packed must be a PackedTensor, got {type(packed).__name__}")
    check_index("d", packed.d, 0)
    data = check_numpy("packed", packed.packed)
    width = _row_bytes(packed.d, packed.spec)
    if data.dtype != np.uint8:
        raise TypeError(f"packed must have dtype uint8, got {data.dtype}")
    if data.ndim == 0 or data.shape[-1] != width:
        raise ShapeError(
            f"packed must have {width} bytes per row for d={packed.d}, got shape {data.shape}"
        )
    scales = check_numpy("scales", packed.scales)
    stored = "u" if packed.spec.scale_format in SCALE_BYTES else "f"
    if scales.dtype.kind != stored or (stored == "u" and scales.dtype != np.uint8):
        wanted = "uint8" if stored == "u" else "a floating dtype"
        raise TypeError(f"scales of {packed.spec} must have {wanted}, got {scales.dtype}")
    return check_fit(packed.shape, packed)


def _check_packed_out(
    out: Any, shape: tuple[int, ...], dtypes: tuple[str, ...], source: Array
) -> None:
    """Raise unless a result of another shape and dtype than its source can go to ``out``."""
    check_numpy("out", out)
    if out.shape != shape or str(out.dtype) not in dtypes or not out.flags.c_contiguous:
        raise ShapeError(
            f"out must be {' or '.join(dtypes)}, C-contiguous and of shape {shape}, "
            f"got {out.dtype} {out.shape}"
        )
    check_writeable(out)
    if np.shares_memory(out, source):
        raise ValueError("out must share no memory with its source, got an overlap")


def _row_bytes(d: int, spec: QuantSpec) -> int:
    if spec.format.least_code:
        return packed_words(d, spec.format.bits) * 4
    return packed_bytes(d, spec.format.bits)
