"""Round arrays to the grid of a ``QuantSpec``, and back.

Shapes of scales and zero points, for ``x`` (..., d): one for each row, (..., 1), when the
granularity is channel or token; (..., d/g) for groups of g; (1, ..., 1) for the whole tensor.
A number is ``(code - zero_point) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from corequant._dispatch import backend_for
from corequant._numpy import qparams_shape
from corequant._validation import check_array, check_divides
from corequant.errors import NonFiniteError, ShapeError
from corequant.protocols import Backend
from corequant.specs import QuantSpec

__all__ = ["QuantizedTensor", "choose_qparams", "dequantize", "fake_quantize", "quantize"]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes with all that is needed to read them.

    Attributes
    ----------
    codes : array (..., d), int8
        Signed codes, one a byte (``corequant.pack`` packs them).
    scales : array
        Float32, or float64 for float64 input; shaped as the module says.
    zero_points : array or None
        Int8, shaped as the scales; None when symmetric.
    spec : QuantSpec
        The quantizer.
    """

    codes: Any
    scales: Any
    zero_points: Any
    spec: QuantSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return tuple(self.codes.shape)


def choose_qparams(x: Any, spec: QuantSpec | str) -> tuple[Any, Any]:
    """Choose scales and zero points for ``x``.

    Parameters
    ----------
    x : array (..., d)
        NumPy array or torch tensor, floating and finite.
    spec : QuantSpec or str
        The quantizer, such as ``"int4:channel:symmetric"``.

    Returns
    -------
    scales, zero_points : arrays
        Float32 (float64 for float64 input) and int8; zero points are None when symmetric. A range
        always includes zero. A group of zeros gets scale 1, so that it decodes to exact zeros.

    Raises
    ------
    NonFiniteError
        If ``x`` holds NaN or infinity.
    BlockSizeError, ShapeError, SpecError, TypeError
        If the group size doesn't divide d, or for a wrong shape, spec or dtype.

    Notes
    -----
    ``absmax``: ``scale = max|x| / ((2**bits - 1)/2)`` symmetric, ``(max - min)/(2**bits - 1)``
    asymmetric, so no entry is further than half a step from the grid. ``mse``: of 100 fractions of
    that range from 0.2 to 1, the one with the least squared error.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> scales, zero_points = cq.choose_qparams(np.array([[-1.0, 0, 2]]), "int4:token:asymmetric")
    >>> scales, zero_points
    (array([[0.2]]), array([[-3]], dtype=int8))
    """
    backend, spec = _prepare(x, spec)
    scales, zero_points = backend.choose_qparams(x, spec)
    return scales, zero_points


def quantize(
    x: Any, spec: QuantSpec | str, scales: Any = None, zero_points: Any = None
) -> QuantizedTensor:
    """Round ``x`` to codes, with the given scales and zero points or those chosen for it.

    Parameters
    ----------
    x : array (..., d)
        Floating and finite.
    spec : QuantSpec or str
        The quantizer.
    scales, zero_points : arrays, optional
        As ``choose_qparams`` returns them. Zero points go with scales, and with asymmetric specs.

    Returns
    -------
    QuantizedTensor
        Codes ``clip(round(x / scale) + zero_point)``, rounding half to even.

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
    backend, spec = _prepare(x, spec)
    if scales is None:
        if zero_points is not None:
            raise ValueError("zero_points must come with scales, got zero_points alone")
        scales, zero_points = backend.choose_qparams(x, spec)
    else:
        backend_for(x=x, scales=scales, zero_points=zero_points)
        _check_qparams(tuple(x.shape), spec, scales, zero_points)
    return QuantizedTensor(
        backend.quantize(x, spec, scales, zero_points), scales, zero_points, spec
    )


def dequantize(quantized: QuantizedTensor) -> Any:
    """Return the numbers that the codes stand for.

    Parameters
    ----------
    quantized : QuantizedTensor

    Returns
    -------
    array (..., d)
        ``(codes - zero_points) * scales`` in the dtype of the scales.

    Raises
    ------
    TypeError
        If ``quantized`` is not a QuantizedTensor.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.dequantize(cq.quantize(np.array([[-7.5, 0, 2.4]]), "int4:channel:symmetric"))
    array([[-8.,  0.,  2.]])
    """
    if not isinstance(quantized, QuantizedTensor):
        raise TypeError(f"quantized must be a QuantizedTensor, got {type(quantized).__name__}")
    backend = backend_for(codes=quantized.codes)
    return backend.dequantize(
        quantized.codes, quantized.spec, quantized.scales, quantized.zero_points
    )


def fake_quantize(x: Any, spec: QuantSpec | str) -> Any:
    """Round ``x`` to its grid but keep its dtype: dequantize(quantize(x)) in one call.

    Parameters
    ----------
    x : array (..., d)
        Floating and finite.
    spec : QuantSpec or str
        The quantizer.

    Returns
    -------
    array (..., d)
        Of the type, dtype and device of ``x``.

    Raises
    ------
    NonFiniteError, BlockSizeError, ShapeError, SpecError, TypeError
        As for ``choose_qparams``.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.fake_quantize(np.array([[-7.5, 0, 2.4]], np.float32), "int4:token:symmetric")
    array([[-8.,  0.,  2.]], dtype=float32)
    """
    backend, spec = _prepare(x, spec)
    return backend.fake_quantize(x, spec)


def as_spec(spec: Any) -> QuantSpec:
    """Return a spec, parsed if it is a string."""
    if isinstance(spec, str):
        return QuantSpec.parse(spec)
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec or its string form, got {type(spec).__name__}")
    return spec


def _prepare(x: Any, spec: QuantSpec | str) -> tuple[Backend, QuantSpec]:
    spec = as_spec(spec)
    backend = backend_for(x=x)
    check_array("x", x)
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, int(x.shape[-1]))
    bad = backend.first_nonfinite(x)
    if bad is not None:
        raise NonFiniteError("x", *bad)
    return backend, spec


def _check_qparams(shape: tuple[int, ...], spec: QuantSpec, scales: Any, zeros: Any) -> None:
    wanted = qparams_shape(shape, spec)
    for name, value in (("scales", scales), ("zero_points", zeros)):
        if value is not None and tuple(value.shape) != wanted:
            raise ShapeError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if spec.symmetric != (zeros is None):
        given = "none" if zeros is None else "some"
        raise ValueError(f"zero_points must be given exactly for asymmetric specs, got {given}")
    check_array("scales", scales)
    if not bool((scales > 0).all()) or not np.isfinite(float(scales.max() if wanted else scales)):
        raise ValueError(f"scales must be positive and finite, got {float(scales.min())}")
