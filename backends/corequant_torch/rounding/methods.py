"""GPTQ, GPFQ and Qronos on tensors of any device; only a few vectors leave it.

The methods, their notation and their errors are those of ``corequant.rounding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corequant.protocols import Backend
from corequant.quantization import QuantizedTensor, as_spec
from corequant.rounding import hessian
from corequant.rounding.hessian import Damping
from corequant.rounding.problem import ColumnOptions, RoundedTensor, RoundingReport, check_damping
from corequant.specs import QuantSpec
from corequant_torch.device.levels import TensorScales
from corequant_torch.rounding.bounds import Tiles
from corequant_torch.rounding.hessian import (
    Moments,
    check_matrix,
    damped_factor,
    largest_eigenvalue,
    values_of,
    working_dtype,
)
from corequant_torch.rounding.loop import ColumnLoop, Pull

__all__ = ["reconstruction_loss", "round_columns", "round_to_nearest"]

Tensor = torch.Tensor

_ROWS = 512


@dataclass(frozen=True, eq=False)
class _Problem:
    """A weight, the moments of its inputs and how to round it, all on one device."""

    kernels: Backend
    W: Tensor
    moments: Moments
    losses: bool
    loop: ColumnLoop
    order: Tensor

    @property
    def ordered(self) -> Tensor:
        """W in the working dtype, its columns in the loop's order."""
        return self.W[:, self.order].to(self.loop.dtype)

    @property
    def cross(self) -> Tensor:
        """G, which the method was checked to have."""
        assert self.moments.G is not None
        return self.moments.G

    def factor(self, value: float) -> tuple[Tensor, Damping]:
        return damped_factor(self.moments, self.order, value, self.loop.dtype, self.loop.name)

    def solve(
        self, method: str, values: Tensor, centers: Tensor, pull: Pull, damping: Damping | None
    ) -> RoundedTensor:
        """Run the column loop and report on it."""
        quantized, share = self.loop.run(values, centers, pull)
        loss = nearest = None
        if self.losses:
            plain = _nearest(self.kernels, self.W, self.loop.scales.spec)
            loss, nearest = (
                self.moments.loss(self.W, values_of(self.kernels, q)) for q in (quantized, plain)
            )
        dead = tuple(int(j) for j in np.flatnonzero(self.moments.dead))
        name = self.loop.name
        added = self.moments.shrinkage
        report = RoundingReport(method, name, loss, nearest, damping, dead, share, added)
        return RoundedTensor.of(quantized, report)

    def factored_pull(self, L: Tensor, echo: Tensor | None = None) -> Pull:
        """Return the sums of ``H = L Lᵀ``: D times the rows of L rounded before."""

        def pull(start: int, stop: int, errors: Tensor, values: Tensor) -> Any:
            sums = errors[:, stop:] @ L[stop:, start:stop]
            block = L[start:stop, start:stop].contiguous()
            if echo is None:
                return sums, block, None
            sums += values[:, stop:] @ echo[stop:, start:stop]
            return sums, block, echo[start:stop, start:stop].contiguous()

        return pull


@torch.no_grad()
def round_columns(
    kernels: Backend,
    triton: bool,
    method: str,
    *,
    W: Any,
    H: Any,
    G: Any,
    damping: float = 0.01,
    correction: float = 0.25,
    **shared: Any,
) -> RoundedTensor:
    """Round a weight by a method's name; the arguments are those of the public functions."""
    options = ColumnOptions(**shared)
    W, spec, name = check_matrix(kernels, "W", W), as_spec(options.spec), options.name
    if G is None and method != "gptq":
        raise TypeError("G must be a torch.Tensor, got None; gptq needs none")
    working = working_dtype(W, options.dtype)
    moments = Moments.of(kernels, H, G, W.shape[1], name, options.tokens)
    options.check(spec)
    given = options.scales, options.zero_points, options.global_scale
    chosen = TensorScales.choose(kernels, W, spec, *given)
    group = chosen.group if options.refit else 0
    order = hessian.column_order(moments.diagonal, moments.dead, options.act_order, group)
    bounds = options.accumulator
    tiles = None if bounds is None else Tiles(bounds, W, chosen, working)
    loop = ColumnLoop(order, chosen, options.refit, tiles, working, name, triton)
    places = torch.from_numpy(order.copy()).to(W.device)
    problem = _Problem(kernels, W, moments, bool(options.losses), loop, places)
    if method == "gptq":
        return _gptq(problem, check_damping(damping), check_damping(correction, "correction"))
    return _qronos(problem, check_damping(damping)) if method == "qronos" else _gpfq(problem)


