"""Round arrays to the grid of a ``QuantSpec``, and back.

Shapes of scales and zero points, for ``x`` (..., d): one for each row, (..., 1), when the
granularity is channel or token; (..., d/g) for groups of g; (1, ..., 1) for the whole tensor.
A number is ``(code - zero_point) * scale`` for integers, ``value(code) * scale`` for other formats;
with a global scale G the scale that multiplies is ``scale / G``.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from corequant._dispatch import backend_for, check_out
from corequant._validation import (
    check_array,
    check_divides,
    check_positive,
    check_range,
    is_on_host,
)
from corequant.errors import NonFiniteError, ShapeError, SpecError
from corequant.protocols import Backend
from corequant.specs import Granularity, QuantSpec, qparams_shape
from corequant.storage.scales import SCALE_BYTES, store_scales

__all__ = [
    "QuantizedTensor",
    "check_fit",
    "check_global",
    "check_qparams",
    "choose_global_scale",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "quantize",
]

_POLICIES = ("raise", "propagate")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes with all that is needed to read them.

    Attributes
    ----------
    codes : array (..., d), int8 or uint8
        One a byte (``corequant.pack`` packs them): int8 for signed integers, otherwise the code's
        bits in uint8.
    scales : array
        Float32, or float64 for float64 input; shaped as the module says. Each is a number of the
        spec's scale format.
    zero_points : array or None
        Offsets in the codes' dtype, shaped as the scales; None when symmetric.
    spec : QuantSpec
        The quantizer.
    global_scale : array (1,) or None
        Float32 divisor of all scales; only with granularity ``tensor_group``.
    """

    codes: Any
    scales: Any
    zero_points: Any
    spec: QuantSpec
    global_scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return tuple(self.codes.shape)


def choose_global_scale(x: Any, spec: QuantSpec | str) -> Any:
    """Choose the scale that a whole tensor shares, for specs such as ``"nvfp4"``.

    Parameters
    ----------
    x : array (..., d)
        Floating and finite.
    spec : QuantSpec or str
        Quantizer of granularity ``tensor_group``.

    Returns
    -------
    array (1,), float32
        G with ``w = element * (scale / G)``: ``448 * 6 / max|x|`` for NVFP4, so that the largest
        scale is the largest number of E4M3; with ``four_over_six`` 256 in place of 448. Tensors
        that a kernel will fuse (q, k and v) need one G in common: the smallest of theirs.

    Raises
    ------
    NonFiniteError, ShapeError, SpecError, TypeError
        As for ``choose_qparams``; SpecError too for a spec without global scale.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.choose_global_scale(np.full((1, 16), 6.0, np.float32), "nvfp4")
    array([448.], dtype=float32)
    """
    backend, spec = _prepare(x, spec)
    if spec.granularity is not Granularity.TENSOR_GROUP:
        raise SpecError(f"a global scale requires granularity 'tensor_group', got {spec}")
    return backend.choose_global_scale(x, spec)


def choose_qparams(x: Any, spec: QuantSpec | str, *, global_scale: Any = None) -> tuple[Any, Any]:
    """Choose scales and zero points for ``x``.

    Parameters
    ----------
    x : array (..., d)
        NumPy array or torch tensor, floating and finite.
    spec : QuantSpec or str
        The quantizer, such as ``"int4:channel:symmetric"``.
    global_scale : array (1,), optional
        Tensor-wide scale of ``tensor_group`` specs; ``choose_global_scale(x, spec)`` by default.

    Returns
    -------
    scales, zero_points : arrays
        Float32 (float64 for float64 input) and int8 or uint8; zero points are None when symmetric.
        A range always includes zero. A group of zeros gets scale 1, the smallest E8M0 scale
        2**-127, and decodes to exact zeros.

    Raises
    ------
    NonFiniteError
        If ``x`` holds NaN or infinity.
    BlockSizeError, ShapeError, SpecError, TypeError
        If the group size doesn't divide d, or for a wrong shape, spec or dtype.

    Notes
    -----
    ``absmax``: integers ``scale = max|x| / ((2**bits - 1)/2)`` symmetric,
    ``(max - min)/(2**bits - 1)`` asymmetric, so no entry is further than half a step from the
    grid; other formats ``max|x| / maximum``. ``percentile``: the same with a percentile in place of
    the maximum. ``mse``: of 100 fractions of that range from 0.2 to 1, the one with the least
    squared error; for power-of-two scales the best of the exponents E - 1, E and E + 1 around OCP's
    rule, for E4M3 of all within an octave. ``exact``: the least squared error of all scales.
    ``hqo``: half-quadratic optimisation of ``Σ|x - x̂|**0.7``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> scales, zero_points = cq.choose_qparams(np.array([[-1.0, 0, 2]]), "int4:token:asymmetric")
    >>> scales, zero_points
    (array([[0.2]]), array([[-3]], dtype=int8))
    """
    backend, spec = _prepare(x, spec, global_scale)
    return backend.choose_qparams(x, spec, check_global(spec, global_scale))


