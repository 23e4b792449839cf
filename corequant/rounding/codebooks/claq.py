"""CLAQ: a codebook for each column, fitted when the column loop reaches it, and kept outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_number
from corequant.errors import SpecError
from corequant.rounding.codebooks.allocation import hull_choice
from corequant.rounding.codebooks.codebook import Codebook, check_choices
from corequant.rounding.codebooks.coded import CodedWeight, CodingReport, RoundedWeight, half
from corequant.rounding.codebooks.columns import ColumnProblem
from corequant.rounding.codebooks.levels import kmeans_levels, kmeans_table
from corequant.rounding.codebooks.outliers import KeptOutliers, SparseOutliers
from corequant.rounding.codebooks.streams import bits_for

__all__ = ["ClaqReport", "claq", "outlier_order"]

Array = npt.NDArray[Any]

_BLOCK = 128
_THRESHOLD = 13.0
"""Multiple of the mean magnitude of the matrix from which a weight counts as an outlier."""

_MANY, _MUCH, _LITTLE = 0.1, 0.014, 0.004
"""As published: share of the columns that keep more weights, and the share of its weights that a
column of either kind keeps at each end."""

_HEADROOM = 7
"""Powers of two by which adjusted weights may exceed the weights before float16 overflows."""


@dataclass(frozen=True)
class ClaqReport(CodingReport):
    """How ``claq`` coded a weight.

    Attributes
    ----------
    widths : dict of int to int
        Number of columns of each width.
    outliers : int
        Number of weights that are kept.
    """

    widths: dict[int, int] | None = None
    outliers: int = 0


def claq(
    W: Any,
    H: Any,
    bits: float = 2.12,
    *,
    outliers: float | bool | None = None,
    G: Any = None,
    published: bool = False,
    widths: Sequence[int] = (1, 2, 3, 4),
    damping: float | None = None,
    act_order: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedWeight:
    """Quantize a weight with a codebook for each column (CLAQ).

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Floating and finite.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    bits : float
        Average bits per weight. Everything that is stored counts, including codebooks and outliers;
        with ``published``, only the indexes do, and the range is 2 to 4.
    outliers : float, optional
        Share of the weights that are kept in float16; 0 by default. With ``published``, true or
        false.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; adds Qronos's correction.
    published : bool
        Use the method as published; see Notes.
    widths : sequence of int
        Bits that an index may have, 0 to 8.
    damping, act_order, tokens, name
        See ``gptq``, and ``qronos`` if G is given.

    Returns
    -------
    RoundedWeight
        The weight is a ``Codebook`` by column, or a ``KeptOutliers`` that wraps one; the report is
        a ``ClaqReport``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument is invalid. If ``bits`` is too low, the error states the least.

    Notes
    -----
    CLAQ (arXiv 2405.17233): when GPTQ's loop reaches a column, k-means of the column's current
    values gives its levels. Columns with many weights beyond 13 times the mean magnitude get 4
    bits, the others 2 (or 3, if the average is 3 or more); a tenth of the columns keep 2.8 % of
    their weights, the others 0.8 %, half of it at each end. ``published`` follows this, except that
    k-means is exact and that columns with equally many outliers keep the order that they have in
    the weight. Two errors of the published code are reproduced: levels are fitted to kept weights,
    too, and from the second block of 128 columns on, the share that a column keeps is that of the
    column at the same position in the first block.

    By default, levels are fitted only to the weights that aren't kept. Columns get the widths that
    lower the loss most for the bits that they take, where the loss is the error of k-means times
    L_jj², its cost after feedback, with ``H = L Lᵀ``. The weights that are farthest from the means
    of their columns by the same measure are kept.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(512, 32)) @ rng.normal(size=(32, 32)), rng.normal(size=(256, 32))
    >>> coded = cq.claq(W, X.T @ X / 512, 2.5, outliers=0.005)
    >>> coded.bits_per_weight <= 2.5, coded.report.outliers
    (True, 41)
    """
    bits, choices = check_number("bits", bits), check_choices(widths)
    share = _checked_share(outliers, published)
    problem = ColumnProblem.of(
        W, H, G, damping=damping, act_order=act_order, tokens=tokens, name=name
    )
    if published:
        own = _published_widths(problem.W, bits)
        quantizer = _Columns.of(problem, own, _published_shares(problem) if outliers else None)
    else:
        mask, own = _chosen(problem, bits, share, choices)
        quantizer = _Columns.of(problem, own, None, mask)
    Q = problem.run(quantizer, _BLOCK)
    weight = quantizer.coded(Q)
    kinds, counts = np.unique(own, return_counts=True)
    report = ClaqReport(
        "claq",
        name,
        weight.bits_per_weight,
        problem.loss(weight.dequantize()),
        None,
        problem.damping,
        tuple(int(j) for j in np.flatnonzero(problem.dead)),
        problem.shrinkage,
        {int(w): int(n) for w, n in zip(kinds, counts, strict=True)},
        int(quantizer.kept.sum()),
    )
    return RoundedWeight(weight, report)


def _checked_share(outliers: Any, published: bool) -> float:
    """Return the share of the weights to keep; 0 as published, where columns have their own."""
    if published:
        if not isinstance(outliers, bool | None):
            raise TypeError(f"outliers must be true or false as published, got {outliers!r}")
        return 0.0
    share = check_number("outliers", 0.0 if outliers is None else outliers)
    if not 0 <= share <= 1:
        raise ValueError(f"outliers must be a share from 0 to 1, got {share}")
    return share


def outlier_order(W: Array, threshold: float = _THRESHOLD) -> npt.NDArray[np.int64]:
    """Return the columns of W by descending number of outliers; ties keep their order.

    An outlier is a weight of at least ``threshold`` times the mean magnitude of W.
    """
    magnitudes = np.abs(W.astype(np.float64))
    counts = (magnitudes >= threshold * magnitudes.mean()).sum(0)
    return np.argsort(-counts, kind="stable")


@dataclass(frozen=True, eq=False)
class _Columns:
    """Levels of each column, fitted when the loop reaches it.

    ``shares`` (d,), in the order of rounding, are the shares that columns keep at each end; without
    them, ``kept`` (rows, d) marks the weights that are kept.
    """

    widths: npt.NDArray[np.uint8]
    shares: Array | None
    kept: npt.NDArray[np.bool_]
    levels: Array
    exponent: int
    places: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        problem: ColumnProblem,
        widths: npt.NDArray[np.uint8],
        shares: Array | None,
        kept: npt.NDArray[np.bool_] | None = None,
    ) -> _Columns:
        rows, columns = problem.W.shape
        if kept is None:
            kept = np.zeros((rows, columns), np.bool_)
        exponent = half(problem.centers)[1] + _HEADROOM
        places = np.empty(columns, np.int64)
        places[problem.order[::-1]] = np.arange(columns)
        levels = np.zeros((columns, 1 << int(widths.max())))
        return cls(widths, shares, kept, levels, exponent, places)

    def enter_block(self, columns: Array, values: Array, curvature: Array) -> None:
        """Do nothing: columns are fitted one by one."""

    def quantize_column(self, w: Array, j: int) -> Array:
        """Return the column rounded to its own levels, except for the weights that are kept."""
        size, fitted = 1 << int(self.widths[j]), w
        if self.shares is not None:
            share = float(self.shares[self.places[j]])
            self.kept[:, j] = (w < np.quantile(w, share)) | (w > np.quantile(w, 1 - share))
        elif not self.kept[:, j].all():
            fitted = w[~self.kept[:, j]]
        levels = self._stored(kmeans_levels(fitted, levels=size))
        self.levels[j, :size] = levels
        middles = (levels[1:] + levels[:-1]) / 2
        column = levels[np.searchsorted(middles, w, side="right")]
        kept = self.kept[:, j]
        column[kept] = self._stored(w[kept])
        return column.astype(w.dtype)

    def coded(self, Q: Array) -> CodedWeight:
        """Return the weight whose values the loop returned."""
        # A kept weight has a label, too, which is never read.
        book = Codebook.of(Q, self.levels, self.widths, axis="column")
        if not self.kept.any():
            return book
        return KeptOutliers(book, SparseOutliers.of(Q, self.kept))

    def _stored(self, values: Array) -> npt.NDArray[np.float64]:
        """Return numbers as float16 holds them at this exponent."""
        units = np.ldexp(values.astype(np.float64), -self.exponent)
        return np.ldexp(units.astype(np.float16).astype(np.float64), self.exponent)


def _published_widths(W: Array, bits: float) -> npt.NDArray[np.uint8]:
    """Return the width of each column: 4 bits for those with most outliers."""
    if not 2 <= bits <= 4:
        raise SpecError(f"bits must be 2 to 4 as published, got {bits:g}")
    base = 2 if bits < 3 else 3
    share = (bits - base) / (4 - base)
    widths = np.full(W.shape[1], base, np.uint8)
    widths[outlier_order(W)[: round(share * W.shape[1])]] = 4
    return widths


def _published_shares(problem: ColumnProblem) -> Array:
    """Return the share that each column keeps at each end, in the order of rounding."""
    d = problem.W.shape[1]
    shares = np.full(d, _LITTLE)
    order = problem.order[::-1]
    shares[outlier_order(problem.W[:, order])[: round(_MANY * d)]] = _MUCH
    # As published: every block reads the shares of the first one.
    return np.resize(shares[:_BLOCK], d)


def _chosen(
    problem: ColumnProblem, bits: float, share: float, widths: tuple[int, ...]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
    """Return which weights are kept, and the width of each column, by what errors cost."""
    W = problem.W.astype(np.float64)
    rows, columns = W.shape
    curvature = np.empty(columns)
    curvature[problem.order] = np.square(np.diagonal(problem.factor.L).astype(np.float64))
    count = round(share * W.size)
    kept = np.zeros(W.shape, np.bool_)
    fixed = 7.0 * (len(widths) + 1) + columns * bits_for(len(widths))
    if count:
        # With two levels or more, one of them would be spent on a column's outlier.
        costly = np.square(W - W.mean(0)) * curvature
        order = np.argsort(-costly, axis=None, kind="stable")
        kept.reshape(-1)[order[:count]] = True
        fixed += 8 * SparseOutliers.of(W, kept).nbytes
    sizes = [1 << w for w in widths]
    weights = np.ascontiguousarray((~kept).T, np.float64)
    losses = kmeans_table(np.ascontiguousarray(W.T), weights, sizes).losses
    losses *= curvature[:, None]
    costs = np.array([float(w * rows + (16 << w)) for w in widths])
    budget = bits * W.size - fixed
    if not costs[0] * columns <= budget * (1 + 1e-9):
        least = (float(costs[0]) * columns + fixed) / W.size
        raise SpecError(
            f"bits must be at least {math.ceil(least * 1000) / 1000:g} for {problem.name} with "
            f"widths {widths} and {count} outliers, got {bits:g}"
        )
    chosen = hull_choice(losses, costs, budget)
    return kept, np.array(widths, np.uint8)[chosen]
