"""Arguments that the methods with a column loop share, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_matrix, check_number
from corequant.quantization import as_spec, dequantize, quantize
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.columns import Scales
from corequant.rounding.hessian import check_cross_moment, check_hessian, column_order
from corequant.rounding.loop import ColumnLoop, Pull
from corequant.rounding.report import (
    Damping,
    RoundedTensor,
    RoundingReport,
    gap_product,
    loss_of,
)
from corequant.rounding.shrinkage import check_tokens, shrunk
from corequant.specs import QuantSpec

__all__ = ["Problem", "check_damping", "check_options"]

Array = npt.NDArray[Any]


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
    def of(
        cls,
        W: Any,
        H: Any,
        G: Any,
        spec: QuantSpec | str,
        *,
        act_order: bool,
        scales: Any,
        zero_points: Any,
        global_scale: Any,
        refit: bool,
        accumulator: AccumulatorSpec | None,
        dtype: npt.DTypeLike | None,
        losses: bool,
        tokens: Any,
        name: str,
    ) -> Problem:
        """Check every argument; raises as the public functions say."""
        W, spec = check_matrix("W", W), as_spec(spec)
        working = working_dtype(W, dtype)
        H = check_hessian(H, W.shape[1], name)
        if G is not None:
            G = check_cross_moment(G, H, name)
        check_options(spec, scales, refit, accumulator)
        chosen = Scales.choose(W, spec, scales, zero_points, global_scale)
        dead = np.diagonal(H) == 0
        order = column_order(np.diagonal(H), dead, act_order, chosen.group if refit else 0)
        loop = ColumnLoop(order, chosen, refit, accumulator, working, name)
        used, cross, shrinkage = shrunk(H, G, check_tokens(tokens))
        return cls(W, used, cross, (H, G), shrinkage, dead, bool(losses), loop)

    @property
    def ordered(self) -> Array:
        """W in the working dtype, its columns in the loop's order."""
        return np.take(self.W, self.loop.order, axis=1).astype(self.loop.dtype, copy=False)

    def solve(
        self, method: str, values: Array, centers: Array, pull: Pull, damping: Damping | None
    ) -> RoundedTensor:
        """Run the column loop and report on it."""
        quantized, share = self.loop.run(self.W, values, centers, pull)
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


def check_options(
    spec: QuantSpec, scales: Any, refit: bool, accumulator: AccumulatorSpec | None
) -> None:
    """Raise unless an accumulator is one, and refit has something to choose."""
    if accumulator is not None and not isinstance(accumulator, AccumulatorSpec):
        raise TypeError(f"accumulator must be an AccumulatorSpec, got {type(accumulator).__name__}")
    if refit and scales is not None:
        raise ValueError("refit chooses scales of its own, got scales too")
    if refit and spec.group_size is None:
        raise ValueError(f"refit is for scales of groups, got {spec}")
    if refit and accumulator is not None:
        raise ValueError("an accumulator's bounds need fixed scales, got refit too")


def working_dtype(W: Array, dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    """Return float32, or float64 on request or for float64 weights."""
    working = np.dtype(dtype or (np.float64 if W.dtype.itemsize == 8 else np.float32))
    if working not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {working}")
    return working


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