def quantize(
    x: Any,
    spec: QuantSpec | str,
    scales: Any = None,
    zero_points: Any = None,
    *,
    global_scale: Any = None,
) -> QuantizedTensor:
    """Round ``x`` to codes, with the given scales and zero points or those chosen for it.

    Parameters
    ----------
    x : array (..., d)
        Floating and finite.
    spec : QuantSpec or str
        The quantizer.
    scales, zero_points : arrays, optional
        As ``choose_qparams`` returns them. A number without axes, shape (), for all of them, and
        shapes that lack leading axes of length 1 will do too. Zero points go with scales, and with
        asymmetric specs; any integers that are codes will do.
    global_scale : array (1,), optional
        Tensor-wide scale of ``tensor_group`` specs; required with scales, optional without.

    Returns
    -------
    QuantizedTensor
        Integer codes ``clip(round(x / scale) + zero_point)``, others the code of the number nearest
        to ``x / scale``; ties to even, the ends saturate.

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError, ValueError
        As for ``choose_qparams``, and for parameters of another shape, or scales not positive.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> q = cq.quantize(np.array([[-7.5, 0, 2.4]]), "int4:channel:symmetric")
    >>> q.codes, q.scales
    (array([[-8,  0,  2]], dtype=int8), array([[1.]]))
    """
    backend, spec = _prepare(x, spec, global_scale)
    if scales is None:
        if zero_points is not None:
            raise ValueError("zero_points must come with scales, got zero_points alone")
    else:
        backend_for(x=x, scales=scales, zero_points=zero_points, global_scale=global_scale)
        check_array("scales", scales[None])
        scales = _as_real(scales, str(x.dtype).endswith(("float64", "f8")))
        scales, zero_points = check_qparams(tuple(x.shape), spec, scales, zero_points)
    global_scale = check_global(spec, global_scale)
    if spec.granularity is Granularity.TENSOR_GROUP and global_scale is None:
        if scales is not None:
            raise ValueError("global_scale must come with scales, got scales alone")
        global_scale = backend.choose_global_scale(x, spec)
    codes, scales, zero_points = backend.quantize(x, spec, scales, zero_points, global_scale)
    return QuantizedTensor(codes, scales, zero_points, spec, global_scale)


def dequantize(quantized: QuantizedTensor) -> Any:
    """Return the numbers that the codes stand for.

    Parameters
    ----------
    quantized : QuantizedTensor

    Returns
    -------
    array (..., d)
        In the dtype of the scales.

    Raises
    ------
    ShapeError, TypeError, ValueError
        If ``quantized`` is not a QuantizedTensor, or its arrays don't fit each other and its spec.
        Values on another device than the CPU are not checked, which would wait for that device.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.dequantize(cq.quantize(np.array([[-7.5, 0, 2.4]]), "int4:channel:symmetric"))
    array([[-8.,  0.,  2.]])
    """
    if not isinstance(quantized, QuantizedTensor):
        raise TypeError(f"quantized must be a QuantizedTensor, got {type(quantized).__name__}")
    backend = backend_for(codes=quantized.codes, scales=quantized.scales)
    host = is_on_host(quantized.codes)
    codes = _checked_codes(quantized, host)
    scales, zero_points = check_fit(tuple(codes.shape), quantized)
    check_array("scales", scales)
    scales, divisor = _as_real(scales, wide=True), quantized.global_scale
    if divisor is not None and not tuple(divisor.shape):
        divisor = divisor.reshape((1,))
    if host:
        check_positive("scales", scales)
        if hasattr(divisor, "max"):
            check_global(quantized.spec, divisor)
    return backend.dequantize(codes, quantized.spec, scales, zero_points, divisor)


