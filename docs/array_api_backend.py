"""A backend outside corequant: its kernels for the arrays of array-api-strict.

Everything is written in functions of the array API standard, so that another namespace needs little
more than another import. ``third-party-backends.md`` tells how it is registered and checked.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_strict as xp
import numpy as np

from corequant.errors import BackendError, NonFiniteError
from corequant.formats import FormatKind, NumberFormat, find_format
from corequant.hadamard import hadamard_matrix
from corequant.specs import (
    Granularity,
    QuantSpec,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
    qparams_shape,
)

__all__ = ["ArrayApiBackend"]

_WHOLE = FormatKind.INTEGER


class ArrayApiBackend:
    """Kernels in array API functions; scales by the largest magnitude only."""

    name = "array_api_strict"

    def from_numpy(self, array: Any) -> Any:
        """Return an array of this namespace."""
        return xp.asarray(np.ascontiguousarray(array))

    def to_numpy(self, x: Any) -> Any:
        """Return a NumPy array."""
        return np.array(x)

    def describe(self) -> dict[str, str]:
        """Return the standard's version."""
        return {"array API": xp.__array_api_version__}

    def first_nonfinite(self, x: Any) -> tuple[int, tuple[int, ...], float] | None:
        """Return count, first index and value of NaN and Inf in ``x``, or None."""
        bad = xp.reshape(~xp.isfinite(x), (-1,))
        count = int(xp.count_nonzero(bad))
        if not count:
            return None
        first = int(xp.argmax(xp.astype(bad, xp.int8)))
        index = tuple(int(i) for i in np.unravel_index(first, x.shape))
        return count, index, float(x[index])

    def block_hadamard(
        self,
        x: Any,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: Any,
        out: Any,
        threads: int | None,
    ) -> Any:
        """Multiply blocks by the matrix in float64 and round once."""
        matrix = xp.astype(xp.asarray(hadamard_matrix(block_size)), xp.float64)
        y = xp.moveaxis(xp.astype(x, xp.float64), axis, -1)
        shape = y.shape
        sign = 1.0 if signs is None else xp.asarray(signs.astype(np.float64))
        if not inverse:
            y = y * sign
        right = xp.matrix_transpose(matrix) if inverse else matrix
        y = xp.reshape(xp.reshape(y, (-1, block_size)) @ right, shape) / math.sqrt(block_size)
        if inverse:
            y = y * sign
        y = xp.astype(xp.moveaxis(y, -1, axis), x.dtype)
        if out is None:
            return y
        out[...] = y
        return out

    def rotate_quantize(self, *arguments: Any, **options: Any) -> None:
        """Leave it to the separate steps."""

    def rotate_fake_quantize(self, *arguments: Any, **options: Any) -> None:
        """Leave it to the separate steps."""

    def token_normalize(self, x: Any) -> Any:
        """Return rows scaled to mean square 1; rows of zeros stay."""
        rows = xp.reshape(x, (-1, x.shape[-1]))
        largest = xp.max(xp.abs(rows), axis=-1, keepdims=True)
        rows = rows / xp.where(largest > 0, largest, xp.ones_like(largest))
        root = xp.sqrt(xp.mean(xp.square(rows), axis=-1, keepdims=True))
        return rows / xp.where(root > 0, root, xp.ones_like(root))

    def moments(self, x: Any) -> tuple[Any, Any, Any]:
        """Return float64 sums of |x| and x² and the largest |x| of each channel."""
        size = xp.reshape(xp.abs(xp.astype(x, xp.float64)), (-1, x.shape[-1]))
        sums = xp.sum(size, axis=0), xp.sum(xp.square(size), axis=0), xp.max(size, axis=0)
        a, b, c = (self.to_numpy(s) for s in sums)
        return a, b, c

    def add_gram(self, total: Any, x: Any, other: Any = None, *, double: bool = False) -> Any:
        """Return ``total`` + XᵀY, a NumPy array."""
        left, right = (xp.reshape(a, (-1, a.shape[-1])) for a in (x, x if other is None else other))
        if double:
            left, right = xp.astype(left, xp.float64), xp.astype(right, xp.float64)
        product = self.to_numpy(xp.matrix_transpose(left) @ right)
        if total is None:
            return product
        total += product
        return total

    def encode(self, x: Any, form: NumberFormat) -> Any:
        """Return the codes nearest to ``x``, ties to the even code."""
        v = xp.astype(x, xp.float64)
        if form.kind is _WHOLE:
            v = xp.round(v / float(form.values[1]))
            kind = xp.int8 if form.signed else xp.uint8
            return xp.astype(xp.clip(v, form.least_code, form.most_code), kind)
        if form.kind is FormatKind.CODEBOOK:
            return xp.astype(_nearest(v, np.asarray(form.table)), xp.uint8)
        magnitudes = form.values[: form.magnitudes]
        if form.kind is FormatKind.POWER:
            # Powers of two have no zero and no sign; half-way goes up.
            middles = xp.asarray(magnitudes[1:] * 0.75)
            return xp.astype(xp.searchsorted(middles, v, side="right"), xp.uint8)
        code = _nearest(xp.abs(v), magnitudes)
        bit = 1 << (form.bits - 1)
        negative = xp.signbit(v)
        if np.isnan(form.values[bit]):
            # What would be -0.0 stands for NaN.
            negative = negative & (code > 0)
        return xp.astype(code + xp.astype(negative, code.dtype) * bit, xp.uint8)

    def decode(self, codes: Any, form: NumberFormat) -> Any:
        """Return what codes stand for, float32."""
        with np.errstate(over="ignore"):
            table = xp.asarray(form.values.astype(np.float32))
        places = xp.astype(codes, xp.int64) & ((1 << form.bits) - 1)
        return xp.reshape(xp.take(table, xp.reshape(places, (-1,))), codes.shape)

    def choose_global_scale(self, x: Any, spec: QuantSpec) -> Any:
        """Return the divisor with which the largest scale is E4M3's largest number."""
        self._check(x, spec)
        largest = xp.astype(xp.max(xp.abs(x)), xp.float32)
        if not bool(largest):
            return xp.ones(1, dtype=xp.float32)
        top = xp.asarray(448.0 * spec.format.maximum, dtype=xp.float32)
        return xp.reshape(xp.clip(top / largest, 2.0**-126, 2.0**127), (1,))

    def choose_qparams(self, x: Any, spec: QuantSpec, global_scale: Any = None) -> tuple[Any, Any]:
        """Return scales and zero points."""
        self._check(x, spec)
        panel, shape = _groups(x, spec), qparams_shape(x.shape, spec)
        low = xp.clip(xp.min(panel, axis=1), max=0.0)
        high = xp.clip(xp.max(panel, axis=1), min=0.0)
        largest = xp.maximum(-low, high)
        form, info = spec.format, xp.finfo(panel.dtype)
        ones = xp.ones_like(largest)
        if spec.scale_format is ScaleFormat.E8M0:
            scales = _power_scale(largest, spec)
            return xp.reshape(xp.where(largest == 0, ones * 2.0**-127, scales), shape), None
        extreme = max(-form.minimum, form.maximum)
        if form.kind is _WHOLE:
            halves = 2.0 if form.signed or not spec.symmetric else 1.0
            steps = (form.most_code - form.least_code) / halves * float(form.values[1])
        else:
            steps = extreme
        tiny, room = info.smallest_normal * info.eps, info.max * (1 - 2.0**-20)
        if spec.symmetric:
            scales = largest / steps
            if spec.scale_format is ScaleFormat.E4M3:
                factor = 1.0 if global_scale is None else xp.astype(global_scale[0], scales.dtype)
                e4m3 = find_format("float8_e4m3fn")
                codes = self.encode(xp.clip(scales * factor, max=448.0), e4m3)
                scales = xp.astype(self.decode(codes, e4m3), scales.dtype)
                tiny, room = 2.0**-9, math.inf
            scales = xp.clip(xp.clip(scales, max=room / extreme), min=tiny)
            return xp.reshape(xp.where(largest == 0, ones, scales), shape), None
        least, most = float(form.least_code), float(form.most_code)
        scales = xp.clip((high * 0.5 - low * 0.5) / steps, min=tiny)
        zeros = xp.clip(xp.round(least - low / scales), least, most)
        widest = xp.maximum(zeros - least, most - zeros)
        scales = xp.where(largest == 0, ones, xp.minimum(scales, ones * room / widest))
        zeros = xp.where(largest == 0, xp.zeros_like(zeros), zeros)
        kind = xp.int8 if form.signed else xp.uint8
        return xp.reshape(scales, shape), xp.reshape(xp.astype(zeros, kind), shape)

    def quantize(
        self,
        x: Any,
        spec: QuantSpec,
        scales: Any = None,
        zero_points: Any = None,
        global_scale: Any = None,
    ) -> tuple[Any, Any, Any]:
        """Return codes of ``x``, scales and zero points."""
        if scales is None:
            if spec.granularity is Granularity.TENSOR_GROUP and global_scale is None:
                global_scale = self.choose_global_scale(x, spec)
            scales, zero_points = self.choose_qparams(x, spec, global_scale)
        self._check(x, spec)
        panel = _groups(x, spec)
        steps, zeros = _columns(panel, scales, zero_points, global_scale)
        if spec.format.kind is _WHOLE:
            form = spec.format
            codes = xp.round(panel / (steps * float(form.values[1]))) + zeros
            kind = xp.int8 if form.signed else xp.uint8
            codes = xp.astype(xp.clip(codes, form.least_code, form.most_code), kind)
        else:
            codes = self.encode(panel / steps, spec.format)
        return xp.reshape(codes, x.shape), scales, zero_points

    def dequantize(
        self,
        codes: Any,
        spec: QuantSpec,
        scales: Any,
        zero_points: Any = None,
        global_scale: Any = None,
    ) -> Any:
        """Return what codes stand for, in the dtype of the scales."""
        form, panel = spec.format, _groups(codes, spec)
        steps, zeros = _columns(xp.astype(panel, scales.dtype), scales, zero_points, global_scale)
        if form.kind is _WHOLE:
            unit = float(form.values[1])
            values = (xp.astype(panel, scales.dtype) - zeros) * (steps * unit)
        else:
            values = xp.astype(self.decode(panel, form), scales.dtype) * steps
        return xp.reshape(values, codes.shape)

    def fake_quantize(
        self,
        x: Any,
        spec: QuantSpec,
        global_scale: Any = None,
        *,
        out: Any = None,
        propagate: bool = False,
    ) -> Any:
        """Return ``x`` rounded to the grid that it chooses for itself."""
        good = xp.isfinite(x)
        given = xp.where(good, x, xp.zeros_like(x)) if propagate else x
        if spec.granularity is Granularity.TENSOR_GROUP and global_scale is None:
            global_scale = self.choose_global_scale(given, spec)
        quantized = self.quantize(given, spec, global_scale=global_scale)
        values = self.dequantize(quantized[0], spec, *quantized[1:], global_scale)
        y = xp.where(good, xp.astype(values, x.dtype), x)
        if out is None:
            return y
        out[...] = y
        return out

    def _check(self, x: Any, spec: QuantSpec) -> None:
        bad = self.first_nonfinite(x)
        if bad is not None:
            raise NonFiniteError("x", *bad)
        half = spec.scale_format in (ScaleFormat.FLOAT16, ScaleFormat.BFLOAT16)
        if spec.scale_search is not ScaleSearch.ABSMAX or half:
            raise BackendError(
                f"{self.name} has absmax scales in float32, E8M0 or E4M3, got {spec}"
            )


