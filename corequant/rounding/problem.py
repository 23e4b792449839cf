"""The arguments that the column methods share, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import round_elsewhere
from corequant._validation import check_matrix, check_number, working_dtype
from corequant.quantization import as_spec, dequantize, quantize
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.bounds import budget_for
from corequant.rounding.hessian import Damping, check_cross_moment, check_hessian, column_order
from corequant.rounding.loop import Budget, ColumnLoop, Pull, Scales
from corequant.rounding.report import (
    RoundedTensor,
    RoundingReport,
    gap_product,
    loss_of,
)
from corequant.rounding.shrinkage import check_tokens, shrunk
from corequant.specs import QuantSpec

__all__ = ["ColumnOptions", "Problem", "check_damping", "moment_gap"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ColumnOptions:
    """Arguments that ``gptq``, ``gpfq`` and ``qronos`` share, as they were given."""

    spec: QuantSpec | str
    scales: Any
    zero_points: Any
    global_scale: Any
    act_order: bool
    refit: bool
    accumulator: AccumulatorSpec | None
    dtype: Any
    losses: bool
    tokens: Any
    name: str

    def check(self, spec: QuantSpec) -> None:
        """Raise unless the options agree with each other and with the spec."""
        accumulator = self.accumulator
        if accumulator is not None and not isinstance(accumulator, AccumulatorSpec):
            got = type(accumulator).__name__
            raise TypeError(f"accumulator must be an AccumulatorSpec, got {got}")
        if self.refit and self.scales is not None:
            raise ValueError("refit must not come with scales, got both")
        if self.refit and spec.group_size is None:
            raise ValueError(f"refit needs a spec with groups, got {spec}")
        if self.refit and accumulator is not None:
            raise ValueError("accumulator needs fixed scales, got refit too")

    def round_elsewhere(self, method: str, **arguments: Any) -> RoundedTensor:
        """Return the result of the arrays' own backend."""
        rounded: RoundedTensor = round_elsewhere(method, **arguments, **vars(self))
        return rounded


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight, the moments of its inputs, and how to round it; all of it checked.

    ``H`` and ``G`` are what a method works with, ``measured`` what it was given.
    """

    W: Array
    H: Array
    G: Array | None
    measured: tuple[Array, Array | None]
    shrinkage: float
    dead: npt.NDArray[np.bool_]
    losses: bool
    loop: ColumnLoop

    @classmethod
    def of(cls, W: Any, H: Any, G: Any, options: ColumnOptions) -> Problem:
        """Check every argument; raises as the public functions say."""
        W, spec, name = check_matrix("W", W), as_spec(options.spec), options.name
        working = working_dtype(W, options.dtype)
        H = check_hessian(H, W.shape[1], name)
        if G is not None:
            G = check_cross_moment(G, H, name)
        options.check(spec)
        chosen = Scales.choose(W, spec, options.scales, options.zero_points, options.global_scale)
        dead = np.diagonal(H) == 0
        group = chosen.group if options.refit else 0
        order = column_order(np.diagonal(H), dead, options.act_order, group)
        budget = Budget()
        if options.accumulator is not None:
            budget = budget_for(options.accumulator, W, chosen, working)
        loop = ColumnLoop(order, chosen, options.refit, budget, working, name)
        used, cross, shrinkage = shrunk(H, G, check_tokens(options.tokens))
        return cls(W, used, cross, (H, G), shrinkage, dead, bool(options.losses), loop)

    @property
    def ordered(self) -> Array:
        """W in the working dtype, its columns in the loop's order."""
        return np.take(self.W, self.loop.order, axis=1).astype(self.loop.dtype, copy=False)

    def solve(
        self, method: str, values: Array, centers: Array, pull: Pull, damping: Damping | None
    ) -> RoundedTensor:
        """Run the column loop and report on it."""
        quantized, share = self.loop.run(values, centers, pull)
        loss = nearest = None
        if self.losses:
            loss = loss_of(self.W, dequantize(quantized), *self.measured)
            plain = quantize(self.W, self.loop.scales.spec)
            nearest = loss_of(self.W, dequantize(plain), *self.measured)
        report = RoundingReport(
            method,
            self.loop.name,
            loss,
            nearest,
            damping,
            tuple(int(j) for j in np.flatnonzero(self.dead)),
            share,
            self.shrinkage,
        )
        return RoundedTensor.of(quantized, report)

    def factored_pull(self, L: Array, echo: Array | None = None) -> Pull:
        """Return the sums of ``H = L Lᵀ``: D times the rows of L rounded before."""

        def pull(start: int, stop: int, errors: Array, values: Array) -> Any:
            sums = errors[:, stop:] @ L[stop:, start:stop]
            block = np.ascontiguousarray(L[start:stop, start:stop])
            if echo is None:
                return sums, block, None
            sums += values[:, stop:] @ echo[stop:, start:stop]
            return sums, block, np.ascontiguousarray(echo[start:stop, start:stop])

        return pull


def check_damping(value: Any, name: str = "damping") -> float:
    """Return a damping factor, finite and not negative."""
    number = check_number(name, value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def moment_gap(problem: Problem, weights: Array) -> Array:
    """Return ``W (G - H)`` with its columns in the loop's order; W's are in its own."""
    G, H, loop = problem.G, problem.H, problem.loop
    assert G is not None
    return np.ascontiguousarray(gap_product(weights, G, H, loop.dtype)[:, loop.order])
