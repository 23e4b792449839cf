"""Narrow accumulators: bounds while rounding, and certificates of rounded weights.

A dot product sums integer weights q_i times integer inputs x_i ∈ [μ, ν], μ ≤ 0 ≤ ν: codes as they
are stored, or codes less their zero points; minifloats are integers times a power of two. With α
the sum of a tile's positive weights and β that of its negative ones, every partial sum lies between
αμ + βν and αν + βμ, in whatever order the products are added.

Source: AXE, arXiv 2409.17092; A2Q+, arXiv 2401.10432 for the ℓ1 radius of centred weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import AccumulatorError, ShapeError
from corequant.exact import integer_range, integer_unit, integer_values
from corequant.formats import FormatKind, NumberFormat, formats
from corequant.quantization import QuantizedTensor, check_fit
from corequant.specs import QuantSpec

__all__ = [
    "AccumulatorSpec",
    "Certificate",
    "certify",
    "check_tile",
    "ensure_certified",
    "integer_codes",
]

Array = npt.NDArray[Any]

_MOST_BITS = 48


@dataclass(frozen=True)
class AccumulatorSpec:
    """An accumulator that no dot product may overflow.

    Attributes
    ----------
    bits : int
        Width P, 3 to 48, sign included; it holds sums in ±(2**(P-1) - 1).
    tile : int or None
        Products that are summed before the sum is handed to a wider accumulator; all of a row's by
        default. Weights of a tile must share one scale, so a tile lies within a group.
    activation : NumberFormat
        Format of the other factor, or its name, whose codes are multiplied as they are stored:
        ``int8`` means -128..127, ``uint8`` 0..255. Any code may meet any weight. Of a QuantSpec
        the format, and whether there are zero points.
    diffuse : bool
        Whether columns rounded later also make up for what the bounds cut off (True), or only for
        rounding, as published (False). GPFQ always does.
    zero_points : bool, optional
        Whether what is multiplied are codes less a zero point, which may be any code: the integers
        then reach from -255 to 255 for 8 bits, and what holds them holds the codes themselves too.
        By default that of the QuantSpec: True where it is asymmetric. With the format in its place
        the products of stored codes are meant, to whose sum a kernel adds the zero points' share
        elsewhere.

    Raises
    ------
    AccumulatorError, SpecError, TypeError, ValueError
        For a width or tile out of range, or a format that isn't a multiple of integers.

    Examples
    --------
    >>> import corequant as cq
    >>> cq.AccumulatorSpec(16, 128, "int8").range
    (-128, 127)
    >>> cq.AccumulatorSpec(16, 128, "int8:token:asymmetric").range
    (-255, 255)
    """

    bits: int
    tile: int | None = None
    activation: NumberFormat = formats["int8"]
    diffuse: bool = True
    zero_points: bool | None = None

    def __post_init__(self) -> None:
        """Look names up and refuse widths out of range."""
        for name, allowed in (("diffuse", (bool,)), ("zero_points", (bool, type(None)))):
            if not isinstance(getattr(self, name), allowed):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        activation: Any = self.activation
        if isinstance(activation, str):
            activation = QuantSpec.parse(activation)
        asymmetric = isinstance(activation, QuantSpec) and not activation.symmetric
        if self.zero_points is None:
            object.__setattr__(self, "zero_points", asymmetric)
        if isinstance(activation, QuantSpec):
            activation = activation.format
        if not isinstance(activation, NumberFormat):
            raise TypeError(
                "activation must be a NumberFormat, its name or a QuantSpec, "
                f"got {type(activation).__name__}"
            )
        object.__setattr__(self, "activation", activation)
        integer_unit(activation)
        bits = check_index("bits", self.bits)
        if not 3 <= bits <= _MOST_BITS:
            raise AccumulatorError(f"bits must be 3 to {_MOST_BITS}, got {bits}")
        if self.tile is not None:
            check_index("tile", self.tile)

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer that an activation is multiplied as."""
        low, high = integer_range(self.activation)
        return (low - high, high - low) if self.zero_points else (low, high)

    @property
    def limit(self) -> int:
        """Largest magnitude that a sum may have."""
        return int(2 ** (self.bits - 1) - 1)


def check_tile(accumulator: AccumulatorSpec, tile: int, spec: QuantSpec) -> None:
    """Raise AccumulatorError unless tiles have one scale and room for a weight."""
    group = spec.group_size
    if group is not None and group % tile:
        raise AccumulatorError(
            f"tile must divide the group size {group} of {spec}, since a sum of codes has one "
            f"scale, got {tile}"
        )
    integer_unit(spec.format)
    low, high = accumulator.range
    if accumulator.limit < max(-low, high):
        what = accumulator.activation.name + " less a zero point" * bool(accumulator.zero_points)
        raise AccumulatorError(
            f"bits must leave room for one weight of 1: {what} reaches {max(-low, high)}, "
            f"got {accumulator.bits} bits, which hold ±{accumulator.limit}"
        )


@dataclass(frozen=True, eq=False)
class Certificate:
    """The worst case of an accumulator, computed exactly.

    Attributes
    ----------
    safe : bool
        No input makes any tile's sum, or any part of it in any order, exceed the accumulator.
    largest : int
        Largest magnitude that a tile's sum can reach.
    minimum_bits : int
        Narrowest accumulator that is safe for these weights with these tiles.
    outer_bits : int
        Narrowest accumulator that is safe for the sum over a row's tiles.
    row, tile : int
        Where ``largest`` is reached.
    witness : numpy.ndarray (in_features,), int64
        Integers of activations that reach it, zero outside the tile.
    """

    safe: bool
    largest: int
    minimum_bits: int
    outer_bits: int
    row: int
    tile: int
    witness: npt.NDArray[np.int64]


