"""GPFQ: greedy path following; each column compensates for all those rounded before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere
from corequant.rounding.accumulators import AccumulatorSpec
from corequant.rounding.methods import RoundingMethod
from corequant.rounding.problem import ColumnOptions, Problem, RoundedTensor
from corequant.specs import QuantSpec

__all__ = ["gpfq"]

Array = npt.NDArray[Any]


def gpfq(
    W: Any,
    H: Any,
    G: Any,
    spec: QuantSpec | str,
    *,
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
    """Quantize a weight column by column, following the float layer's output.

    Parameters
    ----------
    W : array (out_features, in_features)
        NumPy array or torch tensor, finite, of a floating dtype; all other arrays are of its kind.
    H : array (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    G : array (in_features, in_features)
        ``XᵀX̃ / n`` of the same tokens, X being the float network's inputs; H itself where they
        are the same.
    spec : QuantSpec or str
        The quantizer; any.
    act_order, scales, zero_points, global_scale, refit, accumulator, dtype, losses, tokens, name
        As for ``gptq``.

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
    Column t is rounded at ``(Σ_{j≤t} w_j G_jt - Σ_{j<t} q_j H_jt) / H_tt``, the covariance form of
    greedy path following (Lybrand and Saab, arXiv 2010.11979; arXiv 2201.11113). It needs no
    inverse and no damping. A dead column, H_tt = 0, is rounded to nearest, and reported.

    With few tokens H and G get the same addition as GPTQ's.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> W = np.array([[0.9, -1.5], [0.1, 0.3]])
    >>> H = np.array([[1.0, 0.8], [0.8, 1.0]])
    >>> cq.gpfq(W, H, H, "int3:channel").codes
    array([[ 2, -3],
           [ 1,  3]], dtype=int8)
    """
    if isinstance(accumulator, AccumulatorSpec):
        accumulator = replace(accumulator, diffuse=True)
    quantizer = spec, scales, zero_points, global_scale
    options = ColumnOptions(*quantizer, act_order, refit, accumulator, dtype, losses, tokens, name)
    if is_elsewhere(W):
        return options.round_elsewhere("gpfq", W=W, H=H, G=G)
    if G is None:
        raise TypeError("G must be a numpy.ndarray, got None; pass H where inputs don't differ")
    problem = Problem.of(W, H, G, options)
    assert problem.G is not None
    order, dtype, cross, gram = problem.loop.order, problem.loop.dtype, problem.G, problem.H
    dead = problem.dead[order]
    diagonal = np.where(dead, 1, np.diagonal(gram)[order]).astype(dtype)
    ratio = np.where(dead, 1, np.diagonal(cross)[order].astype(dtype) / diagonal).astype(dtype)
    centers = problem.ordered

    def pull(start: int, stop: int, errors: Array, values: Array) -> tuple[Array, Array, None]:
        at = np.ix_(order[start:], order[start:stop])
        h = gram[at].astype(dtype, copy=False)
        gap = cross[at].astype(dtype, copy=False) - h
        inside = stop - start
        gap[:inside] = np.tril(gap[:inside], -1)
        sums = centers[:, start:] @ gap
        sums += errors[:, stop:] @ h[inside:]
        mixing = np.tril(h[:inside])
        np.fill_diagonal(mixing, diagonal[start:stop])
        return sums, mixing, None

    return problem.solve("gpfq", centers * ratio, centers, pull, None)


METHOD = RoundingMethod(
    "gpfq", partial(gpfq, losses=False), ("act_order", "refit", "accumulator"), needs_cross=True
)
