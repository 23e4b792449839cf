"""Levels of rows: own levels for each row, or shared ones times a scale of the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from corequant.rounding.codebooks.codebook import Codebook
from corequant.rounding.codebooks.columns import ColumnProblem
from corequant.rounding.codebooks.levels import LevelTable, kmeans_table
from corequant.rounding.codebooks.quadratic import best_levels, best_shared, row_losses
from corequant.rounding.codebooks.shared import SharedCodebook

__all__ = ["Family", "OwnLevels", "SharedLevels", "loss_by_row"]

Array = npt.NDArray[Any]
Widths = tuple[int, ...]
Book = TypeVar("Book", Codebook, SharedCodebook)

_SAMPLE = 1 << 14
"""Weights in the sample that shared levels are first fitted to; ``refit`` improves them later."""

_TURNS = 4
"""Alternations between labels and scales of rows."""


class Family(Protocol[Book]):
    """Levels for each width that a row may have."""

    def book(self, widths: npt.NDArray[np.uint8]) -> Book:
        """Return the weight rounded to nearest with these widths of rows (rows,)."""

    def refit(self, book: Book, targets: Array) -> Book:
        """Return a book with the same labels and levels that lower the output error."""

    def better(self, one: Book, other: Book) -> Book:
        """Return the better of two books, row by row if their rows can be combined."""

    @staticmethod
    def row_bits(width: int) -> int:
        """Return the bits that a row takes in addition to its indexes."""

    @staticmethod
    def fixed_bits(widths: Widths) -> int:
        """Return the bits that don't depend on the number of rows."""


@dataclass(frozen=True, eq=False)
class OwnLevels:
    """Own levels of each row by weighted k-means."""

    problem: ColumnProblem
    table: LevelTable

    @classmethod
    def fit(cls, problem: ColumnProblem, weights: Array, widths: Widths) -> OwnLevels:
        """Find the levels of every width; ``weights`` are (columns,) or (rows, columns)."""
        return cls(problem, kmeans_table(problem.W, weights, [1 << w for w in widths]))

    def book(self, widths: npt.NDArray[np.uint8]) -> Codebook:
        """Return the weight rounded to nearest with these widths of rows (rows,)."""
        levels = np.zeros((len(widths), 1 << int(widths.max())))
        for width in np.unique(widths):
            rows, size = widths == width, 1 << int(width)
            levels[rows, :size] = self.table.levels(size)[rows]
        return Codebook.of(self.problem.W, levels, widths)

    def refit(self, book: Codebook, targets: Array) -> Codebook:
        """Return a book with the same labels and the best levels of each row."""
        return best_levels(book, self.problem.H, targets)

    def better(self, one: Codebook, other: Codebook) -> Codebook:
        """Return a book with each row from the one whose output error is smaller."""
        rows = (loss_by_row(self.problem, other) < loss_by_row(self.problem, one))[:, None]
        levels = np.where(rows, other.levels, one.levels)
        values = np.where(rows, other.dequantize(), one.dequantize())
        return Codebook.of(values, levels, one.widths)

    @staticmethod
    def row_bits(width: int) -> int:
        """Return the bits of a row's levels."""
        return 16 << width

    @staticmethod
    def fixed_bits(widths: Widths) -> int:
        """Return 0: nothing is shared."""
        return 0


@dataclass(frozen=True, eq=False)
class SharedLevels:
    """Levels shared by rows, by weighted k-means of the normalized rows, and scales of rows."""

    problem: ColumnProblem
    weights: Array
    table: LevelTable

    @classmethod
    def fit(cls, problem: ColumnProblem, weights: Array, widths: Widths) -> SharedLevels:
        """Find the levels of every width; ``weights`` are (columns,) or (rows, columns)."""
        W = problem.W.astype(np.float64)
        spread = np.broadcast_to(weights, W.shape).astype(np.float64)
        if not spread.any():
            spread = np.ones(W.shape)
        sizes = _sizes(W, spread)
        count = min(W.size, _SAMPLE)
        places = np.random.default_rng(0).choice(W.size, count, replace=False)
        values = (W / np.where(sizes > 0, sizes, 1)[:, None]).reshape(-1)[places]
        masses = (spread * np.square(sizes)[:, None]).reshape(-1)[places]
        return cls(problem, spread, kmeans_table(values, masses, [1 << w for w in widths]))

    def book(self, widths: npt.NDArray[np.uint8]) -> SharedCodebook:
        """Return the weight rounded to nearest with these widths of rows (rows,)."""
        W = self.problem.W.astype(np.float64)
        tables = {int(w): self.table.levels(1 << int(w)) for w in np.unique(widths)}
        scales = _sizes(W, self.weights)
        book = SharedCodebook.of(W, tables, scales, widths)
        for _ in range(_TURNS):
            levels = book.unit_values().astype(np.float64)
            product = (self.weights * levels * W).sum(1)
            square = (self.weights * np.square(levels)).sum(1)
            good = (product > 0) & (square > 0)
            scales = np.where(good, product / np.where(good, square, 1), scales)
            book = SharedCodebook.of(W, tables, scales, widths)
        return book

    def refit(self, book: SharedCodebook, targets: Array) -> SharedCodebook:
        """Return a book with the same labels, the best scales for them, then the best levels."""
        return best_shared(book, self.problem.H, targets)

    def better(self, one: SharedCodebook, other: SharedCodebook) -> SharedCodebook:
        """Return the better rows of both if their levels are equal, otherwise the better book."""
        before, after = (loss_by_row(self.problem, book) for book in (one, other))
        if any(not np.array_equal(one.tables[w], other.tables[w]) for w in one.tables):
            return other if after.sum() < before.sum() else one
        rows = after < before
        scales = np.where(rows, other.scales, one.scales)
        values = np.where(rows[:, None], other.dequantize(), one.dequantize())
        return SharedCodebook.of(values, one.tables, scales, one.widths)

    @staticmethod
    def row_bits(width: int) -> int:
        """Return the bits of a row's scale."""
        return 16

    @staticmethod
    def fixed_bits(widths: Widths) -> int:
        """Return the bits of all tables."""
        return sum(16 << w for w in widths)


def loss_by_row(problem: ColumnProblem, weight: Any) -> npt.NDArray[np.float64]:
    """Return the output error of each row of a coded weight."""
    return row_losses(problem.W, weight.dequantize(), problem.H, problem.G)


def _sizes(W: Array, weights: Array) -> npt.NDArray[np.float64]:
    """Return the weighted root mean square of each row, unweighted if all its weights are zero."""
    mass = weights.sum(1)
    squares = np.where(mass > 0, (weights * np.square(W)).sum(1), np.square(W).sum(1))
    found: npt.NDArray[np.float64] = np.sqrt(squares / np.where(mass > 0, mass, W.shape[1]))
    return found
