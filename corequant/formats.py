"""Number formats: one frozen table of what a code can stand for.

Integers are two's complement (``int4``) or plain binary (``uint4``). A minifloat eXmY has a sign
bit, X exponent bits and Y mantissa bits, and every one of its codes is a finite number; with bias
β, exponent field E and mantissa field M it is ``±2**(1-β) · M/2**Y`` when E = 0, otherwise
``±2**(E-β) · (1 + M/2**Y)``. The names of ml_dtypes (``float8_e4m3fn``, ...) stand for formats
that reserve some codes for NaN and infinity. A codebook is any ascending table of numbers.

Source: finite minifloats as in "Shedding the Bits", arXiv 2311.12359; OCP formats as in the OCP
Microscaling Formats (MX) specification v1.0 and OCP 8-bit Floating Point; NF4 from QLoRA,
arXiv 2305.14314, appendix E.

Examples
--------
>>> from corequant.formats import formats
>>> formats["int4"].minimum, formats["int4"].maximum
(-8.0, 7.0)
>>> formats["e2m1"].values[:8]
array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ])
"""

from __future__ import annotations

import difflib
import enum
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from corequant.errors import SpecError

__all__ = ["FormatKind", "NumberFormat", "Specials", "find_format", "formats"]


class FormatKind(enum.Enum):
    """How a code becomes a number."""

    INTEGER = "integer"
    FLOAT = "float"
    POWER = "power"
    CODEBOOK = "codebook"


class Specials(enum.Enum):
    """Which codes of a float are not finite numbers, by ml_dtypes' suffixes.

    ``NONE`` none; ``IEEE`` the whole top exponent, infinity and NaN; ``FN`` all ones, NaN;
    ``FNUZ`` the code that would be -0.0, NaN.
    """

    NONE = "none"
    IEEE = "ieee"
    FN = "fn"
    FNUZ = "fnuz"