def fake_quantize(
    x: Any,
    spec: QuantSpec | str,
    *,
    global_scale: Any = None,
    out: Any = None,
    nonfinite: str = "raise",
) -> Any:
    """Round ``x`` to its grid but keep its dtype: dequantize(quantize(x)) in one pass.

    Parameters
    ----------
    x : array (..., d)
        Floating and finite.
    spec : QuantSpec or str
        The quantizer.
    global_scale : array (1,), optional
        Tensor-wide scale of ``tensor_group`` specs; ``choose_global_scale(x, spec)`` by default.
    out : array, optional
        Destination, of the shape and dtype of ``x``; either ``x`` itself or without overlap.
    nonfinite : str
        ``"raise"`` refuses NaN and infinity; ``"propagate"`` leaves these entries as they are,
        and chooses the scales from the others.

    Returns
    -------
    array (..., d)
        Rounded array of the type, dtype and device of ``x``. What a float16 or bfloat16 can't hold
        becomes its largest number. A tensor's gradient passes straight through the rounding.

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError, ValueError
        As for ``choose_qparams``, and for another ``out`` or policy.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.fake_quantize(np.array([[-7.5, 0, 2.4]], np.float32), "int4:token:symmetric")
    array([[-8.,  0.,  2.]], dtype=float32)
    """
    backend, spec = _prepare(x, spec, global_scale)
    global_scale = check_global(spec, global_scale)
    if nonfinite not in _POLICIES:
        raise ValueError(f"nonfinite must be one of {', '.join(_POLICIES)}, got {nonfinite!r}")
    check_out(x, out)
    if nonfinite == "raise" and isinstance(out, np.ndarray) and np.may_share_memory(x, out):
        # Checked first: an error halfway would leave a partly overwritten x.
        bad = backend.first_nonfinite(x)
        if bad is not None:
            raise NonFiniteError("x", *bad)
    return backend.fake_quantize(x, spec, global_scale, out=out, propagate=nonfinite == "propagate")


def _checked_codes(quantized: QuantizedTensor, host: bool) -> Any:
    """Return the codes in the dtype of their format; raise unless those on the host are codes."""
    codes, form = quantized.codes, quantized.spec.format
    kind, wanted = str(codes.dtype).rpartition(".")[2], str(form.code_dtype)
    if kind.lstrip("u").rstrip("0123456789") != "int":
        raise TypeError(f"codes of {quantized.spec} must have dtype {wanted}, got {codes.dtype}")
    least, most = form.least_code, form.most_code
    if host and (kind != wanted or most - least < 255):
        check_range("codes", codes, least, most)
    if kind == wanted:
        return codes
    if isinstance(codes, np.ndarray):
        return codes.astype(form.code_dtype)
    return codes.to(getattr(sys.modules["torch"], wanted))


def _as_real(scales: Any, wide: bool) -> Any:
    """Return scales in float32, or as they are where they are float64 for float64 numbers."""
    name = str(scales.dtype).rpartition(".")[2]
    if name == "float32" or (wide and name == "float64"):
        return scales
    if isinstance(scales, np.ndarray | np.generic):
        # What leaves float32 is refused afterwards, as 0 or infinity.
        with np.errstate(over="ignore", under="ignore"):
            return scales.astype(np.float32)
    return scales.float() if hasattr(scales, "float") else scales


def as_spec(spec: Any) -> QuantSpec:
    """Return a spec, parsed if it is a string."""
    if isinstance(spec, str):
        return QuantSpec.parse(spec)
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec or its string form, got {type(spec).__name__}")
    return spec


