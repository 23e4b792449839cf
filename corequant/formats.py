"""Number formats: one frozen table of what a code can stand for.

Examples
--------
>>> from corequant.formats import formats
>>> formats["int4"].minimum, formats["int4"].maximum
(-8.0, 7.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["NumberFormat", "formats"]


@dataclass(frozen=True)
class NumberFormat:
    """A set of numbers that codes of ``bits`` bits stand for.

    Attributes
    ----------
    name : str
        Name as in the literature and in ml_dtypes, such as ``int4``.
    bits : int
        Width of a code.
    minimum, maximum : float
        Smallest and largest number of the format.

    Notes
    -----
    Signed integers use the whole two's complement range ``[-2**(bits-1), 2**(bits-1) - 1]``.
    """

    name: str
    bits: int
    minimum: float
    maximum: float


def _signed_integer(bits: int) -> NumberFormat:
    half = 2 ** (bits - 1)
    return NumberFormat(f"int{bits}", bits, float(-half), float(half - 1))


formats: Mapping[str, NumberFormat] = MappingProxyType(
    {f.name: f for f in map(_signed_integer, range(2, 9))}
)
"""Every number format by its name (read-only)."""
