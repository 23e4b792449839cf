"""Quantization of NumPy arrays: panels of rows through the compiled loops, in parallel.

A panel fits the second-level cache, so that the passes over it (range, scale, rounding) read
memory once; it also is the only copy that strided arrays and other dtypes need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.grids import fits_nibbles, grid_for, rounder_for, rule_for, unsigned
from corequant._cpu.loops import group_passes, packing
from corequant._cpu.scales import choose, effective, global_scale_for, ranges
from corequant._cpu.threads import for_rows
from corequant._validation import check_finite, working_dtype
from corequant.formats import FormatKind, NumberFormat
from corequant.specs import Granularity, QuantSpec, ScaleSearch

__all__ = [
    "choose_global_scale",
    "choose_qparams",
    "dequantize",
    "each_panel",
    "encode",
    "fake_quantize",
    "flat_qparams",
    "quantize",
    "quantize_packed",
]

Array = npt.NDArray[Any]

_PANEL = 1 << 16
"""Entries of a panel: 256 KiB of float32."""


class _NotFiniteError(Exception):
    """A panel holds NaN or infinity; the caller, which has the whole array, reports where."""


@dataclass(frozen=True)
class _Sink:
    """Where a pass writes: rounded numbers, codes, packed codes (rows, bytes), or nowhere."""

    out: Array | None = None
    codes: Array | None = None
    packed: Array | None = None

    @property
    def writes(self) -> bool:
        """Whether more is wanted than scales and zero points."""
        return not (self.out is None and self.codes is None and self.packed is None)


def encode(x: Array, form: NumberFormat) -> Array:
    """Return the codes nearest to ``x``, which is finite, without any scale."""
    codes = np.empty(x.shape, form.code_dtype)
    if not x.size:
        return codes
    dtype, target = working_dtype(x), _rows(codes)
    if form.kind is FormatKind.POWER:
        return _encode_powers(x.astype(np.float64), form)
    one, none, grid = np.ones(1, dtype), np.zeros(1, dtype), grid_for(form, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        grid.encode(panel.reshape(1, -1), one, none, target[rows].reshape(1, -1))

    each_panel(x, x.shape[-1], dtype, work)
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
    return _choose_and_write(x, spec, global_scale, _Sink())


def quantize(
    x: Array,
    spec: QuantSpec,
    scales: Array | None,
    zero_points: Array | None,
    global_scale: Array | None,
) -> tuple[Array, Array, Array | None]:
    """Return codes, scales and zero points; those given are used, others chosen on the way."""
    codes = np.empty(x.shape, spec.format.code_dtype)
    sink = _Sink(codes=codes)
    if scales is None:
        scales, zero_points = _choose_and_write(x, spec, global_scale, sink)
    else:
        if zero_points is not None:
            zero_points = zero_points.astype(codes.dtype, copy=False)
        _write_given(x, spec, scales, zero_points, global_scale, sink)
    return codes, scales, zero_points


def quantize_packed(
    x: Array, spec: QuantSpec, global_scale: Array | None, packed: Array
) -> tuple[Array, Array | None]:
    """Write packed codes (rows, bytes) and return scales and zero points."""
    return _choose_and_write(x, spec, global_scale, _Sink(packed=packed))


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
    flat, zeros = flat_qparams(scales, zero_points, dtype, len(target) * (target.shape[1] // size))
    steps, grid = effective(flat, global_scale), grid_for(spec.format, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        grid.decode(panel, steps[groups], zeros[groups], target[rows].reshape(-1, size))

    each_panel(codes, size, spec.format.code_dtype, work)
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
        _choose_and_write(x, spec, global_scale, _Sink(out=target), propagate)
        result[...] = target.reshape(result.shape)
    else:
        _choose_and_write(x, spec, global_scale, _Sink(out=result), propagate)
    return result


def _choose_and_write(
    x: Array, spec: QuantSpec, global_scale: Array | None, sink: _Sink, propagate: bool = False
) -> tuple[Array, Array | None]:
    dtype, group = working_dtype(x), spec.group_size
    # As ``qparams_shape`` has it.
    shape = (*x.shape[:-1], 1 if group is None else x.shape[-1] // group)
    if spec.granularity is Granularity.TENSOR:
        shape = (1,) * x.ndim
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

        size = _size(x.shape, spec)
        if not propagate and _is_fused(spec) and sink.writes:
            plan = _plan_for(spec, dtype, 1.0 if divisor is None else float(divisor[0]))
            work = _worker(spec, plan, x.shape[-1] // size, scales, zeros, sink)
            _checked(x, size, dtype, work, whole=True)
            return scales.reshape(shape), _stored(zeros, spec, shape)

        def each(panel: Array, rows: slice, groups: slice) -> None:
            low, high = ranges(panel, spec.symmetric and spec.format.minimum < 0, propagate)
            if not propagate and not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise _NotFiniteError
            choose(panel, low, high, spec, divisor, scales[groups], zeros[groups], propagate)
            steps = effective(scales[groups], divisor)
            _write(spec.format, panel, steps, zeros[groups], rows, sink, propagate)

        # Scales alone take one pass, which needs no panels.
        single = spec.scale_search is ScaleSearch.ABSMAX and not sink.writes
        _checked(x, size, dtype, each, whole=single)
    return scales.reshape(shape), _stored(zeros, spec, shape)


def _choose_whole(x: Array, spec: QuantSpec, scales: Array, zeros: Array, propagate: bool) -> None:
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
    sink: _Sink,
    propagate: bool = False,
) -> None:
    if not x.size:
        return
    dtype, size = working_dtype(x), _size(x.shape, spec)
    flat, zeros = flat_qparams(scales, zero_points, dtype, x.size // size)
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
    sink: _Sink,
    propagate: bool,
) -> None:
    grid = grid_for(form, panel.dtype)
    if sink.codes is not None:
        codes = sink.codes.reshape(-1, sink.codes.shape[-1])
        grid.encode(panel, steps, zeros, codes[rows].reshape(panel.shape))
    if sink.packed is not None:
        scratch = np.empty(panel.shape, form.code_dtype)
        grid.encode(panel, steps, zeros, scratch)
        offset = (scratch.astype(np.int16) - np.int16(form.least_code)).astype(np.uint8)
        lines = offset.reshape(rows.stop - rows.start, -1)
        packing.pack_rows(lines, form.bits, sink.packed[rows])
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


def _row_ranges(x: Array, spec: QuantSpec, skip: bool) -> tuple[Array, Array]:
    """Return the ranges of the rows; NonFiniteError unless what isn't finite is skipped."""
    dtype = working_dtype(x)
    count = x.size // x.shape[-1] if x.size else 0
    low, high = np.zeros(count, dtype), np.zeros(count, dtype)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        low[rows], high[rows] = ranges(panel, spec.symmetric and spec.format.minimum < 0, skip)
        if not (np.isfinite(low[rows]).all() and np.isfinite(high[rows]).all()):
            raise _NotFiniteError

    if x.size:
        _checked(x, x.shape[-1], dtype, work, whole=not skip)
    return low, high