def _gptq(problem: _Problem, damping: float, correction: float) -> RoundedTensor:
    moments, loop, order = problem.moments, problem.loop, problem.order
    mean = hessian.mean_diagonal(moments.diagonal, moments.dead)
    L, used = problem.factor(damping * mean)
    echo = None
    if moments.G is not None:
        gap = moments.G[order][:, order].to(loop.dtype) - moments.H[order][:, order].to(loop.dtype)
        echo = torch.linalg.solve_triangular(L.T, gap * correction, upper=True, left=False).tril(-1)
    values = problem.ordered
    method = "gptq" if echo is None else "gptaq"
    return problem.solve(method, values, values.clone(), problem.factored_pull(L, echo), used)


def _qronos(problem: _Problem, damping: float) -> RoundedTensor:
    H, G, loop, order = problem.moments.H, problem.cross, problem.loop, problem.order
    value = damping * largest_eigenvalue(H)
    gap = torch.zeros(problem.W.shape, dtype=loop.dtype, device=H.device)
    for start in range(0, len(H), _ROWS):
        rows = slice(start, start + _ROWS)
        part = G[rows].to(loop.dtype) - H[rows].to(loop.dtype)
        gap += problem.W[:, rows].to(loop.dtype) @ part
    gap = gap[:, order]
    L, used = problem.factor(value)
    last = gap[:, -1:].clone()
    # The system without the first column, which is the last here: its share is zero on the way.
    shift = torch.linalg.solve_triangular(L.T, gap, upper=True, left=False)
    shift[:, -1:] = 0
    shift = torch.linalg.solve_triangular(L, shift, upper=False, left=False)
    centers = problem.ordered
    # -0.0 stays what it is.
    centers = torch.where(shift != 0, centers + shift, centers)
    values = centers.clone()
    first = int(loop.order[-1]) if len(loop.order) else 0
    if len(loop.order) and not problem.moments.dead[first]:
        last = last / H[first, first].to(loop.dtype)
        values[:, -1:] = torch.where(last != 0, values[:, -1:] + last, values[:, -1:])
    return problem.solve("qronos", values, centers, problem.factored_pull(L), used)


def _gpfq(problem: _Problem) -> RoundedTensor:
    H, G, dtype, order = problem.moments.H, problem.cross, problem.loop.dtype, problem.order
    dead = torch.from_numpy(problem.moments.dead).to(H.device)[order]
    diagonal = torch.where(dead, 1, H.diagonal()[order].to(dtype))
    ratio = torch.where(dead, 1, G.diagonal()[order].to(dtype) / diagonal)
    centers = problem.ordered

    def pull(start: int, stop: int, errors: Tensor, values: Tensor) -> Any:
        rows, columns = order[start:], order[start:stop]
        h = H[rows][:, columns].to(dtype)
        gap = G[rows][:, columns].to(dtype) - h
        inside = stop - start
        gap[:inside] = gap[:inside].tril(-1)
        sums = centers[:, start:] @ gap
        sums += errors[:, stop:] @ h[inside:]
        mixing = h[:inside].tril()
        mixing.diagonal().copy_(diagonal[start:stop])
        return sums, mixing, None

    return problem.solve("gpfq", centers * ratio, centers, pull, None)


@torch.no_grad()
def round_to_nearest(
    kernels: Backend,
    *,
    W: Any,
    spec: QuantSpec | str,
    H: Any,
    G: Any,
    global_scale: Any,
    name: str,
) -> RoundedTensor:
    """Round each entry to nearest; see ``corequant.round_to_nearest``."""
    W, spec = check_matrix(kernels, "W", W), as_spec(spec)
    quantized = TensorScales.choose(kernels, W, spec, None, None, global_scale).encode(W)
    report = RoundingReport("nearest", name)
    if H is not None:
        moments = Moments.of(kernels, H, G, W.shape[1], name)
        loss = moments.loss(W, values_of(kernels, quantized))
        dead = tuple(int(j) for j in np.flatnonzero(moments.dead))
        report = RoundingReport("nearest", name, loss, loss, dead_columns=dead)
    return RoundedTensor.of(quantized, report)


@torch.no_grad()
def reconstruction_loss(kernels: Backend, *, W: Any, quantized: Any, H: Any, G: Any) -> float:
    """Return the loss of what stands for W; see ``corequant.reconstruction_loss``."""
    W = check_matrix(kernels, "W", W)
    if isinstance(quantized, QuantizedTensor):
        quantized = values_of(kernels, quantized)
    Q = check_matrix(kernels, "quantized", quantized)
    return Moments.of(kernels, H, G, W.shape[1], "W").loss(W, Q)


def _nearest(kernels: Backend, W: Tensor, spec: QuantSpec) -> QuantizedTensor:
    scales = TensorScales.choose(kernels, W, spec, None, None, None)
    return scales.encode(W)
