"""Codes of single numbers, without scales: what a cast to the format does."""

from __future__ import annotations

from typing import Any

import numpy as np

from corequant._dispatch import backend_for
from corequant._validation import check_array, check_range, is_on_host
from corequant.errors import NonFiniteError, SpecError
from corequant.formats import NumberFormat, Specials, find_format

__all__ = ["decode", "encode"]


def encode(x: Any, form: NumberFormat | str, *, nonfinite: str = "raise") -> Any:
    """Return the codes of the numbers nearest to ``x``.

    Parameters
    ----------
    x : array (..., d)
        NumPy array or torch tensor of a real floating dtype.
    form : NumberFormat or str
        The format, such as ``"float8_e4m3fn"``.
    nonfinite : str
        ``"raise"`` refuses NaN and infinity. ``"propagate"`` gives them the format's own codes
        (NumPy arrays only): infinity its code of infinity, or NaN where there is none.

    Returns
    -------
    array (..., d), int8 for signed integers, otherwise uint8
        Rounded to nearest from the value of ``x`` itself, never through another float format; ties
        go to the even code. What is beyond the format's ends saturates to the largest finite
        number. -0.0 keeps its sign where the format has one.

    Raises
    ------
    NonFiniteError
        If ``x`` is not finite, under ``"raise"``.
    ShapeError, SpecError, TypeError, ValueError
        For another shape, format, dtype or policy; SpecError too where NaN should propagate to a
        format without it.

    Notes
    -----
    ml_dtypes differs where a finite number overflows: there it becomes infinity or NaN in formats
    that have one. ``float8_e8m0fnu`` has neither zero nor sign: what is not above its smallest
    number becomes that one (NaN in ml_dtypes), and half-way cases go up; between 1 and 1.5 times
    its smallest number ml_dtypes 0.6 rounds up, not to nearest.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.encode(np.array([0.25, 0.75, -1e9, -0.0]), "float4_e2m1fn")
    array([ 0,  2, 15,  8], dtype=uint8)
    """
    form = _as_format(form)
    backend = backend_for(x=x)
    check_array("x", x)
    if nonfinite not in ("raise", "propagate"):
        raise ValueError(f"nonfinite must be one of raise, propagate, got {nonfinite!r}")
    bad = backend.first_nonfinite(x)
    if bad is None:
        return backend.encode(x, form)
    if nonfinite == "raise" or not isinstance(x, np.ndarray):
        raise NonFiniteError("x", *bad)
    if not form.has_nan:
        raise SpecError(f"{form.name} has no code for NaN or infinity to propagate to")
    codes = backend.encode(np.where(np.isfinite(x), x, x.dtype.type(0)), form)
    ieee = form.specials is Specials.IEEE
    infinite = form.magnitudes if ieee else int(np.argmax(np.isnan(form.values)))
    # An IEEE format's quiet NaN, as a cast gives it.
    quiet = infinite | (2 ** (form.mantissa_bits - 1) if ieee else 0)
    sign = 2 ** (form.bits - 1) if form.signed and form.specials is not Specials.FNUZ else 0
    code = np.where(np.isinf(x), infinite, quiet) + np.where(np.signbit(x), sign, 0)
    codes[~np.isfinite(x)] = code[~np.isfinite(x)]
    return codes


def decode(codes: Any, form: NumberFormat | str) -> Any:
    """Return what codes stand for.

    Parameters
    ----------
    codes : array (..., d), int8 or uint8
        Codes. For a signed integer format, int8 codes are numbers and uint8 codes are bits.
    form : NumberFormat or str
        The format.

    Returns
    -------
    array (..., d), float32
        Exact: float32 holds every number of every format.

    Raises
    ------
    ShapeError, SpecError, TypeError, ValueError
        If codes are not bytes or not codes of the format, or the format is unknown.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> cq.decode(np.array([0, 7, 15], np.uint8), "float4_e2m1fn")
    array([ 0.,  6., -6.], dtype=float32)
    """
    form = _as_format(form)
    backend = backend_for(codes=codes)
    kind = str(codes.dtype).rpartition(".")[2]
    if kind not in ("int8", "uint8"):
        raise TypeError(f"codes must be int8 or uint8, got {codes.dtype}")
    least, most = form.least_code, form.most_code
    if kind == "uint8":
        least, most = 0, most - least
    if most - least < 255 and is_on_host(codes):
        check_range(f"codes of {form.name}", codes, least, most)
    return backend.decode(codes, form)


def _as_format(form: Any) -> NumberFormat:
    if isinstance(form, str):
        return find_format(form)
    if not isinstance(form, NumberFormat):
        raise TypeError(f"form must be a NumberFormat or its name, got {type(form).__name__}")
    return form
