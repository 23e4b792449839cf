"""Quantization of NumPy arrays: panels of rows through the compiled loops, in parallel.

A panel fits the second-level cache, so that the passes over it (range, scale, rounding) read
memory once; it also is the only copy that strided arrays and other dtypes need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._grids import grid_for, rule_for
from corequant._scales import choose, effective, global_scale_for, ranges
from corequant._threads import for_rows
from corequant._validation import check_finite
from corequant.formats import FormatKind, NumberFormat
from corequant.specs import Granularity, QuantSpec, ScaleSearch, qparams_shape

__all__ = [
    "choose_global_scale",
    "choose_qparams",
    "dequantize",
    "encode",
    "fake_quantize",
    "quantize",
]

Array = npt.NDArray[Any]

_PANEL = 1 << 16
"""Entries of a panel: 256 KiB of float32."""


class _NotFiniteError(Exception):
    """A panel holds NaN or infinity; whoever knows the whole array says where."""


@dataclass(frozen=True)
class Sink:
    """Where a pass writes: rounded numbers, codes, or whatever takes a panel's codes."""

    out: Array | None = None
    codes: Array | None = None
    take: Callable[[Array, slice], None] | None = None


def encode(x: Array, form: NumberFormat) -> Array:
    """Return the codes nearest to ``x``, which is finite, without any scale."""
    codes = np.empty(x.shape, form.code_dtype)
    if not x.size:
        return codes
    dtype, target = _working_dtype(x), _rows(codes)
    if form.kind is FormatKind.POWER:
        return _encode_powers(x.astype(np.float64), form)
    one, none, grid = np.ones(1, dtype), np.zeros(1, dtype), grid_for(form, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        grid.encode(panel.reshape(1, -1), one, none, target[rows].reshape(1, -1))

    _each_panel(x, x.shape[-1], dtype, work)
    return codes


def _encode_powers(x: Array, form: NumberFormat) -> Array:
    """Return the nearest powers of two; half-way up, as ml_dtypes rounds them."""
    mantissa, exponent = np.frexp(x)
    codes = exponent - 1 + (mantissa >= 0.75) + form.bias
    # What is zero or negative is nearest to the smallest power.
    codes = np.where(x > 0, np.clip(codes, 0, form.magnitudes - 1), 0)
    return codes.astype(form.code_dtype)


def choose_global_scale(x: Array, spec: QuantSpec, *, skip: bool = False) -> Array:
    """Return the divisor of all scales of a tensor, float32 (1,)."""
    low, high = _row_ranges(x, spec, skip)
    return global_scale_for(max(float(-low.min(initial=0)), float(high.max(initial=0))), spec)


def choose_qparams(
    x: Array, spec: QuantSpec, global_scale: Array | None = None
) -> tuple[Array, Array | None]:
    """Return scales and zero points, shaped as ``qparams_shape`` says."""
    return _choose_and_write(x, spec, global_scale, Sink())


def quantize(
    x: Array,
    spec: QuantSpec,
    scales: Array | None,
    zero_points: Array | None,
    global_scale: Array | None,
    take: Callable[[Array, slice], None] | None = None,
) -> tuple[Array | None, Array, Array | None]:
    """Return codes, scales and zero points; those given are used, others chosen on the way.

    ``take(codes, rows)``, where given, gets the codes of each panel instead.
    """
    codes = np.empty(x.shape, spec.format.code_dtype) if take is None else None
    sink = Sink(codes=codes, take=take)
    if scales is None:
        scales, zero_points = _choose_and_write(x, spec, global_scale, sink)
    else:
        _write_given(x, spec, scales, zero_points, global_scale, sink)
    return codes, scales, zero_points


def dequantize(
    codes: Array,
    spec: QuantSpec,
    scales: Array,
    zero_points: Array | None,
    global_scale: Array | None,
) -> Array:
    """Return the numbers that codes stand for, in the dtype of the scales."""
    dtype = scales.dtype.newbyteorder("=")
    out = np.empty(codes.shape, dtype)
    if not codes.size:
        return out
    size, target = _size(codes.shape, spec), _rows(out)
    flat, zeros = _flat(scales, zero_points, dtype, len(target) * (target.shape[1] // size))
    steps, grid = effective(flat, global_scale), grid_for(spec.format, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        grid.decode(panel, steps[groups], zeros[groups], target[rows].reshape(-1, size))

    _each_panel(codes, size, spec.format.code_dtype, work)
    return out


def fake_quantize(
    x: Array,
    spec: QuantSpec,
    global_scale: Array | None = None,
    out: Array | None = None,
    *,
    propagate: bool = False,
) -> Array:
    """Return ``x`` rounded to the grid that it chooses for itself, in x's dtype."""
    result = np.empty(x.shape, x.dtype) if out is None else out
    if result.size and not np.shares_memory(target := _rows(result), result):
        # Axes that can't be joined: write to a copy.
        _choose_and_write(x, spec, global_scale, Sink(out=target), propagate)
        result[...] = target.reshape(result.shape)
    else:
        _choose_and_write(x, spec, global_scale, Sink(out=result), propagate)
    return result


def _choose_and_write(
    x: Array, spec: QuantSpec, global_scale: Array | None, sink: Sink, propagate: bool = False
) -> tuple[Array, Array | None]:
    dtype, shape = _working_dtype(x), qparams_shape(x.shape, spec)
    count = int(np.prod(shape))
    scales, zeros = np.full(count, rule_for(spec, dtype).idle), np.zeros(count, dtype)
    if x.size and spec.granularity is Granularity.TENSOR:
        _choose_whole(x, spec, scales, zeros, propagate)
        qparams = scales.reshape(shape), _stored(zeros, spec, shape)
        _write_given(x, spec, *qparams, None, sink, propagate)
        return qparams
    if x.size:
        divisor = global_scale
        if spec.granularity is Granularity.TENSOR_GROUP and divisor is None:
            divisor = choose_global_scale(x, spec, skip=propagate)

        def work(panel: Array, rows: slice, groups: slice) -> None:
            low, high = ranges(panel, spec.symmetric and spec.format.minimum < 0, propagate)
            if not propagate and not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise _NotFiniteError
            choose(panel, low, high, spec, divisor, scales[groups], zeros[groups], propagate)
            steps = effective(scales[groups], divisor)
            _write(spec.format, panel, steps, zeros[groups], rows, sink, propagate)

        _checked(x, _size(x.shape, spec), dtype, work)
    return scales.reshape(shape), _stored(zeros, spec, shape)


def _choose_whole(
    x: Array, spec: QuantSpec, scales: Array, zeros: Array, propagate: bool
) -> None:
    low, high = (r.reshape(1) for r in _row_extremes(x, spec, propagate))
    panel = np.empty((1, 0), scales.dtype)
    if spec.scale_search is not ScaleSearch.ABSMAX:
        panel = np.ascontiguousarray(x, scales.dtype).reshape(1, -1)
    choose(panel, low, high, spec, None, scales, zeros, propagate)


def _write_given(
    x: Array,
    spec: QuantSpec,
    scales: Array,
    zero_points: Array | None,
    global_scale: Array | None,
    sink: Sink,
    propagate: bool = False,
) -> None:
    if not x.size:
        return
    dtype, size = _working_dtype(x), _size(x.shape, spec)
    flat, zeros = _flat(scales, zero_points, dtype, x.size // size)
    steps = effective(flat, global_scale)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        if not propagate and not np.isfinite(ranges(panel, True, False)[1]).all():
            raise _NotFiniteError
        _write(spec.format, panel, steps[groups], zeros[groups], rows, sink, propagate)

    _checked(x, size, dtype, work)


def _write(
    form: NumberFormat,
    panel: Array,
    steps: Array,
    zeros: Array,
    rows: slice,
    sink: Sink,
    propagate: bool,
) -> None:
    grid = grid_for(form, panel.dtype)
    if sink.codes is not None:
        codes = sink.codes.reshape(-1, sink.codes.shape[-1])
        grid.encode(panel, steps, zeros, codes[rows].reshape(panel.shape))
    if sink.take is not None:
        scratch = np.empty(panel.shape, form.code_dtype)
        grid.encode(panel, steps, zeros, scratch)
        sink.take(scratch, rows)
    if sink.out is not None:
        target = _rows(sink.out)[rows]
        if propagate:
            keep = ~np.isfinite(panel)
            rounded = np.empty(panel.shape, panel.dtype)
            grid.fake(np.where(keep, 0, panel), steps, zeros, rounded)
            rounded[keep] = panel[keep]
            _store(rounded, target)
        elif target.dtype == panel.dtype and target.flags.c_contiguous:
            grid.fake(panel, steps, zeros, target.reshape(panel.shape))
        else:
            rounded = np.empty(panel.shape, panel.dtype)
            grid.fake(panel, steps, zeros, rounded)
            _store(rounded, target)


def _store(rounded: Array, target: Array) -> None:
    """Write float32 to a narrower dtype; what its range lacks becomes its largest number."""
    if target.dtype.itemsize == 2:
        top = np.float32(65504 if target.dtype.kind == "f" else 3.3895313892515355e38)
        finite = np.isfinite(rounded)
        np.clip(rounded, -top, top, out=rounded, where=finite)
    target[...] = rounded.reshape(target.shape)


def _row_ranges(x: Array, spec: QuantSpec, skip: bool) -> tuple[Array, Array]:
    """Return the ranges of the rows of ``x``, NonFiniteError unless what isn't finite is skipped."""
    dtype = _working_dtype(x)
    count = x.size // x.shape[-1] if x.size else 0
    low, high = np.zeros(count, dtype), np.zeros(count, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        low[rows], high[rows] = ranges(panel, spec.symmetric and spec.format.minimum < 0, skip)
        if not (np.isfinite(low[rows]).all() and np.isfinite(high[rows]).all()):
            raise _NotFiniteError

    if x.size:
        _checked(x, x.shape[-1], dtype, work)
    return low, high


def _row_extremes(x: Array, spec: QuantSpec, skip: bool) -> tuple[Array, Array]:
    low, high = _row_ranges(x, spec, skip)
    return low.min(), high.max()


def _checked(
    x: Array, size: int, dtype: np.dtype[Any], work: Callable[[Array, slice, slice], None]
) -> None:
    try:
        _each_panel(x, size, dtype, work)
    except _NotFiniteError:
        check_finite("x", x)


def _each_panel(
    x: Array, size: int, dtype: np.dtype[Any], work: Callable[[Array, slice, slice], None]
) -> None:
    """Call ``work(panel, rows, groups)`` for panels (groups, size) of the rows of ``x``."""
    rows = x.reshape(-1, x.shape[-1])
    d = rows.shape[1]
    step, ratio = max(1, _PANEL // d), d // size

    def run(first: int, last: int) -> None:
        for start in range(first, last, step):
            stop = min(start + step, last)
            panel = np.ascontiguousarray(rows[start:stop], dtype).reshape(-1, size)
            work(panel, slice(start, stop), slice(start * ratio, stop * ratio))

    for_rows(len(rows), d, run)


def _size(shape: tuple[int, ...], spec: QuantSpec) -> int:
    return spec.group_size or shape[-1]


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _working_dtype(x: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if x.dtype.itemsize == 8 else np.float32)


def _flat(
    scales: Array, zero_points: Array | None, dtype: np.dtype[Any], count: int
) -> tuple[Array, Array]:
    """Return scales and zero points as vectors of ``count``, the tensor's one repeated."""
    flat = np.ascontiguousarray(scales, dtype=dtype).reshape(-1)
    zeros = np.zeros_like(flat)
    if zero_points is not None:
        zeros = np.ascontiguousarray(zero_points, dtype=dtype).reshape(-1)
    if len(flat) != count:
        flat, zeros = np.repeat(flat, count), np.repeat(zeros, count)
    return flat, zeros


def _stored(zeros: Array, spec: QuantSpec, shape: tuple[int, ...]) -> Array | None:
    return None if spec.symmetric else zeros.astype(spec.format.code_dtype).reshape(shape)