@dataclass(frozen=True)
class NumberFormat:
    """A set of numbers that codes of ``bits`` bits stand for.

    Make one with ``integer``, ``minifloat`` or ``codebook``, or look it up in ``formats``.

    Attributes
    ----------
    name : str
        Name as in the literature and in ml_dtypes, such as ``int4``; ``find_format`` reads it.
    bits : int
        Width of a code.
    kind : FormatKind
    signed : bool
        Whether codes have a sign.
    exponent_bits, mantissa_bits, bias : int
        Layout of a float; zero otherwise.
    specials : Specials
        Reserved codes of a float.
    fraction_bits : int
        An integer's code stands for ``code · 2**-fraction_bits``.
    table : tuple of float
        A codebook's numbers, ascending.
    code_dtype : numpy.dtype
        Dtype that holds one code: int8 for signed integers, otherwise uint8.
    least_code, most_code : int
        Smallest and largest code.
    magnitudes : int
        How many codes without sign bit are finite numbers; a float's largest is the last.
    minimum, maximum : float
        Smallest and largest number.
    max_exponent : int
        The exponent of the largest power of two that is not above ``maximum``.
    precision : int
        Mantissa bits near the largest number: a float's, or those of an integer's magnitude.

    Notes
    -----
    The attributes from ``code_dtype`` on follow from the others and can't be given.

    Signed integers use the whole two's complement range ``[-2**(bits-1), 2**(bits-1) - 1]``.

    Examples
    --------
    >>> from corequant import NumberFormat
    >>> NumberFormat.minifloat(3, 2).maximum
    28.0
    """

    name: str
    bits: int
    kind: FormatKind
    signed: bool = True
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    specials: Specials = Specials.NONE
    fraction_bits: int = 0
    table: tuple[float, ...] = ()

    # Computed once for each format: they are read in every call, however small its arrays are.
    # Not fields, which torch.compile compares one by one.
    code_dtype: ClassVar[np.dtype[np.int8 | np.uint8]]
    least_code: ClassVar[int]
    most_code: ClassVar[int]
    magnitudes: ClassVar[int]
    minimum: ClassVar[float]
    maximum: ClassVar[float]
    max_exponent: ClassVar[int]
    precision: ClassVar[int]

    def __post_init__(self) -> None:
        """Compute what follows from the other attributes."""
        whole = self.kind is FormatKind.INTEGER
        signed_integer = whole and self.signed
        least = -(1 << (self.bits - 1)) if signed_integer else 0
        derived: dict[str, object] = {
            "code_dtype": np.dtype(np.int8 if signed_integer else np.uint8),
            "least_code": least,
            "most_code": least + (len(self.table) or 1 << self.bits) - 1,
            "magnitudes": _magnitudes(self),
            "precision": self.bits - (2 if self.signed else 1) if whole else self.mantissa_bits,
        }
        self.__dict__.update(derived)
        minimum, maximum = _extremes(self)
        exponent = math.frexp(maximum)[1] - 1
        self.__dict__.update(minimum=minimum, maximum=maximum, max_exponent=exponent)

    @classmethod
    def integer(cls, bits: int, *, signed: bool = True) -> NumberFormat:
        """Return the integers of 2 to 8 bits.

        Examples
        --------
        >>> from corequant import NumberFormat
        >>> NumberFormat.integer(3, signed=False).maximum
        7.0
        """
        if not 2 <= bits <= 8:
            raise SpecError(f"bits must be 2 to 8, got {bits}")
        return cls(f"{'int' if signed else 'uint'}{bits}", bits, FormatKind.INTEGER, signed)

    @classmethod
    def minifloat(
        cls, exponent_bits: int, mantissa_bits: int, bias: int | None = None
    ) -> NumberFormat:
        """Return the finite-only minifloat of 3 to 8 bits, sign included.

        Parameters
        ----------
        exponent_bits : int
            At least 1.
        mantissa_bits : int
            At least 0.
        bias : int, optional
            ``2**(exponent_bits - 1) - 1`` by default. Raising it by k divides every number by
            ``2**k``.

        Examples
        --------
        >>> from corequant import NumberFormat
        >>> NumberFormat.minifloat(2, 1, bias=3).name
        'e2m1b3'
        """
        e, m = exponent_bits, mantissa_bits
        if e < 1 or m < 0 or not 3 <= 1 + e + m <= 8:
            raise SpecError(
                f"a minifloat must have at least 1 exponent bit and 3 to 8 bits with its sign, "
                f"got e{e}m{m}"
            )
        usual = 2 ** (e - 1) - 1
        beta = usual if bias is None else bias
        # Inside these limits every number, and every rounding step, is a normal float32.
        if 2**e - 1 - beta > 126 or 1 - beta - m < -126 or beta < -100:
            raise SpecError(
                f"bias must keep the numbers of e{e}m{m} in float32's normal range, got {beta}"
            )
        name = f"e{e}m{m}" + ("" if beta == usual else f"b{beta}")
        return cls(name, 1 + e + m, FormatKind.FLOAT, True, e, m, beta)

    @classmethod
    def codebook(cls, values: Iterable[float], name: str | None = None) -> NumberFormat:
        """Return a format of up to 256 given numbers; a code is an index of the ascending table.

        Parameters
        ----------
        values : iterable of float
            Finite and strictly ascending, at least 2, rounded to float32.
        name : str, optional
            Only for formats that ``formats`` holds; a user's table is named by its numbers, so
            that its name can be read back.

        Examples
        --------
        >>> from corequant import NumberFormat
        >>> NumberFormat.codebook([-1, -0.25, 0.25, 1]).name
        'codebook(-1.0,-0.25,0.25,1.0)'
        """
        with np.errstate(over="ignore"):
            # Adding 0.0 turns -0.0, which compares equal, into 0.0.
            table = tuple(float(np.float32(v)) + 0.0 for v in values)
        if (
            not 2 <= len(table) <= 256
            or not all(map(math.isfinite, table))
            or any(a >= b for a, b in itertools.pairwise(table))
            or max(map(abs, table)) < 2.0**-100
        ):
            raise SpecError(
                "a codebook must have 2 to 256 finite numbers, strictly ascending in float32 and "
                f"not all of them nearly zero, got {table[:8]}{'...' if len(table) > 8 else ''}"
            )
        bits = max(1, (len(table) - 1).bit_length())
        label = name or f"codebook({','.join(str(np.float32(v)) for v in table)})"
        return cls(label, bits, FormatKind.CODEBOOK, False, table=table)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Values of the codes ``0, 1, ..., 2**bits - 1`` (as bits); read-only."""
        return _values(self)

    @property
    def finite_values(self) -> npt.NDArray[np.float64]:
        """The different finite numbers, ascending; read-only."""
        return _finite_values(self)

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return bool(np.isnan(self.values).any())


def _magnitudes(form: NumberFormat) -> int:
    width = form.exponent_bits + form.mantissa_bits
    if form.specials is Specials.IEEE:
        return ((1 << form.exponent_bits) - 1) << form.mantissa_bits
    return (1 << width) - (1 if form.specials is Specials.FN else 0)


def _extremes(form: NumberFormat) -> tuple[float, float]:
    """Return the smallest and the largest number."""
    if form.kind is FormatKind.INTEGER:
        unit = math.ldexp(1.0, -form.fraction_bits)
        return form.least_code * unit, form.most_code * unit
    if form.kind is FormatKind.CODEBOOK:
        return form.table[0], form.table[-1]
    last = form.magnitudes - 1
    if form.kind is FormatKind.POWER:
        return math.ldexp(1.0, -form.bias), math.ldexp(1.0, last - form.bias)
    m = form.mantissa_bits
    exponent, fraction = last >> m, last & ((1 << m) - 1)
    significand = (1 << m) + fraction if exponent else fraction
    largest = math.ldexp(significand, max(exponent, 1) - form.bias - m)
    return -largest, largest


@lru_cache(maxsize=512)
def _finite_values(form: NumberFormat) -> npt.NDArray[np.float64]:
    values = _values(form)
    found = np.unique(values[np.isfinite(values)])
    found.flags.writeable = False
    return found


@lru_cache(maxsize=512)
def _values(form: NumberFormat) -> npt.NDArray[np.float64]:
    codes = np.arange(2**form.bits)
    if form.kind is FormatKind.INTEGER:
        wrapped = np.where(codes > form.most_code, codes - 2**form.bits, codes)
        values = np.ldexp(wrapped.astype(np.float64), -form.fraction_bits)
    elif form.kind is FormatKind.POWER:
        values = np.ldexp(1.0, codes - form.bias)
        values[-1] = np.nan
    elif form.kind is FormatKind.CODEBOOK:
        values = np.array(form.table)
    else:
        values = _float_values(form)
    values.setflags(write=False)
    return values


def _float_values(form: NumberFormat) -> npt.NDArray[np.float64]:
    m = form.mantissa_bits
    magnitude = np.arange(2 ** (form.bits - 1))
    exponent, fraction = magnitude >> m, magnitude & (2**m - 1)
    significand = np.where(exponent > 0, 2**m + fraction, fraction).astype(np.float64)
    values = np.ldexp(significand, np.maximum(exponent, 1) - form.bias - m)
    values[form.magnitudes :] = np.nan
    if form.specials is Specials.IEEE:
        values[form.magnitudes] = np.inf
    both = np.concatenate([values, -values])
    if form.specials is Specials.FNUZ:
        both[len(values)] = np.nan
    return both


def _ml_dtypes() -> Iterable[NumberFormat]:
    rows = (
        ("float4_e2m1fn", 2, 1, 1, Specials.NONE),
        ("float6_e2m3fn", 2, 3, 1, Specials.NONE),
        ("float6_e3m2fn", 3, 2, 3, Specials.NONE),
        ("float8_e3m4", 3, 4, 3, Specials.IEEE),
        ("float8_e4m3", 4, 3, 7, Specials.IEEE),
        ("float8_e4m3fn", 4, 3, 7, Specials.FN),
        ("float8_e4m3fnuz", 4, 3, 8, Specials.FNUZ),
        ("float8_e4m3b11fnuz", 4, 3, 11, Specials.FNUZ),
        ("float8_e5m2", 5, 2, 15, Specials.IEEE),
        ("float8_e5m2fnuz", 5, 2, 16, Specials.FNUZ),
    )
    for name, e, m, bias, specials in rows:
        yield NumberFormat(name, 1 + e + m, FormatKind.FLOAT, True, e, m, bias, specials)
    yield NumberFormat(
        "float8_e8m0fnu",
        8,
        FormatKind.POWER,
        False,
        exponent_bits=8,
        bias=127,
        specials=Specials.FN,
    )


# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def _table() -> Iterable[NumberFormat]:
    for bits in range(2, 9):
        yield NumberFormat.integer(bits)
        yield NumberFormat.integer(bits, signed=False)
    # The element of MXINT8: 8 bits, 6 of them after the binary point.
    yield NumberFormat("int8f6", 8, FormatKind.INTEGER, fraction_bits=6)
    for bits in range(3, 9):
        for e in range(1, bits):
            yield NumberFormat.minifloat(e, bits - 1 - e)
    yield from _ml_dtypes()
    yield NumberFormat.codebook(_NF4, "nf4")


formats: Mapping[str, NumberFormat] = MappingProxyType({f.name: f for f in _table()})
"""Every named number format (read-only); ``find_format`` also reads biases and codebooks."""

_MINIFLOAT = re.compile(r"e(\d)m(\d)(?:b(-?\d{1,3}))?")
_CODEBOOK = re.compile(r"codebook\(([^()]*)\)")


def find_format(text: str) -> NumberFormat:
    """Return the format of that name.

    Parameters
    ----------
    text : str
        A key of ``formats``, a minifloat with a bias such as ``"e2m1b3"``, or
        ``"codebook(-1,0,1)"``.

    Returns
    -------
    NumberFormat

    Raises
    ------
    SpecError
        If there is no such format; the message names what is near.

    Examples
    --------
    >>> from corequant.formats import find_format
    >>> find_format("e4m3").maximum, find_format("float8_e4m3fn").maximum
    (480.0, 448.0)
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    if text in formats:
        return formats[text]
    if match := _MINIFLOAT.fullmatch(text):
        e, m, bias = match.groups()
        return NumberFormat.minifloat(int(e), int(m), None if bias is None else int(bias))
    if match := _CODEBOOK.fullmatch(text):
        try:
            numbers = [float(part) for part in match[1].split(",")]
        except ValueError:
            raise SpecError(f"a codebook must list numbers between commas, got {text!r}") from None
        return NumberFormat.codebook(numbers)
    raise SpecError(
        f"unknown format {text!r}, expected int2 to int8, uint2 to uint8, eXmY of 3 to 8 bits "
        f"(eXmYbZ with bias Z), a name of ml_dtypes such as float8_e4m3fn, nf4 or "
        f"codebook(...){suggestion(text, formats)}"
    )


def suggestion(word: str, known: Iterable[str], what: str = "") -> str:
    """Return the end of an error message: the known words that are near, if any."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {what}{' or '.join(map(repr, near))}?" if near else ""