def _prepare(x: Any, spec: QuantSpec | str, global_scale: Any = None) -> tuple[Backend, QuantSpec]:
    spec = as_spec(spec)
    backend = backend_for(x=x, global_scale=global_scale)
    check_array("x", x)
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, int(x.shape[-1]))
    return backend, spec


def check_fit(shape: tuple[int, ...], quantized: Any) -> tuple[Any, Any]:
    """Return a quantized or packed tensor's scales and zero points in full.

    Raises unless its arrays are what its spec asks for a shape. What they hold is not looked at.
    """
    spec = quantized.spec
    if quantized.scales is None:
        raise TypeError("scales must be an array, got None")
    scales, zeros = _full(shape, spec, quantized.scales, quantized.zero_points)
    shared = quantized.global_scale
    if (spec.granularity is Granularity.TENSOR_GROUP) != (shared is not None):
        raise ValueError(
            f"global_scale must be given if and only if granularity is 'tensor_group', got {spec}"
        )
    if shared is not None and tuple(shared.shape) not in ((), (1,)):
        raise ShapeError(f"global_scale must have shape (1,), got {tuple(shared.shape)}")
    return scales, zeros


def _full(shape: tuple[int, ...], spec: QuantSpec, scales: Any, zeros: Any) -> tuple[Any, Any]:
    """Return scales and zero points in the shape that a spec asks for, or raise.

    Only what can't be meant in two ways is brought into shape: a number without axes stands for
    all, and leading axes of length 1 may be missing or too many.
    """
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, shape[-1])
    wanted = qparams_shape(shape, spec)
    found = []
    for name, value in (("scales", scales), ("zero_points", zeros)):
        if value is not None and tuple(value.shape) != wanted:
            value = _shaped(name, value, wanted)
        found.append(value)
    if spec.symmetric != (zeros is None):
        raise ValueError(
            f"zero_points must be given if and only if the spec is asymmetric, got {spec}"
        )
    if zeros is not None and "int" not in str(zeros.dtype):
        raise TypeError(f"zero_points must have an integer dtype, got {zeros.dtype}")
    return found[0], found[1]


def _shaped(name: str, value: Any, wanted: tuple[int, ...]) -> Any:
    given = tuple(value.shape)
    if not given:
        one = value.reshape((1,) * len(wanted))
        if isinstance(one, np.ndarray):
            return np.ascontiguousarray(np.broadcast_to(one, wanted))
        return one.expand(wanted).contiguous()
    if _trimmed(given) == _trimmed(wanted):
        return value.reshape(wanted)
    raise ShapeError(f"{name} must have shape {wanted}, got {given}")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading axes of length 1."""
    return tuple(itertools.dropwhile(lambda n: n == 1, shape))


def check_qparams(
    shape: tuple[int, ...], spec: QuantSpec, scales: Any, zeros: Any
) -> tuple[Any, Any]:
    """Return scales and zero points in full; raise unless they fit a spec and a shape."""
    scales, zeros = _full(shape, spec, scales, zeros)
    check_array("scales", scales)
    if 0 in qparams_shape(shape, spec):
        return scales, zeros
    check_positive("scales", scales)
    if spec.scale_format in SCALE_BYTES:
        store_scales(scales, spec)
    if zeros is not None:
        least, most = int(spec.format.minimum), int(spec.format.maximum)
        check_range("zero_points", zeros, least, most)
    return scales, zeros


def check_global(spec: QuantSpec, global_scale: Any) -> Any:
    """Return a global scale in full, or None; raise unless it is a number of use for the spec."""
    if global_scale is None:
        return None
    if spec.granularity is not Granularity.TENSOR_GROUP:
        raise ValueError(f"global_scale requires granularity 'tensor_group', got {spec}")
    shape = tuple(global_scale.shape)
    number = float(_as_real(global_scale, wide=False).max()) if shape in ((), (1,)) else 0.0
    if not 0 < number < float("inf"):
        raise ValueError(
            f"global_scale must be one positive finite number of shape (1,), got {global_scale}"
        )
    return global_scale if shape else global_scale.reshape((1,))
