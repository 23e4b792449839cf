"""SKIM: a codebook for each row, with a width chosen by its errors, and scales of columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import (
    check_finite,
    check_floating,
    check_index,
    check_number,
    check_numpy,
)
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
"""Bits by which the width of a row may differ from the largest uniform width."""

_REFITS = 2
"""Alternations between fitting levels and updating labels; a third gains less than 0.5 %."""


@dataclass(frozen=True)
class SkimReport(CodingReport):
    """How ``skim`` coded a weight.

    Attributes
    ----------
    widths : dict of int to int
        Number of rows of each width.
    nonconvex_rows : int
        Number of rows whose losses aren't convex in the cost of their widths. If it is 0 and all
        steps cost the same, the greedy choice of widths is optimal.
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
    """Quantize a weight with a codebook for each row and a width chosen by its errors (SKIM).

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
        Floating and finite.
    H : numpy.ndarray (in_features, in_features)
        ``X̃ᵀX̃ / n`` of the inputs that the layer will see.
    bits : float
        Average bits per weight. Everything that is stored counts, including codebooks; with
        ``published``, only the indexes do.
    G : numpy.ndarray (in_features, in_features), optional
        ``XᵀX̃ / n`` with the float network's inputs X; adds Qronos's correction.
    published : bool
        Use the method as published, without the additions made here; see Notes.
    shared : bool
        Let rows share levels, each with a scale; otherwise each row has its own levels.
    sensitivity : numpy.ndarray (out_features, in_features), optional
        Weights of the squared errors in k-means; H_jj by default.
    widths : sequence of int, optional
        Bits that an index may have, 0 to 8. By default, the largest width that all rows could
        have, up to two bits more and up to two fewer, but at least 1; in small weights without
        the widest, if ``bits`` doesn't pay for the tables of all.
    mixed : bool
        Choose a width for each row; otherwise all rows have the largest width that fits ``bits``.
    feedback : bool
        Round column by column, so that later columns compensate for the errors of earlier ones.
    refits : int
        Number of alternations between fitting levels to the output error and updating labels.
    scale : bool, optional
        Multiply columns by scales, found in closed form for the output error. By default, only
        with ``published``.
    damping, act_order, tokens, name
        See ``gptq``, and ``qronos`` if G is given.

    Returns
    -------
    RoundedWeight
        The weight is a ``Codebook``, ``SharedCodebook`` or ``ColumnScaled``; the report is a
        ``SkimReport``.

    Raises
    ------
    HessianError
        If H is asymmetric or not positive semidefinite.
    NonFiniteError, ShapeError, SpecError, TypeError, ValueError
        If an argument is invalid. If ``bits`` is out of range, the error states what is possible.

    Notes
    -----
    SKIM (arXiv 2412.04180) finds levels by k-means, weighted with the diagonal of H or with squared
    gradients, gives one more bit to the row whose output error falls most until the average is
    reached, and then trains one scale for each column on the output error with labels fixed.
    ``published`` follows this, except that k-means is exact, where the paper uses Lloyd's
    algorithm, and that the scales are the solution of a linear system, where the paper uses
    gradient descent.

    By default, rows are rounded by the column loop of GPTQ, or of Qronos if G is given. Widths are
    chosen by the losses after that loop. Levels are fitted to labels by the output error, which is
    a system of K equations for each row. A row takes the result of a step only if it is better.

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
    bits, refits = check_number("bits", bits), check_index("refits", refits, 0)
    if not 0 < bits < math.inf:
        raise ValueError(f"bits must be positive and finite, got {bits}")
    allowed = None if widths is None else check_choices(widths)
    problem = ColumnProblem.of(
        W, H, G, damping=damping, act_order=act_order, tokens=tokens, name=name
    )
    weights = np.diagonal(problem.H).copy()
    if sensitivity is not None:
        weights = _check_sensitivity(sensitivity, problem.W)
    task = _Task(problem, feedback and not published, bits, published, shared and not published)
    scaled = published if scale is None else bool(scale)
    chosen = allowed or task.default_widths(bool(mixed), scaled)
    family: Any = (SharedLevels if task.shared else OwnLevels).fit(problem, weights, chosen)
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
    """A weight, its budget of bits, and the options of ``skim``."""

    problem: ColumnProblem
    feedback: bool
    bits: float
    published: bool
    shared: bool

    @property
    def targets(self) -> Array:
        """``W H``, or ``W G`` if G is given: the right-hand sides of all fits."""
        p = self.problem
        return p.W.astype(p.H.dtype) @ (p.H if p.G is None else p.G)

    def fed_back(self, book: Any) -> Any:
        """Return a book with the same levels and the labels of the column loop."""
        return book.encode(self.problem.run(book))

    def default_widths(self, mixed: bool, scaled: bool) -> tuple[int, ...]:
        """Return the widths around the largest uniform one, ascending.

        The widest are left out if a small weight's budget doesn't pay for the tables of all.
        """
        payable = self._widest(range(MOST_BITS + 1), scaled) or 0
        least = max(1, payable - _REACH)
        most = min(MOST_BITS, max(1, payable) + _REACH)
        for last in range(most, least, -1):
            widths = tuple(range(least, last + 1))
            budget, costs = self._budget(widths, mixed, scaled)
            if float(costs[0]) * len(self.problem.W) <= budget * (1 + 1e-9):
                return widths
        return (least,)

    def _widest(self, widths: Iterable[int], scaled: bool) -> int | None:
        """Return the largest uniform width within the budget, or None."""
        found = None
        for width in widths:
            budget, costs = self._budget((width,), False, scaled)
            if costs[0] * len(self.problem.W) <= budget * (1 + 1e-9):
                found = width
        return found

    def start(
        self, family: Any, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[Any, int]:
        """Return a book with the chosen widths, and the number of rows that aren't convex."""
        rows = len(self.problem.W)
        if not mixed:
            widest = self._widest(widths, scaled)
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
        # Bits reserved for tables of widths that no row has go to the rows.
        used = np.unique(chosen)
        budget, costs = self._budget(tuple(np.array(widths)[used]), True, scaled)
        chosen = used[choose(losses[:, used], costs, budget)]
        return family.book(np.array(widths, np.uint8)[chosen]), faults

    def _payable(
        self, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return ``_budget``'s result, or raise SpecError if no choice of widths meets it."""
        budget, costs = self._budget(widths, mixed, scaled)
        size = self.problem.W.size
        fixed = self.bits * size - budget
        least, most = (float(costs[k]) * len(self.problem.W) for k in (0, -1))
        if not least <= budget * (1 + 1e-9) or (
            self.published and mixed and budget > most * (1 + 1e-9)
        ):
            lower = f"{math.ceil((least + fixed) / size * 1000) / 1000:g}"
            reach = f"{lower} to {most / size:g}" if self.published else f"at least {lower}"
            raise SpecError(
                f"bits must be {reach} for {self.problem.name} with widths {widths}, "
                f"got {self.bits:g}"
            )
        return budget, costs

    def _budget(
        self, widths: tuple[int, ...], mixed: bool, scaled: bool
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the bits available to all rows together, and the bits of a row at each width."""
        rows, columns = self.problem.W.shape
        costs = np.array([float(w) * columns for w in widths])
        fixed = 0
        if not self.published:
            kind: Any = SharedLevels if self.shared else OwnLevels
            costs += [kind.row_bits(w) for w in widths]
            fixed = 16 * columns * scaled + kind.fixed_bits(widths)
            # The labels of each width, and the widths, are padded to whole bytes.
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
