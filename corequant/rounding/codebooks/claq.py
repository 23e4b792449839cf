"""CLAQ: a codebook for each column, fitted when the column loop reaches it, and kept outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_number
from corequant.errors import ShapeError, SpecError
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
"""Times the mean magnitude of the whole matrix from which a weight counts as an outlier."""

_MANY, _MUCH, _LITTLE = 0.1, 0.014, 0.004
"""Published: the share of columns that keep more, and what a column keeps at each end."""

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
    """Code a weight by columns: each has levels of its own, fitted when its turn comes.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Floating and finite.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    bits : float
        Average bits of a weight: of all that is stored, codebooks and outliers included; where
        ``published``, of the indexes alone, 2 to 4.
    outliers : float, optional
        Share of the weights that are kept in float16; by default none. Where ``published``, true
        or false.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X: adds Qronos's correction.
    published : bool
        The method as published; see Notes.
    widths : sequence of int
        Bits that an index may have, 0 to 8.
    damping, act_order, tokens, name
        As for ``gptq``, and for ``qronos`` where G is given.

    Returns
    -------
    RoundedWeight
        Its weight is a ``Codebook`` by column, or ``KeptOutliers`` around one; its report a
        ``ClaqReport``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument breaks its rule. Where ``bits`` is out of reach, the error says what is not.

    Notes
    -----
    CLAQ (arXiv 2405.17233): in GPTQ's loop each column's levels are those of k-means of what its
    weights are by then. Columns with many weights beyond 13 times the mean magnitude get 4 bits,
    the others 2 (3 from an average of 3 on); a tenth of the columns keep 2.8 % of their weights,
    the others 0.8 %, half of it at each end. ``published`` does this, but for k-means, which is
    exact, and the order of columns with equally many outliers, which is theirs in the weight. Two
    slips of the published code are kept: levels are fitted to kept weights, too, and from the
    second block of 128 columns on what a column keeps is that of its place in the first one.

    Otherwise levels are fitted to what isn't kept; columns get the widths that lower the loss
    most for what they take, the loss being the error of k-means times L_jj², what it costs after
    feedback, H being ``L Lᵀ``; and those weights are kept that are farthest from their columns'
    means, in the same measure.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(512, 32)) @ rng.normal(size=(32, 32)), rng.normal(size=(256, 32))
    >>> coded = cq.claq(W, X.T @ X / 512, 2.5, outliers=0.005)
    >>> coded.bits_per_weight <= 2.5, coded.report.outliers
    (True, 41)
    """
    problem = ColumnProblem.of(
        W, H, G, damping=damping, act_order=act_order, tokens=tokens, name=name
    )
    bits = check_number("bits", bits)
    if problem.W.size == 0:
        raise ShapeError(f"W must hold at least one weight, got shape {problem.W.shape}")
    if published:
        if not isinstance(outliers, bool | None):
            raise TypeError(f"outliers must be true or false as published, got {outliers!r}")
        own = _published_widths(problem.W, bits)
        quantizer = _Columns.of(problem, own, _published_shares(problem) if outliers else None)
    else:
        share = check_number("outliers", 0.0 if outliers is None else outliers)
        if not 0 <= share <= 1:
            raise ValueError(f"outliers must be a share from 0 to 1, got {share}")
        mask, own = _chosen(problem, bits, share, check_choices(widths))
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


def outlier_order(W: Array, threshold: float = _THRESHOLD) -> npt.NDArray[np.int64]:
    """Return the columns of W, those with most outliers first, equal ones in their order.

    An outlier is a weight of at least ``threshold`` times the mean magnitude of all.
    """
    magnitudes = np.abs(W.astype(np.float64))
    counts = (magnitudes >= threshold * magnitudes.mean()).sum(0)
    return np.argsort(-counts, kind="stable")


@dataclass(frozen=True, eq=False)
class _Columns:
    """Levels for each column, fitted when it is reached.

    ``shares`` (d,), in the order of rounding, are what columns keep at each end; without them
    ``kept`` (rows, d) says which weights are.
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
        """Return the column rounded to levels of its own, but for what is kept."""
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
        # A kept weight has a label, too, of which nothing is read.
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
    """Return what columns keep at each end, in the order of their rounding."""
    d = problem.W.shape[1]
    shares = np.full(d, _LITTLE)
    order = problem.order[::-1]
    shares[outlier_order(problem.W[:, order])[: round(_MANY * d)]] = _MUCH
    # As published: a block reads those of the first one.
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
        # From two levels on, one of them would take the place of a column's outlier.
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
        least, most = ((float(costs[k]) * columns + fixed) / W.size for k in (0, -1))
        raise SpecError(
            f"bits must be {math.ceil(least * 1000) / 1000:g} to {most:g} for {problem.name} with "
            f"widths {widths} and {count} outliers, got {bits:g}"
        )
    chosen = hull_choice(losses, costs, budget)
    return kept, np.array(widths, np.uint8)[chosen]
