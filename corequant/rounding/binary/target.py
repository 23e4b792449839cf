"""The target of binary methods: a weight, rotated and corrected, and a metric of output errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index, working_dtype
from corequant.rotation import block_hadamard, check_block_size
from corequant.rounding.binary.additive import Additive
from corequant.rounding.codebooks.coded import CodingReport, RoundedWeight, check_weight
from corequant.rounding.damping import addition_to
from corequant.rounding.hessian import (
    Damping,
    Factor,
    check_cross_moment,
    check_hessian,
    check_tokens,
    damped_factor,
    mean_diagonal,
    shrunk,
)
from corequant.rounding.problem import gap_product, losses_of

__all__ = ["Measured", "Target"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Measured:
    """A weight and its moments as passed by the user, checked.

    Attributes
    ----------
    W : numpy.ndarray (rows, columns)
    H, G : numpy.ndarray (columns, columns)
        G may be None.
    tokens : int or None
    name : str
    """

    W: Array
    H: Array
    G: Array | None
    tokens: int | None
    name: str

    @classmethod
    def of(cls, W: Any, H: Any, G: Any, tokens: Any, name: str) -> Measured:
        """Check the arguments; raises the errors of the public functions."""
        W = check_weight("W", W)
        H = check_hessian(H, W.shape[1], name)
        if G is not None:
            G = check_cross_moment(G, H, name)
        return cls(W, H, G, check_tokens(tokens), name)

    def rotated(self, size: int | None) -> Measured:
        """Return weight and moments with columns rotated in blocks of this size."""
        if size is None:
            return self
        W, H = (M.astype(working_dtype(M)) for M in (self.W, self.H))
        G = None if self.G is None else self.G.astype(working_dtype(self.G))

        def both(M: Array) -> Array:
            right = np.ascontiguousarray(block_hadamard(M, size).T)
            return np.ascontiguousarray(block_hadamard(right, size).T)

        return Measured(
            block_hadamard(W, size),
            both(H),
            None if G is None else both(G),
            self.tokens,
            self.name,
        )

    def check_rotation(self, size: Any) -> int:
        """Return the block size, or raise if W's columns can't be rotated in such blocks."""
        return check_block_size("rotation", check_index("rotation", size), self.W.shape[1])


@dataclass(frozen=True, eq=False)
class Target:
    """The weights to be approximated and the metric of their errors, in the order of a column loop.

    Attributes
    ----------
    order : numpy.ndarray (columns,)
        Columns of W in reverse order of their rounding.
    values : numpy.ndarray (rows, columns)
        W, or, if G was given, the best weights for the float network's outputs, divided by
        ``2**scale``.
    H : numpy.ndarray (columns, columns)
        Damped moments, times a power of two that brings their diagonal close to 1.
    factor : Factor
        Factor L with ``L Lᵀ = H``.
    dead : numpy.ndarray (columns,), bool
        Mask of columns that no input reached, in the order of W.
    damping : Damping
        Damping in units of the moments that were passed.
    shrinkage : float
    name : str
    scale : int
    """

    order: Array
    values: Array
    H: Array
    factor: Factor
    dead: npt.NDArray[np.bool_]
    damping: Damping
    shrinkage: float
    name: str
    scale: int

    @classmethod
    def of(cls, measured: Measured, group: int, damping: Any, act_order: bool) -> Target:
        """Damp and factor the moments, and correct the weight if G is given."""
        name, dtype = measured.name, working_dtype(measured.W)
        H, G, shrinkage = shrunk(measured.H, measured.G, measured.tokens)
        dead = np.diagonal(H) <= 0
        # Powers of two change only the exponents, which stay far from the limits of their range.
        unit = _exponent(mean_diagonal(np.diagonal(H).astype(np.float64), dead))
        scale = _exponent(float(np.abs(measured.W).max()))
        H, W = np.ldexp(H, -unit), np.ldexp(measured.W.astype(dtype), -scale)
        diagonal = np.diagonal(H).astype(np.float64)
        mean = mean_diagonal(diagonal, dead)
        order = _group_order(np.where(dead, -1.0, diagonal), group, act_order)
        addition = addition_to(H, dead, damping, corrected=G is not None)
        factor, used = damped_factor(H, order, dead, addition, dtype, name)
        values = np.take(W, order, axis=1)
        if G is not None:
            G = np.ldexp(G.astype(H.dtype), -unit)
            gap = np.ascontiguousarray(gap_product(W, G, H, dtype)[:, order])
            values += factor.backward(factor.forward(gap))
        metric = np.ascontiguousarray(H[np.ix_(order, order)], dtype)
        place = np.arange(len(metric))
        metric[place, place] = np.where(dead, mean, diagonal)[order] + used.value
        used = replace(used, value=math.ldexp(used.value, unit))
        return cls(order, values, metric, factor, dead, used, shrinkage, name, scale)

    @property
    def exponent(self) -> int:
        """Exponent of stored scales, with which the largest weight is about 2**8."""
        return _exponent(float(np.abs(self.values).max())) - 8

    def result(self, method: str, measured: Measured, weight: Additive) -> RoundedWeight:
        """Return a weight with its report."""
        loss = losses_of(measured.W, [weight.dequantize()], measured.H, measured.G)[0]
        report = CodingReport(
            method,
            self.name,
            weight.bits_per_weight,
            loss=loss,
            damping=self.damping,
            dead_columns=tuple(int(j) for j in np.flatnonzero(np.diagonal(measured.H) == 0)),
            shrinkage=self.shrinkage,
        )
        return RoundedWeight(weight, report)


def _exponent(value: float) -> int:
    """Return the exponent of a number's leading bit, plus one; 0 for zero."""
    return math.frexp(value)[1] if value else 0


def _group_order(score: Array, group: int, act_order: bool) -> Array:
    """Return the columns in reverse order of their rounding, those of a group together.

    With ``act_order``, groups are rounded by descending mean score, and their columns by score.
    """
    d = len(score)
    if not act_order:
        return np.arange(d)[::-1]
    starts = np.arange(0, d, group)
    means = np.add.reduceat(score, starts) / np.diff(np.append(starts, d))
    pieces = []
    for g in np.argsort(means, kind="stable"):
        columns = np.arange(starts[g], min(starts[g] + group, d))[::-1]
        pieces.append(columns[np.argsort(score[columns], kind="stable")])
    return np.concatenate(pieces)
