"""GPTQ: the columns not yet rounded compensate for each column's rounding error."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.hessian import Factor, damped_factor, mean_diagonal
from corequant.rounding.methods import RoundingMethod
from corequant.rounding.problem import ColumnOptions, Problem, RoundedTensor, check_damping
from corequant.specs import QuantSpec

__all__ = ["gptq"]

Array = npt.NDArray[Any]


def gptq(
    W: Any,
    H: Any,
    spec: QuantSpec | str,
    *,
    G: Any = None,
    correction: float = 0.25,
    damping: float = 0.01,
    act_order: bool = True,
    scales: Any = None,
    zero_points: Any = None,
    global_scale: Any = None,
    refit: bool = False,
    accumulator: AccumulatorSpec | None = None,
    dtype: npt.DTypeLike | None = None,
    losses: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedTensor:
    """Quantize a weight so that ``tr((W - Q) H (W - Q)ᵀ)``, the output error, is small.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype; all other arrays are of its kind.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    spec : QuantSpec or str
        The quantizer; any.
    G : array (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X: adds GPTAQ's correction towards ``W X``.
    correction : float
        Strength of that correction; 0.25 in its authors' code.
    damping : float
        Added to the diagonal of H, times its mean.
    act_order : bool
        Round the columns of large H_jj first; otherwise in their order.
    scales, zero_points, global_scale : arrays, optional
        As ``choose_qparams`` returns them; by default the spec's search on W.
    refit : bool
        Choose a group's scale when its first column is reached, for what its weights are then.
        Groups stay together in the order of rounding.
    accumulator : AccumulatorSpec, optional
        An accumulator that no dot product may overflow (AXE).
    dtype : numpy dtype, optional
        Float32 or float64 for all arithmetic; by default float64 for a float64 W.
    losses : bool
        Compute the losses of the report, which takes two more products with H.
    tokens : int, optional
        Number of tokens that H and G are the moments of; a lack of them is compensated for, see
        Notes. Pass it wherever it is known. By default the rank of H stands in for it where more
        than one direction is missing; from as many tokens as channels on nothing is compensated,
        although up to ten times as many would need it.
    name : str
        The layer's name, for errors and the report.

    Returns
    -------
    RoundedTensor
        A QuantizedTensor with a ``report``, its arrays where W is.

    Raises
    ------
    BackendError
        If arrays are on several devices.
    HessianError
        If H is asymmetric or not positive semidefinite.
    AccumulatorError, BlockSizeError, NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument breaks its rule.

    Notes
    -----
    The order of columns is reversed, ``H + damping = L Lᵀ``, and with D = W - Q column j is
    rounded at ``w_j + Σ_{i>j} D_i L_ij / L_jj``: GPTQ (arXiv 2210.17323, algorithm 1) without the
    inverse of H, in Babai's form. A dead column, H_jj = 0, is rounded to nearest, and reported;
    where the factorization fails, the damping is raised, and reported. GPTAQ: arXiv 2504.02692.

    Few tokens: with ρ the weight that oracle approximating shrinkage (arXiv
    0907.4698, equation 23) gives to the identity, ``ρ/(1-ρ)`` times the mean of the diagonal is
    added to H and G beforehand, where that is more than a hundredth of it; ``report.shrinkage``
    has it. With one token all weights are rounded to nearest.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> H = np.array([[1.0, 0.8], [0.8, 1.0]])
    >>> cq.gptq(W, H, "int3:channel").codes
    array([[ 2, -3],
           [ 1,  3]], dtype=int8)
    """
    quantizer = spec, scales, zero_points, global_scale
    options = ColumnOptions(*quantizer, act_order, refit, accumulator, dtype, losses, tokens, name)
    if is_elsewhere(W):
        return options.round_elsewhere(
            "gptq", W=W, H=H, G=G, correction=correction, damping=damping
        )
    problem = Problem.of(W, H, G, options)
    loop = problem.loop
    mean = mean_diagonal(np.diagonal(problem.H).astype(np.float64), problem.dead)
    value = check_damping(damping) * mean
    factor, used = damped_factor(problem.H, loop.order, problem.dead, value, loop.dtype, name)
    echo = (
        None
        if problem.G is None
        else _echo(problem, factor, check_damping(correction, "correction"))
    )
    values = problem.ordered
    pull = problem.factored_pull(factor.L, echo)
    method = "gptq" if echo is None else "gptaq"
    return problem.solve(method, values, values.copy(), pull, used)


def _echo(problem: Problem, factor: Factor, strength: float) -> Array:
    """Return the strictly lower part of ``strength · (G - H) L⁻ᵀ`` in the loop's order."""
    order, dtype = problem.loop.order, problem.loop.dtype
    assert problem.G is not None
    at = np.ix_(order, order)
    gap = (problem.G[at].astype(dtype) - problem.H[at]).astype(dtype, copy=False)
    return np.tril(factor.forward(gap * dtype.type(strength)), -1)


METHOD = RoundingMethod(
    "gptq",
    partial(gptq, losses=False),
    ("damping", "correction", "act_order", "refit", "accumulator"),
)
