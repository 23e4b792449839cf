"""Formats and scale rules as constants for the compiled loops, in float32 or float64.

Bit-exact twin: `corequant_torch.device.grids`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from corequant._cpu.loops import (
    codebook_grid,
    group_passes,
    integer_grid,
    lanes,
    minifloat_grid,
)
from corequant._cpu.loops.minifloat_grid import Rounder
from corequant._cpu.loops.scales import Power, Rule
from corequant.formats import FormatKind, NumberFormat, Specials
from corequant.specs import QuantSpec, ScaleFormat, ScaleRounding

__all__ = [
    "LOSS_LANES",
    "Grid",
    "codebook_thresholds",
    "grid_for",
    "levels_of",
    "rounder_for",
    "rule_for",
    "unsigned",
]

Array = npt.NDArray[Any]

LOSS_LANES = 128
"""Partial sums of squared errors, in float64. Other backends sum in as many: bits depend on it."""

_SCALES = {
    kind: kind.numbers
    for kind in ScaleFormat
    if kind.numbers and kind.numbers.kind is FormatKind.FLOAT
}


def unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the unsigned integer dtype of a working dtype's width."""
    return np.dtype(np.uint32 if dtype.itemsize == 4 else np.uint64)


@lru_cache(maxsize=256)
def rounder_for(form: NumberFormat, dtype: np.dtype[Any]) -> Rounder:
    """Return the constants of rounding to a minifloat in float32 or float64."""
    info, f, u = np.finfo(dtype), dtype.type, unsigned(dtype).type
    fraction, width = info.nmant, info.bits
    m, shift = form.mantissa_bits, fraction - form.mantissa_bits
    top = form.magnitudes - 1
    exponent, mantissa = top >> m, top & (2**m - 1)
    significand = mantissa + (2**m if exponent else 0)
    magic = f(math.ldexp(1.0, 1 - form.bias - m + fraction))
    signed_zero = form.specials is not Specials.FNUZ
    return Rounder(
        least_normal=f(math.ldexp(1.0, 1 - form.bias)),
        largest=f(math.ldexp(significand, max(exponent, 1) - form.bias - m)),
        magic=magic,
        magic_bits=magic.view(u),
        origin=u(((1 - info.minexp) - form.bias) << fraction),
        shift=u(shift),
        half=u((1 << (shift - 1)) - 1),
        magnitude_mask=u((1 << (width - 1)) - 1),
        sign_shift=u(width - form.bits),
        sign_bit=u(1 << (form.bits - 1)),
        keep=u(signed_zero),
        one=u(1),
        tiny=f(math.ldexp(1.0, 1 - form.bias - m)),
        plus=f(-0.0 if signed_zero else 0.0),
    )


@lru_cache(maxsize=256)
def rule_for(spec: QuantSpec, dtype: np.dtype[Any]) -> Rule:
    """Return the constants of a spec's scale rule in float32 or float64."""
    info, f, form = np.finfo(dtype), dtype.type, spec.format
    unit = math.ldexp(1.0, -form.fraction_bits)
    extreme = max(abs(form.minimum), abs(form.maximum))
    steps = extreme
    if form.kind is FormatKind.INTEGER:
        halves = 2.0 if form.signed or not spec.symmetric else 1.0
        steps = (form.most_code - form.least_code) / halves * unit
    # What multiplies a code is the scale times the unit, and mustn't vanish.
    tiny = float(info.smallest_subnormal) / unit
    rounder = power = None
    if spec.scale_format in _SCALES:
        scale_format = _SCALES[spec.scale_format]
        tiny = math.ldexp(1.0, 1 - scale_format.bias - scale_format.mantissa_bits)
        rounder = rounder_for(scale_format, dtype)
    elif spec.scale_format is not ScaleFormat.FLOAT32:
        power = _power_for(spec, dtype, extreme)
    idle = math.ldexp(1.0, -127) if spec.scale_format is ScaleFormat.E8M0 else 1.0
    return Rule(
        symmetric=spec.symmetric,
        least=f(form.least_code),
        most=f(form.most_code),
        steps=f(steps),
        span=f(extreme),
        tiny=f(tiny),
        # Decoded numbers are rounded, and so may the scale be, to 8 bits or more: a little room
        # keeps them from reaching infinity.
        huge=f(info.max) * f(1 - 2.0 ** (-7 if rounder else -20)),
        idle=f(idle),
        rounder=rounder,
        power=power,
    )


