"""WaterSIC: entropy-coded integers, with a step for each column that suits the output error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_number
from corequant.errors import SpecError
from corequant.rounding.codebooks.coded import CodingReport, RoundedWeight
from corequant.rounding.codebooks.columns import ColumnProblem
from corequant.rounding.codebooks.entropy import LARGEST, EntropyCoded
from corequant.rounding.codebooks.families import loss_by_row
from corequant.rounding.codebooks.quadratic import best_column_scales

__all__ = ["watersic"]

Array = npt.NDArray[Any]

_MOST_BITS = 8.0
_TRIES = 16
_SECANTS = 6
"""Tries with secants before bisection; the bits of a small weight jump from step to step."""

_CLOSE = 0.004
"""Bits below the target at which the search stops."""

_RIDGE = 1e-4


def watersic(
    W: Any,
    H: Any,
    bits: float = 2.5,
    *,
    G: Any = None,
    waterfilling: bool = True,
    damping: float | None = None,
    act_order: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedWeight:
    """Quantize a weight to entropy-coded integers with a step for each column (WaterSIC).

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Floating and finite.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    bits : float
        Average bits per weight, counting everything that is stored; at most 8.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; adds Qronos's correction.
    waterfilling : bool
        Choose the step of each column by the cost of its errors; otherwise all columns have the
        same step.
    damping, act_order, tokens, name
        See ``gptq``, and ``qronos`` if G is given.

    Returns
    -------
    RoundedWeight
        The weight is an ``EntropyCoded``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument is invalid. If ``bits`` is out of range, the error states the range.

    Notes
    -----
    In the column loop of GPTQ, an error e in column j costs ``L_jj² e²``, with ``H = L Lᵀ``. Steps
    in inverse proportion to L_jj make the errors of all columns cost the same, which for normal
    weights is within 0.255 bits of the best possible code, for any H (WaterSIC, arXiv 2603.04956).
    Columns of small weights or inputs then take less than a bit, or almost nothing; as codes have
    variable lengths, the file becomes smaller by these bits. Published figures are entropies;
    ``bits`` counts the stream, its tables and the scales.

    The common factor of the steps is found by search, as bits fall when it grows. Finally, the
    scales of columns are fitted to the output error.

    Decoding takes about 25 nanoseconds per weight, and can only start at the beginning.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(512, 64))
    >>> H = X.T @ X / 512
    >>> coded = cq.watersic(W, H, 2)
    >>> 1.98 < coded.bits_per_weight <= 2
    True
    >>> grid = cq.gptq(W, H, "int2:channel:symmetric:mse")  # 2.25 bits with its scales
    >>> coded.report.loss < grid.report.loss
    True
    """
    bits = check_number("bits", bits)
    problem = ColumnProblem.of(
        W, H, G, damping=damping, act_order=act_order, tokens=tokens, name=name
    )
    steps = np.empty(problem.W.shape[1])
    steps[problem.order] = 1 / np.diagonal(problem.factor.L).astype(np.float64)
    if not waterfilling:
        steps[:] = 1
    coded = _fitted(problem, bits, steps)
    targets = problem.W.astype(problem.H.dtype) @ (problem.H if problem.G is None else problem.G)
    nearest = float(loss_by_row(problem, coded).sum())
    scales = best_column_scales(coded.dequantize(), problem.H, targets, _RIDGE)
    better = coded.rescaled(coded.scales * scales)
    if loss_by_row(problem, better).sum() < nearest:
        coded = better
    report = CodingReport(
        "watersic",
        name,
        coded.bits_per_weight,
        problem.loss(coded.dequantize()),
        None,
        problem.damping,
        tuple(int(j) for j in np.flatnonzero(problem.dead)),
        problem.shrinkage,
    )
    return RoundedWeight(coded, report)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Rounds each column to multiples of its step, a float16 number."""

    scales: Array
    codes: dict[int, Array] = field(default_factory=dict)

    def enter_block(self, columns: Array, values: Array, curvature: Array) -> None:
        """Do nothing: the steps are already chosen."""

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return the nearest multiples of the column's step, in the dtype of w."""
        codes = np.clip(np.rint(w / self.scales[j]), -LARGEST, LARGEST)
        self.codes[j] = codes
        values: Array = (codes * self.scales[j]).astype(w.dtype)
        return values


def _fitted(problem: ColumnProblem, bits: float, steps: Array) -> EntropyCoded:
    """Return the finest codes within ``bits``, with steps in these proportions."""
    rows, columns = problem.W.shape
    nothing = EntropyCoded.of(np.zeros((rows, columns), np.int16), np.ones(columns))
    least = math.ceil(nothing.bits_per_weight * 1000) / 1000
    if least > _MOST_BITS:
        raise SpecError(
            f"{problem.name} must be larger: a weight {problem.W.shape} takes at least {least:g} "
            f"bits per weight, more than the limit of {_MOST_BITS:g}"
        )
    if not nothing.bits_per_weight <= bits <= _MOST_BITS:
        raise SpecError(
            f"bits must be {least:g} to {_MOST_BITS:g} for {problem.name}, got {bits:g}"
        )
    # Root mean square of the weights in units of their steps.
    spread = float(np.sqrt(np.mean(np.square(problem.centers / steps[problem.order]))))
    if not spread:
        return nothing
    best, exponent = nothing, 2.0 - bits
    fine: tuple[float, float] | None = None
    coarse: tuple[float, float] | None = None
    for turn in range(_TRIES):
        found = _coded(problem, steps * (spread * 2.0**exponent))
        excess = found.bits_per_weight - bits
        if excess > 0:
            fine = exponent, excess
        else:
            coarse = exponent, excess
            if found.bits_per_weight >= best.bits_per_weight:
                best = found
            if excess > -_CLOSE:
                break
        aim = excess + _CLOSE / 2
        if fine is None or coarse is None:
            # Doubling the step saves one bit, or less at low rates.
            exponent += 1.3 * aim
        elif turn >= _SECANTS:
            exponent = (fine[0] + coarse[0]) / 2
        else:
            slope = (fine[1] - coarse[1]) / (coarse[0] - fine[0])
            exponent = min(max(exponent + aim / slope, fine[0]), coarse[0])
    return best


def _coded(problem: ColumnProblem, steps: Array) -> EntropyCoded:
    """Return the weight as rounded by the column loop with these steps."""
    empty = np.zeros((1, len(steps)), np.int16)
    quantizer = _Steps(EntropyCoded.of(empty, steps).scales.astype(np.float64))
    problem.run(quantizer)
    codes = np.stack([quantizer.codes[j] for j in range(len(steps))], axis=1).astype(np.int16)
    return EntropyCoded.of(codes, steps)
