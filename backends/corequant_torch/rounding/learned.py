"""Learned rounding on tensors of any device; the descent is that of ``corequant.rounding``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from corequant.protocols import Backend
from corequant.quantization import as_spec
from corequant.rounding.learned import Descent, Search
from corequant.rounding.loop import column_grid
from corequant.rounding.problem import RoundedTensor, RoundingReport
from corequant.specs import QuantSpec
from corequant_torch.device.grids import numpy_dtype
from corequant_torch.device.levels import TensorScales
from corequant_torch.rounding.hessian import Moments, check_matrix, values_of, working_dtype

__all__ = ["learned_rounding"]

Tensor = torch.Tensor


@torch.no_grad()
def learned_rounding(
    kernels: Backend,
    *,
    W: Any,
    H: Any,
    spec: QuantSpec | str,
    G: Any,
    objective: str,
    steps: int,
    rate: float | None,
    scales: Any,
    zero_points: Any,
    global_scale: Any,
    dtype: Any,
    tokens: Any,
    name: str,
) -> RoundedTensor:
    """Learn which neighbour each weight takes; see ``corequant.learned_rounding``."""
    W, spec = check_matrix(kernels, "W", W), as_spec(spec)
    working = working_dtype(W, dtype)
    moments = Moments.of(kernels, H, G, W.shape[1], name, tokens)
    descent = Descent.of(objective, steps, rate)
    chosen = TensorScales.choose(kernels, W, spec, scales, zero_points, global_scale)
    nearest = values_of(kernels, chosen.encode(W))
    w, curvature = W.to(working).contiguous(), moments.H.to(working)
    pull = w @ (curvature if moments.G is None else moments.G.to(working))
    start = nearest.to(working, copy=True)
    search = Search(torch, w, curvature, pull, _neighbours(w, chosen), start)
    quantized = chosen.encode(descent.run(search))
    report = RoundingReport(
        objective,
        name,
        moments.loss(W, values_of(kernels, quantized)),
        moments.loss(W, nearest),
        None,
        tuple(int(j) for j in np.flatnonzero(moments.dead)),
        shrinkage=moments.shrinkage,
    )
    return RoundedTensor.of(quantized, report)


def _neighbours(w: Tensor, scales: TensorScales) -> tuple[Tensor, Tensor]:
    """Return the numbers of the grid next to each weight, below or equal, and above or equal."""
    steps, zeros = scales.steps(len(w), w.dtype)
    steps, zeros = (a.repeat_interleave(scales.group, 1) for a in (steps, zeros))
    grid = column_grid(scales.spec.format, numpy_dtype(w.dtype))
    v = w / steps
    if not len(grid.table):
        least, most = float(grid.least), float(grid.most)
        low, high = ((f(v) + zeros).clamp(least, most) for f in (torch.floor, torch.ceil))
        return (low - zeros) * steps, (high - zeros) * steps
    table = torch.from_numpy(grid.table).to(w.device)
    last = len(table) - 1
    below = (torch.searchsorted(table, v, right=True) - 1).clamp(0, last)
    above = torch.searchsorted(table, v).clamp(0, last)
    return table[below] * steps, table[above] * steps