def _power_for(spec: QuantSpec, dtype: np.dtype[Any], extreme: float) -> Power:
    """Return the constants of scales that are powers of two, of numbers up to ``extreme``."""
    info, f, form = np.finfo(dtype), dtype.type, spec.format
    lowest = 1 - int(info.maxexp) + 1
    highest = int(info.maxexp) - 1 - max(math.frexp(extreme)[1] - 1, 0)
    if spec.scale_format is ScaleFormat.E8M0:
        lowest, highest = -127, min(127, highest)
    fraction = int(info.nmant)
    threshold = {
        ScaleRounding.CEIL: int((math.frexp(form.maximum)[0] * 2 - 1) * 2**fraction) + 1,
        # Rounding half to even carries into the exponent from here on.
        ScaleRounding.EVEN: 2**fraction - 2 ** (fraction - form.precision - 1),
    }.get(spec.scale_rounding or ScaleRounding.FLOOR, 2**fraction)
    return Power(
        offset=form.max_exponent,
        threshold=threshold,
        lowest=lowest,
        highest=highest,
        fraction=fraction,
        bias=1 - int(info.minexp),
        least_normal=f(info.smallest_normal),
        lift=f(2.0**fraction),
        word=unsigned(dtype).type(1),
    )


def fits_nibbles(form: NumberFormat, dtype: np.dtype[Any], size: int, d: int) -> bool:
    """Return whether rows of ``d`` numbers in groups of ``size`` go 32 numbers at a time."""
    return (
        form.kind is FormatKind.FLOAT
        and (form.bits, form.specials) == (4, Specials.NONE)
        and dtype == np.float32
        and (size == lanes.HALF or size % lanes.LANES == 0)
        and d % lanes.LANES == 0
    )


class Grid(Protocol):
    """The numbers of a format; scales and zeros are flat, panels are (groups, size)."""

    def encode(self, panel: Array, scales: Array, zeros: Array, codes: Array) -> None:
        """Write codes."""

    def fake(self, panel: Array, scales: Array, zeros: Array, out: Array) -> None:
        """Write rounded numbers."""

    def losses(self, panel: Array, scales: Array, zeros: Array) -> Array:
        """Return squared errors of trial scales (groups, trials), float64."""

    def decode(self, codes: Array, scales: Array, zeros: Array, out: Array) -> None:
        """Write numbers of codes."""

    def decode_packed(
        self, packed: Array, size: int, scales: Array, zeros: Array, out: Array
    ) -> None:
        """Write numbers of packed rows to ``out`` (rows, d)."""


@lru_cache(maxsize=256)
def grid_for(form: NumberFormat, dtype: np.dtype[Any]) -> Grid:
    """Return a format's kernels with their constants in float32 or float64."""
    if form.kind is FormatKind.INTEGER:
        return _Integers(form, dtype)
    if form.kind is FormatKind.CODEBOOK:
        return _Codebook(form, dtype)
    return _Minifloat(form, dtype)


class _Integers:
    def __init__(self, form: NumberFormat, dtype: np.dtype[Any]) -> None:
        self._bits = form.bits
        self._limits = dtype.type(form.least_code), dtype.type(form.most_code)
        self._unit = dtype.type(math.ldexp(1.0, -form.fraction_bits))

    def _step(self, scales: Array) -> Array:
        return scales if self._unit == 1 else scales * self._unit

    def encode(self, panel: Array, scales: Array, zeros: Array, codes: Array) -> None:
        integer_grid.encode(panel, self._step(scales), zeros, *self._limits, codes)

    def fake(self, panel: Array, scales: Array, zeros: Array, out: Array) -> None:
        integer_grid.fake(panel, self._step(scales), zeros, *self._limits, out)

    def losses(self, panel: Array, scales: Array, zeros: Array) -> Array:
        out = np.empty(scales.shape)
        lanes = _lanes(panel.shape[1])
        integer_grid.losses(panel, self._step(scales), zeros, *self._limits, lanes, out)
        return out

    def decode(self, codes: Array, scales: Array, zeros: Array, out: Array) -> None:
        integer_grid.decode(codes, self._step(scales), zeros, out)

    def decode_packed(
        self, packed: Array, size: int, scales: Array, zeros: Array, out: Array
    ) -> None:
        # Packed codes count from zero.
        shifted = zeros - self._limits[0]
        steps = self._step(scales)
        if self._bits == 4 and out.dtype == np.float32 and size % lanes.LANES == 0:
            group_passes.decode_four_bits(packed, size, steps, shifted, out)
        else:
            room = _row_room(out, size)
            group_passes.decode_integers(packed, self._bits, steps, shifted, *room)


