"""Codes, row parameters and column scales of a target, found by a column loop and then refined."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.rounding.binary.additive import Additive
from corequant.rounding.binary.alphabet import Alphabet
from corequant.rounding.binary.partition import Partition
from corequant.rounding.binary.planes import alternate, column_scales, solve_near
from corequant.rounding.binary.start import start_parameters
from corequant.rounding.binary.target import Target

__all__ = ["Coding", "Form", "Table"]

Array = npt.NDArray[Any]

_RUN = 128
"""Columns between two products with the rest of a matrix, if a group is a whole row."""

_ROOM = 1 << 24
"""Upper limit of the numbers in the terms of a chunk of rows."""


@dataclass(frozen=True)
class Form:
    """The structure of an additive weight.

    Attributes
    ----------
    orders : tuple of int
        Number of planes of non-salient columns, and of salient ones.
    split, everywhere : bool
        Whether a bit per weight marks large ones, and whether it does in salient columns, too.
    mean : bool
        Whether rows have means.
    columns : bool
        Whether columns have scales.
    base : int
        Number of values of a digit, 2 or 3.
    group : int or None
        Number of columns that share scales and means of a row; None for all.
    """

    orders: tuple[int, int] = (1, 1)
    split: bool = False
    everywhere: bool = False
    mean: bool = False
    columns: bool = False
    base: int = 2
    group: int | None = None

    def alphabets(self) -> tuple[Alphabet, Alphabet]:
        """Return the alphabets of non-salient and of salient columns."""
        first = Alphabet(1 + self.split, self.orders[0], self.base, self.mean)
        return first, Alphabet(1 + self.everywhere, self.orders[1], self.base, self.mean)


@dataclass(frozen=True, eq=False)
class Table:
    """The levels of a group of columns (levels, rows), ascending for each row."""

    levels: Array
    middles: Array
    codes: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, levels: Array) -> Table:
        """Sort levels (rows, codes)."""
        order = np.argsort(levels, axis=1, kind="stable")
        ordered = np.ascontiguousarray(np.take_along_axis(levels, order, 1).T)
        middles = (ordered[1:] + ordered[:-1]) / 2
        return cls(ordered, middles, np.ascontiguousarray(order.T.astype(np.uint8)))

    def nearest(self, w: Array, scale: Any) -> tuple[Array, Array]:
        """Return the values nearest to w (rows,) in a column with this scale, and their codes."""
        if len(self.middles) == 1:
            above = w / scale > self.middles[0]
            values = np.where(above, self.levels[1], self.levels[0]) * scale
            return values, np.where(above, self.codes[1], self.codes[0])
        rank = (w / scale > self.middles).sum(0)
        rows = np.arange(len(w))
        return self.levels[rank, rows] * scale, self.codes[rank, rows]


class Coding:
    """Codes (rows, columns), parameters and scales of a target, in the order of its loop.

    Parameters
    ----------
    target : Target
    form : Form
    salient : numpy.ndarray (columns,), bool
        Mask of the salient columns, in the order of the weight.
    """

    def __init__(self, target: Target, form: Form, salient: Array) -> None:
        rows, d = target.values.shape
        self.target, self.form, self.alphabets = target, form, form.alphabets()
        self.kinds = salient[target.order].astype(np.int64)
        self.live = (~target.dead)[target.order]
        self.group = form.group or d
        self.groups = target.order // self.group
        self.codes = np.zeros((rows, d), np.uint8)
        self.values = np.zeros_like(target.values)
        self.scales = np.ones(d, target.values.dtype)
        count = -(-d // self.group)
        self.parameters = [
            np.zeros((count, rows, len(a.patterns[0])), target.values.dtype) for a in self.alphabets
        ]
        self.tables: dict[tuple[int, int], Table] = {}

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of columns that are coded one after another, of one group each."""
        d = len(self.groups)
        if self.form.group is None:
            edges = [*range(d, 0, -_RUN), 0][::-1]
        else:
            edges = [0, *(np.flatnonzero(np.diff(self.groups)) + 1).tolist(), d]
        return list(pairwise(edges))[::-1]

    def start(self, first: int, last: int, values: Array, weights: Array, steps: int) -> None:
        """Choose the parameters of a run's group for its values (rows, n)."""
        group = int(self.groups[first])
        scales = self.scales[first:last]
        for kind, alphabet in enumerate(self.alphabets):
            here = self.kinds[first:last] == kind
            if not here.any():
                continue
            # Columns that no input reaches are ignored, unless there are no others.
            living = here & self.live[first:last]
            here = living if living.any() else here
            inside = values[:, here] / scales[here]
            found = start_parameters(inside, alphabet)
            found, _ = alternate(inside, alphabet, found, weights[here], steps)
            self._set(group, kind, found)

    def start_columns(self) -> None:
        """Choose column scales by magnitude, once for the whole loop."""
        size = np.abs(self.target.values)
        row = size[:, self.live].mean(1) if self.live.any() else size.mean(1)
        ratio = size / np.where(row > 0, row, 1)[:, None]
        scales = ratio.mean(0)
        live = (scales > 0) & self.live
        if live.any():
            scales = scales / np.exp(np.log(scales[live]).mean())
        stored = _halved(np.where(live, scales, 1), 0).astype(self.scales.dtype)
        self.scales = np.where(stored > 0, stored, 1)

    def code(self, refit: int) -> None:
        """Choose codes column by column, compensating for the errors of earlier columns.

        Parameters of a group are chosen when the loop reaches it, and refined with its codes
        ``refit`` times; parameters of whole rows must have been chosen before.
        """
        target, L = self.target, self.target.factor.L
        errors = np.zeros_like(target.values)
        curvature = np.diagonal(L) ** 2
        for first, last in self.runs():
            sums = errors[:, last:] @ L[last:, first:last]
            block = np.ascontiguousarray(L[first:last, first:last])
            if self.form.group is not None:
                ideal = target.values[:, first:last] + _undone(sums, block)
                self.start(first, last, ideal, curvature[first:last], 8)
                self._code_run(first, last, sums, block)
                metric = block @ block.T
                for _ in range(refit):
                    gap = ideal - self.values[:, first:last]
                    self._fit(first, last, gap @ metric, metric)
                    gap = ideal - self.values[:, first:last]
                    self._sweep(first, last, gap @ metric, metric)
            else:
                self._code_run(first, last, sums, block)
            errors[:, first:last] = target.values[:, first:last] - self.values[:, first:last]

    def refine(self, rounds: int) -> None:
        """Refine scales and codes alternately in the metric of the whole row.

        Each step is optimal with everything else fixed, up to the rounding of scales.
        """
        H = self.target.H
        for _ in range(rounds):
            if self.form.columns:
                self._fit_columns()
            pull = (self.target.values - self.values) @ H
            for first, last in self._spans():
                before = self.values[:, first:last].copy()
                self._fit(first, last, pull[:, first:last], H[first:last, first:last])
                if first or last < len(H):
                    pull -= (self.values[:, first:last] - before) @ H[first:last]
                else:
                    pull = (self.target.values - self.values) @ H
            for first, last in self.runs():
                before = self.values[:, first:last].copy()
                self._sweep(first, last, pull[:, first:last], H[first:last, first:last])
                pull -= (self.values[:, first:last] - before) @ H[first:last]

    def loss(self) -> float:
        """Return the squared error in the metric of the damped H."""
        gap = self.target.values - self.values
        return float(np.einsum("ij,ij->", gap, gap @ self.target.H, dtype=np.float64))

    def weight(self, rotation: int | None) -> Additive:
        """Return the packed weight."""
        form, back = self.form, np.argsort(self.target.order)
        codes, kinds = self.codes[:, back], self.kinds[back]
        rows, d = codes.shape
        present = [k for k in (0, 1) if k == 0 or kinds.any()]
        digits = np.zeros((max(form.orders[k] for k in present), rows, d), np.uint8)
        large = np.zeros((rows, d), np.bool_)
        for kind in present:
            here = kinds == kind
            found = self.alphabets[kind].digits(codes[:, here])
            digits[: len(found), :, here] = found
            if self.alphabets[kind].variants == 2:
                large[:, here] = self.alphabets[kind].parts(codes[:, here])
        scales: list[Array] = []
        means: list[Array] = []
        for kind in present:
            width = self.alphabets[kind].width
            for variant in range(self.alphabets[kind].variants):
                part = self.parameters[kind][..., variant * width : (variant + 1) * width]
                if form.mean:
                    means.append(part[..., 0].T)
                scales.extend(part[..., k].T for k in range(form.mean, width))
        partition = None
        if form.split:
            partition = Partition.of(kinds > 0, large, everywhere=form.everywhere)
        elif kinds.any():
            partition = Partition.of(kinds > 0, rows=rows)
        return Additive.of(
            digits,
            np.stack(scales),
            group=self.group,
            orders=form.orders if kinds.any() else (form.orders[0], form.orders[0]),
            base=form.base,
            means=np.stack(means) if means else None,
            column_scales=self.scales[back][None] if form.columns else None,
            partition=partition,
            exponent=self.target.exponent,
            rotation=rotation,
        ).scaled(self.target.scale)

    def _set(self, group: int, kind: int, parameters: Array) -> None:
        """Set parameters, rounded as they are stored."""
        stored = _halved(parameters, self.target.exponent)
        self.parameters[kind][group] = stored
        levels = self.alphabets[kind].levels(self.parameters[kind][group])
        self.tables[group, kind] = Table.of(levels)

    def _restore(self, first: int, last: int) -> None:
        """Recompute values of columns of one group from codes, parameters and scales."""
        group = int(self.groups[first])
        for kind, alphabet in enumerate(self.alphabets):
            here = first + np.flatnonzero(self.kinds[first:last] == kind)
            if len(here):
                values = alphabet.values(self.codes[:, here], self.parameters[kind][group])
                self.values[:, here] = values * self.scales[here]

    def _spans(self) -> list[tuple[int, int]]:
        """Return the runs of columns that share parameters."""
        return [(0, len(self.groups))] if self.form.group is None else self.runs()

    def _code_run(self, first: int, last: int, sums: Array, L: Array) -> None:
        """Choose the codes of a run from the sums of errors so far and its factor L."""
        group, behind = int(self.groups[first]), np.ascontiguousarray(sums.T)
        centers = np.ascontiguousarray(self.target.values[:, first:last].T)
        for j in range(last - first - 1, -1, -1):
            wanted = centers[j] + behind[j] / L[j, j]
            table = self.tables[group, int(self.kinds[first + j])]
            value, code = table.nearest(wanted, self.scales[first + j])
            self.values[:, first + j], self.codes[:, first + j] = value, code
            behind[:j] += L[j, :j, None] * (centers[j] - value)

    def _sweep(self, first: int, last: int, pull: Array, metric: Array) -> None:
        """Update each code of a run to the best one with all others fixed.

        ``pull`` is the error (rows, n) times the metric.
        """
        group, slope = int(self.groups[first]), np.ascontiguousarray(pull.T)
        now = np.ascontiguousarray(self.values[:, first:last].T)
        for j in range(last - first - 1, -1, -1):
            wanted = now[j] + slope[j] / metric[j, j]
            table = self.tables[group, int(self.kinds[first + j])]
            value, code = table.nearest(wanted, self.scales[first + j])
            change = value - now[j]
            if change.any():
                self.values[:, first + j], self.codes[:, first + j] = value, code
                slope -= metric[j, :, None] * change

    def _fit(self, first: int, last: int, pull: Array, metric: Array) -> None:
        """Update the parameters of a group to the best ones for its codes."""
        group = int(self.groups[first])
        kinds = [k for k in (0, 1) if (self.kinds[first:last] == k).any()]
        widths = [self.parameters[k].shape[2] for k in kinds]
        total = sum(widths)
        chunk = max(1, _ROOM // ((last - first) * total))
        found = np.concatenate([self.parameters[k][group] for k in kinds], 1).astype(np.float64)
        for a in range(0, len(found), chunk):
            rows = slice(a, a + chunk)
            terms = self._terms(rows, first, last, kinds)
            heavy = (terms.reshape(-1, last - first) @ metric).reshape(terms.shape)
            system = np.einsum("fij,gij->ifg", heavy, terms, optimize=True).astype(np.float64)
            gap = np.einsum("fij,ij->if", terms, pull[rows]).astype(np.float64)
            start = found[rows]
            right = gap + np.einsum("ifg,ig->if", system, start)
            found[rows] = solve_near(system, right, start)
        place = 0
        for kind, width in zip(kinds, widths, strict=True):
            self._set(group, kind, found[:, place : place + width])
            place += width
        self._restore(first, last)

    def _terms(self, rows: slice, first: int, last: int, kinds: list[int]) -> Array:
        """Return the factors of each parameter (parameters, rows, n), 0 in dead columns."""
        codes = self.codes[rows, first:last]
        factors = self.scales[first:last] * self.live[first:last]
        found: list[Array] = []
        for kind in kinds:
            patterns = self.alphabets[kind].patterns.astype(self.values.dtype)
            side = factors * (self.kinds[first:last] == kind)
            safe = np.where(self.kinds[first:last] == kind, codes, 0)
            found.extend(patterns[:, f][safe] * side for f in range(patterns.shape[1]))
        return np.stack(found)

    def _fit_columns(self) -> None:
        """Update the scales of columns to the best ones for codes and parameters."""
        terms = self.values / self.scales
        found = column_scales(
            self.target.values, terms, self.target.H, self.scales, kept=~self.live
        )
        found = _halved(found, 0).astype(self.scales.dtype)
        self.scales = np.where(found == 0, self.scales, found)
        self.values = terms * self.scales


def _halved(values: Array, exponent: int) -> Array:
    """Return numbers rounded as they are stored, float16 numbers times a power of two."""
    scaled = np.clip(np.ldexp(values, -exponent), -65504, 65504).astype(np.float16)
    return np.ldexp(scaled.astype(np.float64), exponent)


def _undone(sums: Array, L: Array) -> Array:
    """Return ``sums L⁻¹`` for a lower triangular L."""
    from scipy.linalg import solve_triangular

    found: Array = solve_triangular(L, sums.T, lower=True, trans=1, check_finite=False).T
    return found
