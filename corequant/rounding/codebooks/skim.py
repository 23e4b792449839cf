"""SKIM: a codebook for each row, as wide as its errors are worth, and scales of columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_finite, check_floating, check_number, check_numpy
from corequant.errors import ShapeError, SpecError
from corequant.rounding.codebooks.allocation import hull_choice, nonconvex_rows, step_choice
from corequant.rounding.codebooks.codebook import MOST_BITS, check_choices
from corequant.rounding.codebooks.coded import CodedWeight, CodingReport, RoundedWeight
from corequant.rounding.codebooks.columns import ColumnProblem
from corequant.rounding.codebooks.families import OwnLevels, SharedLevels, loss_by_row
from corequant.rounding.codebooks.quadratic import best_column_scales
from corequant.rounding.codebooks.scaled import ColumnScaled
from corequant.rounding.codebooks.streams import bits_for

__all__ = ["SkimReport", "skim"]

Array = npt.NDArray[Any]

_REACH = 2
"""Bits that a row may have more or fewer than all rows could have."""

_REFITS = 2
"""Times that levels are fitted to labels, and labels found again; a third gains under 0.5 %."""


@dataclass(frozen=True)
class SkimReport(CodingReport):
    """How ``skim`` coded a weight.

    Attributes
    ----------
    widths : dict of int to int
        Number of rows of each width.
    nonconvex_rows : int
        Rows whose losses aren't convex in what their widths take; where there are none, and all
        steps take the same, no choice of widths is better than the greedy one.
    scaled : bool
        Whether columns have scales.
    """

    widths: dict[int, int] | None = None
    nonconvex_rows: int = 0
    scaled: bool = False


def skim(
    W: Any,
    H: Any,
    bits: float = 3.2,
    *,
    G: Any = None,
    published: bool = False,
    shared: bool = True,
    sensitivity: Any = None,
    widths: Sequence[int] | None = None,
    mixed: bool = True,
    feedback: bool = True,
    refits: int = _REFITS,
    scale: bool | None = None,
    damping: float | None = None,
    act_order: bool = True,
    tokens: int | None = None,
    name: str = "W",
) -> RoundedWeight:
    """Code a weight by rows: each has levels of its own, and as many as its errors are worth.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Floating and finite.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    bits : float
        Average bits of a weight: of all that is stored, codebooks included; where ``published``,
        of the indexes alone.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X: adds Qronos's correction.
    published : bool
        The method as published, without what is added here; see Notes.
    shared : bool
        Let rows share levels, each with a scale; otherwise each row has levels of its own.
    sensitivity : numpy.ndarray (out_features, in_features), optional
        What the square of each weight's error counts in k-means; by default H_jj.
    widths : sequence of int, optional
        Bits that an index may have, 0 to 8; by default up to two more and two fewer than all rows
        could have, at least 1.
    mixed : bool
        Choose a width for each row; otherwise all rows have the largest that ``bits`` pays for.
    feedback : bool
        Round column after column, later ones making up for the errors of earlier ones.
    refits : int
        Times that levels are fitted to labels by the output error, and labels found again.
    scale : bool, optional
        Multiply columns by scales, in closed form for the output error; by default where
        ``published``.
    damping, act_order, tokens, name
        As for ``gptq``, and for ``qronos`` where G is given.

    Returns
    -------
    RoundedWeight
        Its weight is a ``Codebook``, or ``ColumnScaled``; its report a ``SkimReport``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument breaks its rule. Where ``bits`` is out of reach, the error says what is not.

    Notes
    -----
    SKIM (arXiv 2412.04180): levels by k-means weighted with the diagonal of H or with squared
    gradients; a bit more for the row whose output error falls most, until the average is reached;
    then one scale for each column, trained on the output error with labels fixed. ``published``
    does this, with k-means exact instead of Lloyd's, and the scales' minimum, which is a linear
    system, instead of gradient descent.

    Otherwise rows are rounded by the column loop of GPTQ, or Qronos where G is given, each to its
    own levels; the losses by which widths are chosen are those of that loop; levels are fitted to
    labels by the output error, the solution of K equations for each row; and a row takes a new
    step's result only where that is better.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(32, 64))
    >>> H = X.T @ X / 512
    >>> published = cq.skim(W, H, 3, published=True)
    >>> published.bits_per_weight  # with levels and scales of columns
    5.5
    >>> ours = cq.skim(W, H, 4)
    >>> ours.bits_per_weight <= 4 and ours.report.loss < published.report.loss
    True
    """
    problem = ColumnProblem.of(
        W, H, G, damping=damping, act_order=act_order, tokens=tokens, name=name
    )
    bits = check_number("bits", bits)
    if not 0 < bits < math.inf:
        raise ValueError(f"bits must be positive and finite, got {bits}")
    if problem.W.size == 0:
        raise ShapeError(f"W must hold at least one weight, got shape {problem.W.shape}")
    task = _Task(problem, feedback and not published, bits, published, shared and not published)
    chosen = task.default_widths() if widths is None else check_choices(widths)
    weights = np.diagonal(problem.H).copy()
    if sensitivity is not None:
        weights = _check_sensitivity(sensitivity, problem.W)
    family: Any = (SharedLevels if task.shared else OwnLevels).fit(problem, weights, chosen)
    scaled = published if scale is None else bool(scale)
    book, faults = task.start(family, chosen, bool(mixed), scaled)
    nearest = float(loss_by_row(problem, book).sum())
    if task.feedback:
        book = family.better(book, task.fed_back(book))
    for _ in range(0 if published else refits):
        book = family.better(book, family.refit(book, task.targets))
        if task.feedback:
            book = family.better(book, task.fed_back(book))
    weight: CodedWeight = book
    if scaled:
        found = best_column_scales(book.dequantize(), problem.H, task.targets)
        candidate = ColumnScaled.of(book, found)
        if loss_by_row(problem, candidate).sum() < loss_by_row(problem, book).sum():
            weight = candidate
    kinds, counts = np.unique(book.widths, return_counts=True)
    report = SkimReport(
        "skim",
        name,
        weight.bits_per_weight,
        problem.loss(weight.dequantize()),
        nearest,
        problem.damping,
        tuple(int(j) for j in np.flatnonzero(problem.dead)),
        problem.shrinkage,
        {int(w): int(n) for w, n in zip(kinds, counts, strict=True)},
        faults,
        weight is not book,
    )
    return RoundedWeight(weight, report)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is coded, and what of it counts."""

    problem: ColumnProblem
    feedback: bool
    bits: float
    published: bool
    shared: bool

    @property
    def targets(self) -> Array:
        """``W H``, or ``W G``: what outputs are compared with."""
        p = self.problem
        return p.W.astype(p.H.dtype) @ (p.H if p.G is None else p.G)

    def fed_back(self, book: Any) -> Any:
        """Return the same levels with labels from the column loop."""
        return book.encode(self.problem.run(book))

    def default_widths(self) -> tuple[int, ...]:
        """Return the widths around the largest one that all rows could have, ascending."""
        payable = self._widest(range(MOST_BITS + 1)) or 0
        return tuple(range(max(1, payable - _REACH), min(MOST_BITS, max(1, payable) + _REACH) + 1))

    def _widest(self, widths: Iterable[int]) -> int | None:
        """Return the largest width that all rows could have, if there is one."""
        found = None
        for width in widths:
            budget, costs = self._budget((width,), False, False)
            if costs[0] * len(self.problem.W) <= budget * (1 + 1e-9):
                found = width
        return found

    def start(
        self, family: Any, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[Any, int]:
        """Return a book of the widths that are worth most, and how many rows aren't convex."""
        rows = len(self.problem.W)
        if not mixed:
            widest = self._widest(widths)
            self._payable(widths[:1] if widest is None else (widest,), False, scaled)
            return family.book(np.full(rows, widest, np.uint8)), 0
        budget, costs = self._payable(widths, True, scaled)
        losses = np.empty((rows, len(widths)))
        for k, width in enumerate(widths):
            book = family.book(np.full(rows, width, np.uint8))
            if self.feedback:
                book = self.fed_back(book)
            losses[:, k] = loss_by_row(self.problem, book)
        choose = step_choice if self.published else hull_choice
        faults = nonconvex_rows(losses, costs)
        chosen = choose(losses, costs, budget)
        # What was set aside for tables of widths that no row has goes to rows.
        used = np.unique(chosen)
        budget, costs = self._budget(tuple(np.array(widths)[used]), True, scaled)
        chosen = used[choose(losses[:, used], costs, budget)]
        return family.book(np.array(widths, np.uint8)[chosen]), faults

    def _payable(
        self, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the same, or raise SpecError where no choice of widths comes to it."""
        budget, costs = self._budget(widths, mixed, scaled)
        size = self.problem.W.size
        fixed = self.bits * size - budget
        least, most = (float(costs[k]) * len(self.problem.W) for k in (0, -1))
        if not least <= budget * (1 + 1e-9) or (
            self.published and mixed and budget > most * (1 + 1e-9)
        ):
            raise SpecError(
                f"bits must be {math.ceil((least + fixed) / size * 1000) / 1000:g} to "
                f"{(most + fixed) / size:g} for {self.problem.name} with widths {widths}, "
                f"got {self.bits:g}"
            )
        return budget, costs

    def _budget(
        self, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the bits that all rows may take, and what a row takes at each width."""
        rows, columns = self.problem.W.shape
        costs = np.array([float(w) * columns for w in widths])
        fixed = 0
        if not self.published:
            kind: Any = SharedLevels if self.shared else OwnLevels
            costs += [kind.row_bits(w) for w in widths]
            fixed = 16 * columns * scaled + kind.fixed_bits(widths)
            # Labels of each width, and widths, end with a whole byte.
            fixed += 7 + mixed * (7 * len(widths) + rows * bits_for(len(widths)))
        return self.bits * rows * columns - fixed, costs


def _check_sensitivity(sensitivity: Any, W: Array) -> Array:
    check_numpy("sensitivity", sensitivity)
    check_floating("sensitivity", sensitivity)
    if sensitivity.shape != W.shape:
        raise ShapeError(f"sensitivity must have W's shape {W.shape}, got {sensitivity.shape}")
    check_finite("sensitivity", sensitivity)
    if sensitivity.min() < 0:
        raise ValueError(f"sensitivity must not be negative, got {sensitivity.min()}")
    checked: Array = sensitivity
    return checked