def _row_extremes(x: Array, spec: QuantSpec, skip: bool) -> tuple[Array, Array]:
    low, high = _row_ranges(x, spec, skip)
    return low.min(), high.max()


def _checked(
    x: Array,
    size: int,
    dtype: np.dtype[Any],
    work: Callable[[Array, slice, slice], None],
    ratio: int | None = None,
    *,
    whole: bool = False,
) -> None:
    try:
        each_panel(x, size, dtype, work, ratio, whole=whole)
    except _NotFiniteError:
        check_finite("x", x)


def each_panel(
    x: Array,
    size: int,
    dtype: np.dtype[Any],
    work: Callable[[Array, slice, slice], None],
    ratio: int | None = None,
    length: int | None = None,
    *,
    whole: bool = False,
) -> None:
    """Call ``work(panel, rows, groups)`` for panels (groups, size) of the rows of ``x``.

    ``ratio`` is the number of groups in a row, ``length`` the number of entries that it stands
    for, where the row itself doesn't tell (packed rows). Where ``whole``, rows that need no
    copy make one panel for each thread.
    """
    rows = x.reshape(-1, x.shape[-1])
    each = rows.shape[1] // size if ratio is None else ratio
    d = rows.shape[1] if length is None else length
    copied = rows.dtype != dtype or not rows.flags.c_contiguous
    step = max(1, _PANEL // d) if copied or not whole else max(1, len(rows))

    def run(first: int, last: int) -> None:
        for start in range(first, last, step):
            stop = min(start + step, last)
            panel = np.ascontiguousarray(rows[start:stop], dtype).reshape(-1, size)
            work(panel, slice(start, stop), slice(start * each, stop * each))

    for_rows(len(rows), d, run)


def _size(shape: tuple[int, ...], spec: QuantSpec) -> int:
    return spec.group_size or shape[-1]


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def flat_qparams(
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


def _is_fused(spec: QuantSpec) -> bool:
    """Return whether one loop does range, scale and rounding of this spec's groups."""
    return (
        spec.scale_search is ScaleSearch.ABSMAX
        and spec.granularity is not Granularity.TENSOR
        and spec.format.kind in (FormatKind.INTEGER, FormatKind.FLOAT)
    )


@lru_cache(maxsize=256)
def _plan_for(spec: QuantSpec, dtype: np.dtype[Any], divisor: float) -> group_passes.Plan:
    """Return the loop's constants; the divisor is that of all scales."""
    f, u, form = dtype.type, unsigned(dtype).type, spec.format
    whole = form.kind is FormatKind.INTEGER
    rule = rule_for(spec, dtype)
    return group_passes.Plan(
        bits=form.bits,
        rule=rule,
        mask=u(np.iinfo(u).max >> 1),
        infinity=f(np.inf),
        positive=form.minimum >= 0,
        factor=f(divisor),
        divisor=f(divisor),
        unit=f(2.0**-form.fraction_bits),
        rounder=None if whole else rounder_for(form, dtype),
    )


def _worker(
    spec: QuantSpec, plan: group_passes.Plan, count: int, scales: Array, zeros: Array, sink: _Sink
) -> Callable[[Array, slice, slice], None]:
    """Return what to do with each panel (groups, size), ``count`` of them in a row."""
    whole = spec.format.kind is FormatKind.INTEGER
    centred = spec.symmetric and not plan.positive
    grid = group_passes.fake_symmetric if centred else group_passes.fake_affine
    no_line, no_packed = np.empty(0, np.uint8), np.empty((0, 0), np.uint8)

    def write(panel: Array, own: tuple[Array, Array], rows: slice) -> Any:
        given = (panel, plan, *own)
        room = np.zeros((4, count), panel.dtype)
        size = panel.shape[1]
        if sink.out is not None:
            target = _rows(sink.out)[rows]
            direct = target.dtype == panel.dtype and target.flags.c_contiguous
            out = target.reshape(panel.shape) if direct else np.empty_like(panel)
            bad = grid(*given, out) if whole else group_passes.fake_minifloats(*given, out, room)
            if not direct:
                _store(out, target)
            return bad
        if sink.packed is None:
            assert sink.codes is not None  # scales alone are chosen elsewhere
            codes = _rows(sink.codes)[rows].reshape(panel.shape)
            if whole:
                return group_passes.encode_integers(*given, codes, room)
            return group_passes.encode_minifloats(*given, codes, no_line, no_packed, room)
        packed = sink.packed[rows]
        if fits_nibbles(spec.format, panel.dtype, size, count * size):
            lines = panel.reshape(len(packed), -1)
            return group_passes.encode_nibbles(lines, plan, *own, packed, room)
        line = np.empty(count * size, np.uint8)
        passes = group_passes.pack_integers if whole else group_passes.encode_minifloats
        return passes(*given, line.reshape(count, size), line, packed, room)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        if write(panel, (scales[groups], zeros[groups]), rows) >= 0:
            raise _NotFiniteError

    return work


def _store(rounded: Array, target: Array) -> None:
    """Write float32 to a narrower dtype; what its range lacks becomes its largest number."""
    if target.dtype.itemsize == 2:
        top = np.float32(65504 if target.dtype.kind == "f" else 3.3895313892515355e38)
        np.clip(rounded, -top, top, out=rounded, where=np.isfinite(rounded))
    target[...] = rounded.reshape(target.shape)