def integer_codes(quantized: QuantizedTensor) -> npt.NDArray[np.int64]:
    """Return the integers that a weight's dot products sum: code less zero point, or the minifloat.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.rounding import integer_codes
    >>> integer_codes(cq.quantize(np.array([[0.5, -6.0]]), "e2m1:channel"))
    array([[  1, -12]])
    """
    codes = np.asarray(quantized.codes)
    _, zero_points = check_fit(codes.shape, quantized)
    if quantized.spec.format.kind is not FormatKind.INTEGER:
        return integer_values(codes, quantized.spec.format)
    whole = codes.astype(np.int64)
    if zero_points is None:
        return whole
    zeros = np.asarray(zero_points, np.int64)
    length = codes.shape[-1] // zeros.shape[-1] if zeros.shape[-1] else 1
    return whole - np.repeat(zeros, length, axis=-1)


def certify(quantized: QuantizedTensor | Any, accumulator: AccumulatorSpec) -> Certificate:
    """Prove that a weight's dot products never overflow an accumulator, or show how one does.

    Parameters
    ----------
    quantized : QuantizedTensor or integer numpy.ndarray (out_features, in_features)
        The weight, or the integers that its dot products sum.
    accumulator : AccumulatorSpec
        Width, tile and activations.

    Returns
    -------
    Certificate

    Raises
    ------
    AccumulatorError, ShapeError, SpecError, TypeError
        If a tile spans several scales, or the weight isn't a matrix of integers.

    Notes
    -----
    Products are bounded by sign, and none of their bounds has the wrong sign since μ ≤ 0 ≤ ν, so a
    tile's extremes bound those of every part of it. All arithmetic is in integers.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> codes = np.array([[7, -8, 3, 1]])
    >>> found = cq.certify(codes, cq.AccumulatorSpec(12, activation="int8"))
    >>> found.safe, found.largest, found.minimum_bits, codes @ found.witness
    (False, 2424, 13, array([-2424]))
    """
    if not isinstance(accumulator, AccumulatorSpec):
        raise TypeError(f"accumulator must be an AccumulatorSpec, got {type(accumulator).__name__}")
    codes = quantized
    if isinstance(quantized, QuantizedTensor):
        codes = integer_codes(quantized)
        if codes.ndim == 2 and codes.size:
            tile = min(accumulator.tile or codes.shape[1], codes.shape[1])
            check_tile(accumulator, tile, quantized.spec)
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        kind = getattr(codes, "dtype", type(codes).__name__)
        raise TypeError(f"quantized must be a QuantizedTensor or an integer array, got {kind}")
    if codes.ndim != 2 or not codes.size:
        raise ShapeError(
            f"quantized must be (out_features, in_features), not empty, got {codes.shape}"
        )
    whole = codes.astype(object if _is_wide(codes) else np.int64)
    tile = min(accumulator.tile or whole.shape[1], whole.shape[1])
    low, high = accumulator.range
    starts = np.arange(0, whole.shape[1], tile)
    alpha = np.add.reduceat(np.maximum(whole, 0), starts, axis=1)
    beta = np.add.reduceat(np.minimum(whole, 0), starts, axis=1)
    if (
        whole.dtype != object
        and int(alpha.max() - beta.min()) * (high - low) * len(starts) >= 2**62
    ):
        alpha, beta = alpha.astype(object), beta.astype(object)
    top, bottom = alpha * high + beta * low, -(alpha * low + beta * high)
    worst = np.maximum(top, bottom)
    row, column = (int(k) for k in np.unravel_index(int(np.argmax(worst)), worst.shape))
    largest = int(worst[row, column])
    outer = int(np.maximum(top.sum(1), bottom.sum(1)).max())
    part = slice(starts[column], starts[column] + tile)
    positive = whole[row, part] > 0
    if bottom[row, column] > top[row, column]:
        positive = whole[row, part] < 0
    witness = np.zeros(whole.shape[1], np.int64)
    witness[part] = np.where(whole[row, part] == 0, 0, np.where(positive, high, low))
    return Certificate(
        safe=largest <= accumulator.limit,
        largest=largest,
        minimum_bits=largest.bit_length() + 1,
        outer_bits=outer.bit_length() + 1,
        row=row,
        tile=column,
        witness=witness,
    )


def ensure_certified(quantized: QuantizedTensor, accumulator: AccumulatorSpec, name: str) -> None:
    """Raise unless codes that were rounded for an accumulator stay within it."""
    if not quantized.codes.size:
        return
    found = certify(quantized, accumulator)
    if not found.safe:
        raise AccumulatorError(
            f"codes of {name} must stay within {accumulator.limit} but reach {found.largest} in "
            f"tile {found.tile} of row {found.row}: a fault of this library, please report it"
        )


def _is_wide(codes: Array) -> bool:
    """Return whether sums of the codes may overflow int64."""
    largest = max(int(codes.max()), -int(codes.min()))
    return bool(largest * codes.shape[1] >= 2**62)
