"""Codes as integers: dot products of quantized numbers without any rounding.

Every number of a minifloat or integer format is a whole multiple of the format's smallest step, the
unit. With magnitudes of ``2**e + m - 1`` bits for a finite eXmY, dot products of codes are integer
dot products, and an accumulator that is wide enough makes them exact.

Source: the widths as in the exact (Kulisch) accumulator; minifloats as in "Shedding the Bits",
arXiv 2311.12359.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import ShapeError, SpecError
from corequant.formats import FormatKind, NumberFormat, find_format

__all__ = [
    "accumulator_bits",
    "exact_matmul",
    "integer_range",
    "integer_unit",
    "integer_values",
    "magnitude_bits",
]

Array = npt.NDArray[Any]


def integer_unit(form: NumberFormat | str) -> float:
    """Return the number of which every number of a format is a whole multiple.

    Parameters
    ----------
    form : NumberFormat or str
        An integer or minifloat format.

    Returns
    -------
    float
        A power of two: the smallest positive number of a minifloat.

    Raises
    ------
    SpecError
        For codebooks and powers of two, which have none that is useful.

    Examples
    --------
    >>> from corequant.exact import integer_unit
    >>> integer_unit("e2m1"), integer_unit("int4")
    (0.5, 1.0)
    """
    known = find_format(form) if isinstance(form, str) else form
    if not isinstance(known, NumberFormat):
        raise TypeError(f"form must be a NumberFormat or its name, got {type(form).__name__}")
    if known.kind is FormatKind.INTEGER:
        return 2.0**-known.fraction_bits
    if known.kind is FormatKind.FLOAT:
        return 2.0 ** (1 - known.bias - known.mantissa_bits)
    raise SpecError(f"only integers and minifloats are multiples of one step, got {known.name}")


def integer_values(codes: Array, form: NumberFormat | str) -> npt.NDArray[np.int64]:
    """Return what codes stand for, in units of ``integer_unit``.

    Parameters
    ----------
    codes : numpy.ndarray, int8 or uint8
    form : NumberFormat or str
        An integer or minifloat format.

    Returns
    -------
    numpy.ndarray, int64

    Raises
    ------
    SpecError, ValueError
        For another kind of format, or codes of NaN or infinity.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.exact import integer_values
    >>> integer_values(np.arange(8, dtype=np.uint8), "e2m1")
    array([ 0,  1,  2,  3,  4,  6,  8, 12])
    """
    known = find_format(form) if isinstance(form, str) else form
    steps = known.values / integer_unit(known)
    picked = steps[codes.astype(np.uint8) & (2**known.bits - 1)]
    if not np.isfinite(picked).all():
        wrong = codes[~np.isfinite(picked)][0]
        raise ValueError(f"codes must stand for finite numbers of {known.name}, got {wrong}")
    whole: npt.NDArray[np.int64] = picked.astype(np.int64)
    return whole


def magnitude_bits(form: NumberFormat | str) -> int:
    """Return how many bits hold the largest magnitude in units of ``integer_unit``.

    Examples
    --------
    >>> from corequant.exact import magnitude_bits
    >>> [magnitude_bits(f) for f in ("e2m1", "e3m0", "e2m3", "e3m2", "e4m3")]
    [4, 7, 6, 9, 18]
    """
    low, high = integer_range(form)
    return max(-low, high).bit_length()


def integer_range(form: NumberFormat | str) -> tuple[int, int]:
    """Return a format's least and greatest number in units of ``integer_unit``.

    Examples
    --------
    >>> from corequant.exact import integer_range
    >>> integer_range("e2m1"), integer_range("int4")
    ((-12, 12), (-8, 7))
    """
    known = find_format(form) if isinstance(form, str) else form
    unit = integer_unit(known)
    return round(known.minimum / unit), round(known.maximum / unit)


def accumulator_bits(terms: int, weight: NumberFormat | str, activation: NumberFormat | str) -> int:
    """Return the accumulator width that no weights can overflow.

    Parameters
    ----------
    terms : int
        Products in a sum.
    weight, activation : NumberFormat or str
        Formats of the two factors, integers or minifloats.

    Returns
    -------
    int
        Width P, sign included, of an accumulator that holds ±(2**(P-1) - 1): enough for every sum
        of at most that many products, in any order.

    Raises
    ------
    SpecError, TypeError, ValueError
        For a format without unit, or fewer than one term.

    Examples
    --------
    >>> import corequant as cq
    >>> cq.accumulator_bits(128, "int4", "uint8"), cq.accumulator_bits(128, "int4", "int8")
    (19, 19)
    """
    largest = check_index("terms", terms)
    for form in (weight, activation):
        low, high = integer_range(form)
        largest *= max(-low, high)
    return largest.bit_length() + 1


def exact_matmul(
    a: Array, a_format: NumberFormat | str, b: Array, b_format: NumberFormat | str
) -> tuple[Array, float]:
    """Multiply matrices of codes exactly: ``a @ b.T`` as integers.

    Parameters
    ----------
    a : numpy.ndarray (tokens, K)
        Codes of ``a_format``.
    a_format : NumberFormat or str
    b : numpy.ndarray (out_features, K)
        Codes of ``b_format``.
    b_format : NumberFormat or str

    Returns
    -------
    product : numpy.ndarray (tokens, out_features)
        Int64, or Python integers (dtype object) where 64 bits might not do.
    unit : float
        What one stands for: the numbers' product is ``product * unit``.

    Raises
    ------
    ShapeError, SpecError, ValueError
        If shapes don't fit, or codes or formats are not exact.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.exact import exact_matmul
    >>> exact_matmul(np.array([[7, 1]], np.uint8), "e2m1", np.array([[2, 9]], np.uint8), "e2m1")
    (array([[23]]), 0.25)
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"a and b must be (m, K) and (n, K), got {a.shape} and {b.shape}")
    left, right = integer_values(a, a_format), integer_values(b, b_format)
    width = accumulator_bits(max(1, a.shape[1]), a_format, b_format)
    unit = integer_unit(a_format) * integer_unit(b_format)
    if width <= 53:
        # Every partial sum is a whole number that float64 holds, so the fast product is exact.
        return np.matmul(left.astype(np.float64), right.T.astype(np.float64)).astype(np.int64), unit
    if width <= 64:
        return left @ right.T, unit
    return left.astype(object) @ right.T.astype(object), unit