def _nearest(v: Any, numbers: Any) -> Any:
    """Return indices of the nearest of ascending numbers; of two as near the even index."""
    # The middles of a format's numbers are exact in float64.
    middles = xp.asarray((numbers[1:] + numbers[:-1]) / 2)
    below = xp.searchsorted(middles, v, side="left")
    above = xp.searchsorted(middles, v, side="right")
    return xp.where(below % 2 == 0, below, above)


def _power_scale(largest: Any, spec: QuantSpec) -> Any:
    """Return OCP's powers of two: the exponent of the largest magnitude less the format's own."""
    exponents = np.arange(-1074, 1024)
    with np.errstate(under="ignore"):
        powers = np.ldexp(1.0, exponents)
    form = spec.format
    # Magnitudes from here on get the next exponent.
    turn = {
        ScaleRounding.CEIL: math.nextafter(math.frexp(form.maximum)[0] * 2, 3),
        ScaleRounding.EVEN: 2 - 2.0 ** -(form.mantissa_bits + 1),
    }.get(spec.scale_rounding or ScaleRounding.FLOOR, 2.0)
    v = xp.astype(largest, xp.float64)
    place = xp.searchsorted(xp.asarray(powers), v, side="right") - 1
    place = xp.where(place < 0, xp.zeros_like(place), place)
    base = xp.take(xp.asarray(powers), place)
    exponent = xp.take(xp.asarray(exponents), place) + xp.astype(v / base >= turn, xp.int64)
    exponent = xp.clip(exponent - form.max_exponent, -127, 127)
    return xp.astype(xp.take(xp.asarray(powers), exponent + 1074), largest.dtype)


def _groups(x: Any, spec: QuantSpec) -> Any:
    size = math.prod(x.shape) if spec.granularity is Granularity.TENSOR else x.shape[-1]
    return xp.reshape(x, (-1, spec.group_size or size))


def _columns(panel: Any, scales: Any, zeros: Any, divisor: Any) -> tuple[Any, Any]:
    """Return steps and zero points (groups, 1) in the panel's dtype."""
    steps = xp.reshape(xp.astype(scales, panel.dtype), (-1, 1))
    if divisor is not None:
        steps = steps / xp.astype(divisor, panel.dtype)
    if zeros is None:
        return steps, xp.zeros_like(steps)
    return steps, xp.reshape(xp.astype(zeros, panel.dtype), (-1, 1))
