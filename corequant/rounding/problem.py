"""The problem of a rounding method: the output error, its arguments, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere, round_elsewhere
from corequant._validation import check_matrix, check_number, working_dtype
from corequant.errors import ShapeError
from corequant.quantization import (
    QuantizedTensor,
    as_spec,
    choose_global_scale,
    choose_qparams,
    dequantize,
    quantize,
)
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.bounds import budget_for
from corequant.rounding.hessian import (
    Damping,
    check_cross_moment,
    check_hessian,
    check_tokens,
    column_order,
    shrunk,
)
from corequant.rounding.loop import Budget, ColumnLoop, Pull, Scales
from corequant.specs import Granularity, QuantSpec

__all__ = [
    "ColumnOptions",
    "Problem",
    "RoundedTensor",
    "RoundingReport",
    "check_damping",
    "loss_of",
    "losses_of",
    "moment_gap",
    "reconstruction_loss",
]

Array = npt.NDArray[Any]

_ROWS = 512


@dataclass(frozen=True)
class RoundingReport:
    """How a method rounded a weight.

    Attributes
    ----------
    method : str
        Such as ``"gptq"``.
    name : str
        The layer's name as it was given.
    loss : float or None
        ``reconstruction_loss`` of the result; None where it wasn't asked for.
    nearest_loss : float or None
        The same of the weight rounded to nearest with the spec's own scales.
    damping : Damping or None
        Addition to the diagonal of H; None for methods without.
    dead_columns : tuple of int
        Columns that no input reached: H_jj = 0.
    bounded_share : float or None
        Share of the weights that an accumulator's bound moved; None without an accumulator.
    shrinkage : float
        Addition to the diagonals of H and G for lack of tokens, divided by the mean of H's; 0 if
        there were enough.
    """

    method: str
    name: str
    loss: float | None = None
    nearest_loss: float | None = None
    damping: Damping | None = None
    dead_columns: tuple[int, ...] = ()
    bounded_share: float | None = None
    shrinkage: float = 0.0


@dataclass(frozen=True, eq=False)
class RoundedTensor(QuantizedTensor):
    """A QuantizedTensor with the report of the method that made it.

    Attributes
    ----------
    report : RoundingReport
        The method's report.
    """

    report: RoundingReport = RoundingReport("", "")

    @classmethod
    def of(cls, quantized: QuantizedTensor, report: RoundingReport) -> RoundedTensor:
        """Attach a report to a quantized tensor."""
        q = quantized
        return cls(q.codes, q.scales, q.zero_points, q.spec, q.global_scale, report)


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
        given = options.scales, options.zero_points, options.global_scale
        chosen = Scales.choose(W, spec, *given, refit=options.refit)
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

    def _nearest(self) -> QuantizedTensor:
        """Return W rounded to nearest, by the kernels that the loop has used already."""
        spec, common = self.loop.scales.spec, None
        if spec.granularity is Granularity.TENSOR_GROUP:
            common = choose_global_scale(self.W, spec)
        scales, zero_points = choose_qparams(self.W, spec, global_scale=common)
        return quantize(self.W, spec, scales, zero_points, global_scale=common)

    def solve(
        self, method: str, values: Array, centers: Array, pull: Pull, damping: Damping | None
    ) -> RoundedTensor:
        """Run the column loop and report on it."""
        quantized, share = self.loop.run(values, centers, pull)
        loss = nearest = None
        if self.losses:
            loss = loss_of(self.W, dequantize(quantized), *self.measured)
            nearest = loss_of(self.W, dequantize(self._nearest()), *self.measured)
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


def reconstruction_loss(W: Any, quantized: QuantizedTensor | Any, H: Any, G: Any = None) -> float:
    """Return the mean squared error of a layer's outputs, summed over its outputs.

    Parameters
    ----------
    W : array (out_features, in_features)
        The float weight, NumPy array or torch tensor; all other arrays are of its kind.
    quantized : QuantizedTensor or array (out_features, in_features)
        The quantized weight.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    G : array (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; by default they are X̃ themselves.

    Returns
    -------
    float
        ``tr((W - Q) H (W - Q)ᵀ)``. With G, ``E‖Wx - Qx̃‖² - E‖W(x - x̃)‖²``, whose second part no
        rounding can change, so that it may be negative.

    Raises
    ------
    HessianError, NonFiniteError, ShapeError, TypeError
        If a matrix is invalid or has another shape.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> round(cq.reconstruction_loss(W, np.round(W), np.eye(2)), 3)
    0.36
    """
    if is_elsewhere(W):
        loss = round_elsewhere("reconstruction_loss", W=W, quantized=quantized, H=H, G=G)
        return float(loss)
    W = check_matrix("W", W)
    Q = check_matrix(
        "quantized", dequantize(quantized) if isinstance(quantized, QuantizedTensor) else quantized
    )
    if Q.shape != W.shape:
        raise ShapeError(f"quantized must have W's shape {W.shape}, got {Q.shape}")
    H = check_hessian(H, W.shape[1], "W")
    return loss_of(W, Q, H, None if G is None else check_cross_moment(G, H, "W"))


def gap_product(W: Array, G: Array, H: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``W (G - H)`` (out_features, in_features) of checked matrices, holding no G - H."""
    total = np.zeros(W.shape, dtype)
    for start in range(0, len(H), _ROWS):
        rows = slice(start, start + _ROWS)
        gap = (G[rows].astype(dtype) - H[rows]).astype(dtype, copy=False)
        total += np.ascontiguousarray(W[:, rows], dtype) @ gap
    return total


def loss_of(W: Array, Q: Array, H: Array, G: Array | None) -> float:
    """Return the loss of checked matrices; products in H's dtype, sums in float64."""
    return losses_of(W, [Q], H, G)[0]


def losses_of(W: Array, candidates: Sequence[Array], H: Array, G: Array | None) -> list[float]:
    """Return the loss of each of some candidates for a weight."""
    totals = [0.0] * len(candidates)
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        gap = 0.0 if G is None else 2 * gap_product(W[rows], G, H, H.dtype)
        for k, Q in enumerate(candidates):
            D = (W[rows].astype(np.float64) - Q[rows]).astype(H.dtype)
            P = D @ H + gap
            totals[k] += float(np.einsum("ij,ij->", D, P, dtype=np.float64))
    return totals