class _Minifloat:
    def __init__(self, form: NumberFormat, dtype: np.dtype[Any]) -> None:
        self._bits, self._finite = form.bits, form.specials is Specials.NONE
        self._rounder = rounder_for(form, dtype)
        self._table = _byte_table(form, dtype)

    def encode(self, panel: Array, scales: Array, zeros: Array, codes: Array) -> None:
        minifloat_grid.encode(panel, scales, self._rounder, codes)

    def fake(self, panel: Array, scales: Array, zeros: Array, out: Array) -> None:
        minifloat_grid.fake(panel, scales, self._rounder, out)

    def losses(self, panel: Array, scales: Array, zeros: Array) -> Array:
        out = np.empty(scales.shape)
        minifloat_grid.losses(panel, scales, self._rounder, _lanes(panel.shape[1]), out)
        return out

    def decode(self, codes: Array, scales: Array, zeros: Array, out: Array) -> None:
        if self._finite:
            minifloat_grid.decode(codes, scales, self._rounder, out)
        else:
            integer_grid.look_up(codes, scales, self._table, out)

    def decode_packed(
        self, packed: Array, size: int, scales: Array, zeros: Array, out: Array
    ) -> None:
        room = _row_room(out, size)
        if self._finite:
            group_passes.decode_minifloats(packed, self._bits, scales, self._rounder, *room)
        else:
            group_passes.decode_table(packed, self._bits, scales, self._table, *room)


class _Codebook:
    def __init__(self, form: NumberFormat, dtype: np.dtype[Any]) -> None:
        self._bits = form.bits
        self._table = _byte_table(form, dtype)
        self._thresholds = codebook_thresholds(form.table, dtype)

    def encode(self, panel: Array, scales: Array, zeros: Array, codes: Array) -> None:
        codebook_grid.encode(panel, scales, self._thresholds, codes)

    def fake(self, panel: Array, scales: Array, zeros: Array, out: Array) -> None:
        codebook_grid.fake(panel, scales, self._thresholds, self._table, out)

    def losses(self, panel: Array, scales: Array, zeros: Array) -> Array:
        out = np.empty(scales.shape)
        codebook_grid.losses(panel, scales, self._thresholds, self._table, out)
        return out

    def decode(self, codes: Array, scales: Array, zeros: Array, out: Array) -> None:
        integer_grid.look_up(codes, scales, self._table, out)

    def decode_packed(
        self, packed: Array, size: int, scales: Array, zeros: Array, out: Array
    ) -> None:
        group_passes.decode_table(packed, self._bits, scales, self._table, *_row_room(out, size))


@lru_cache(maxsize=256)
def levels_of(form: NumberFormat) -> tuple[Array, Array, Array, Array]:
    """Return levels and the middles between them, for entries above and for those below zero.

    As magnitudes, ascending from the level nearest to zero.
    """
    values = form.finite_values
    middles = (values[1:] + values[:-1]) / 2
    above, below = int((middles <= 0).sum()), int((middles < 0).sum())
    return (
        np.ascontiguousarray(values[above:]),
        np.ascontiguousarray(middles[above:]),
        np.ascontiguousarray(-values[: below + 1][::-1]),
        np.ascontiguousarray(-middles[:below][::-1]),
    )


def _lanes(size: int) -> Array:
    """Return room for partial sums, as many as divide the length of a group."""
    return np.empty(math.gcd(size, LOSS_LANES) if size > LOSS_LANES else size)


def _row_room(out: Array, size: int) -> tuple[Array, Array, Array]:
    """Return ``out`` (rows, d) as groups, and room for a row's codes, as a whole and as groups."""
    line = np.empty(out.shape[1], np.uint8)
    return out.reshape(-1, size), line, line.reshape(-1, size)


def _byte_table(form: NumberFormat, dtype: np.dtype[Any]) -> Array:
    # 256 entries, so that no byte reads past the end.
    table = np.full(256, np.nan, dtype)
    table[: len(form.values)] = form.values
    return table


def codebook_thresholds(table: tuple[float, ...], dtype: np.dtype[Any]) -> Array:
    """Return, for each code but the first, the smallest float that is rounded to it or above."""
    found = np.empty(len(table) - 1, dtype)
    for code in range(1, len(table)):
        middle = (Fraction(table[code - 1]) + Fraction(table[code])) / 2
        nearest = dtype.type(float(middle))
        # A tie belongs to the even code.
        while Fraction(float(nearest)) < middle or (
            code % 2 == 1 and Fraction(float(nearest)) == middle
        ):
            nearest = np.nextafter(nearest, dtype.type(np.inf))
        found[code - 1] = nearest
    return found
