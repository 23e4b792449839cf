"""Which specs one compiled loop can carry out, and the call of that loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._cpu.grids import fits_nibbles, rounder_for, rule_for, unsigned
from corequant._cpu.loops import group_passes
from corequant.formats import FormatKind
from corequant.specs import Granularity, QuantSpec, ScaleSearch

__all__ = ["NotFiniteError", "Sink", "is_fused", "plan_for", "store", "worker"]

Array = npt.NDArray[Any]


class NotFiniteError(Exception):
    """A panel holds NaN or infinity; whoever knows the whole array says where."""


@dataclass(frozen=True)
class Sink:
    """Where a pass writes: rounded numbers, codes, packed codes (rows, bytes), or nowhere."""

    out: Array | None = None
    codes: Array | None = None
    packed: Array | None = None


def is_fused(spec: QuantSpec) -> bool:
    """Tell whether one loop does range, scale and rounding of this spec's groups."""
    return (
        spec.scale_search is ScaleSearch.ABSMAX
        and spec.granularity is not Granularity.TENSOR
        and spec.format.kind in (FormatKind.INTEGER, FormatKind.FLOAT)
    )


def plan_for(
    spec: QuantSpec, dtype: np.dtype[Any], size: int, divisor: Array | None
) -> group_passes.Plan:
    """Return the loop's constants."""
    f, u, form = dtype.type, unsigned(dtype).type, spec.format
    whole = form.kind is FormatKind.INTEGER
    rule = rule_for(spec, dtype)
    return group_passes.Plan(
        size=size,
        bits=form.bits,
        rule=rule,
        mask=u(np.iinfo(u).max >> 1),
        infinity=f(np.inf),
        positive=form.minimum >= 0,
        factor=f(1) if divisor is None else f(divisor[0]),
        divisor=f(1) if divisor is None else f(divisor[0]),
        unit=f(2.0**-form.fraction_bits),
        rounder=rule.rounder if whole else rounder_for(form, dtype),
    )


def worker(
    spec: QuantSpec,
    plan: group_passes.Plan,
    scales: Array,
    zeros: Array,
    sink: Sink,
) -> Callable[[Array, slice, slice], None]:
    """Return what to do with each panel (rows, d)."""
    whole = spec.format.kind is FormatKind.INTEGER
    centred = spec.symmetric and not plan.positive
    grid = group_passes.fake_symmetric if centred else group_passes.fake_affine
    fake = grid if whole else group_passes.fake_minifloats
    encode = group_passes.encode_integers if whole else group_passes.encode_minifloats
    nothing = np.empty((0, 0), np.uint8)

    def work(panel: Array, rows: slice, groups: slice) -> None:
        d = panel.shape[1]
        own = scales[groups], zeros[groups]
        if sink.out is not None:
            target = sink.out.reshape(-1, d)[rows]
            direct = target.dtype == panel.dtype and target.flags.c_contiguous
            rounded = target if direct else np.empty_like(panel)
            bad = fake(panel, plan, *own, rounded)
            if not direct:
                store(rounded, target)
        elif sink.codes is not None:
            bad = encode(panel, plan, *own, sink.codes.reshape(-1, d)[rows], nothing, False)
        elif sink.packed is not None:
            if fits_nibbles(spec.format, panel.dtype, plan.size, d):
                bad = group_passes.encode_nibbles(panel, plan, *own, sink.packed[rows])
            else:
                line = np.empty((1, d), np.uint8)
                bad = encode(panel, plan, *own, line, sink.packed[rows], True)
        else:
            bad = group_passes.scales_only(panel, plan, *own)
        if bad >= 0:
            raise NotFiniteError

    return work


def store(rounded: Array, target: Array) -> None:
    """Write float32 to a narrower dtype; what its range lacks becomes its largest number."""
    if target.dtype.itemsize == 2:
        top = np.float32(65504 if target.dtype.kind == "f" else 3.3895313892515355e38)
        np.clip(rounded, -top, top, out=rounded, where=np.isfinite(rounded))
    target[...] = rounded.reshape(target.shape)
