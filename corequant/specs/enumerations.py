"""The enumerated fields of a quantizer."""

from __future__ import annotations

import enum

from corequant.formats import FormatKind, NumberFormat, Specials, formats

__all__ = [
    "GROUPED",
    "POWERS_OF_TWO",
    "Granularity",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleSearch",
]


def _half(name: str, exponent_bits: int, mantissa_bits: int, bias: int) -> NumberFormat:
    layout = exponent_bits, mantissa_bits, bias
    return NumberFormat(name, 16, FormatKind.FLOAT, True, *layout, Specials.IEEE)


class Granularity(enum.Enum):
    """Which entries share one scale.

    ``TENSOR`` the whole array, ``CHANNEL`` each row of a weight ``(out_features, in_features)``,
    ``TOKEN`` each row of activations ``(..., d)``, ``GROUP`` each run of ``group_size`` entries of
    the last axis, ``TENSOR_GROUP`` the same with one more scale for the whole tensor.
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    GROUP = "group"
    TENSOR_GROUP = "tensor_group"


class ScaleSearch(enum.Enum):
    """How a scale is found.

    ``ABSMAX`` from the largest magnitude; ``PERCENTILE`` from a percentile of the magnitudes;
    ``MSE`` by least squared rounding error among 100 fractions of the full range, or among all
    neighbouring scales where the scale format has few of them; ``HQO`` by half-quadratic
    optimisation of scale and zero point; ``EXACT`` the scale of least squared error of all;
    ``FOUR_OVER_SIX`` the better of mapping the largest magnitude to 6 and to 4.
    """

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    HQO = "hqo"
    EXACT = "exact"
    FOUR_OVER_SIX = "four_over_six"


class ScaleFormat(enum.Enum):
    """How scales are stored: a float, a power of two, a byte with an exponent, a byte E4M3.

    Attributes
    ----------
    bits : int
        Bits that a stored scale takes.
    dtype : str
        NumPy dtype of arrays of stored scales.
    tag : str or None
        Dtype in safetensors files; None where no file has it.
    numbers : NumberFormat or None
        Format whose numbers scales are; its codes are what is stored where ``dtype`` is uint8.
    """

    FLOAT32 = "float32", 32, "float32", "F32", None
    FLOAT16 = "float16", 16, "float16", "F16", _half("float16", 5, 10, 15)
    BFLOAT16 = "bfloat16", 16, "float32", "BF16", _half("bfloat16", 8, 7, 127)
    POWER_OF_TWO = "pow2", 8, "float32", None, None
    E8M0 = "e8m0", 8, "uint8", "U8", formats["float8_e8m0fnu"]
    E4M3 = "e4m3", 8, "uint8", "F8_E4M3", formats["float8_e4m3fn"]

    _value_: str
    bits: int
    dtype: str
    tag: str | None
    numbers: NumberFormat | None

    def __new__(
        cls, name: str, bits: int, dtype: str, tag: str | None, numbers: NumberFormat | None
    ) -> ScaleFormat:
        """Return the member whose value is ``name``."""
        member = object.__new__(cls)
        member._value_, member.bits, member.dtype = name, bits, dtype
        member.tag, member.numbers = tag, numbers
        return member


class ScaleRounding(enum.Enum):
    """How a scale is rounded to its format; E is the exponent of a power of two.

    ``NEAREST`` round to nearest, ties to even (formats with a mantissa). ``FLOOR``
    ``E = floor(log2(max|x|)) - emax``, the rule of OCP MX: magnitudes above the largest number
    saturate. ``CEIL`` the smallest E with which nothing saturates. ``EVEN`` as ``FLOOR`` after
    max|x| was rounded, ties to even, to as many mantissa bits as the numbers have.
    """

    NEAREST = "nearest"
    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"


POWERS_OF_TWO = (ScaleFormat.POWER_OF_TWO, ScaleFormat.E8M0)
GROUPED = (Granularity.GROUP, Granularity.TENSOR_GROUP)
