"""Layers whose widths a budget chooses: units of equal width, their sizes, and rules for them.

Until calibration has measured the layers, a plan shows provisional widths, as even as the budget
allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import join_some
from corequant.errors import BudgetError, RecipeError
from corequant.recipe import LayerRule, Recipe, candidates_of
from corequant.recipe.layers import is_match
from corequant.rounding import Allocation, allocate_bits
from corequant.specs import QuantSpec
from corequant.storage.arrays import stored_bytes
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.rules import is_layer

__all__ = ["Shares", "budget_note", "stand_in", "with_rules"]

_UNSET: dict[str, Any] = {
    field.name: field.default
    for field in fields(Recipe)
    if field.name in ("bits", "size", "candidates", "sensitivity", "units")
}
"""Fields of a budget, and their values in a recipe without one."""


@dataclass(frozen=True)
class Shares:
    """The layers that share a recipe's bits.

    Attributes
    ----------
    recipe : Recipe
    architecture : Architecture
    units : tuple of tuple of MatrixPlan
        Groups of layers that get the same width, in the order of the model.
    fixed : tuple of MatrixPlan
        Quantized layers that have a rule for their weights.
    candidates : tuple of QuantSpec
        Quantizers to choose from, by ascending bits.
    """

    recipe: Recipe
    architecture: Architecture
    units: tuple[tuple[MatrixPlan, ...], ...]
    fixed: tuple[MatrixPlan, ...]
    candidates: tuple[QuantSpec, ...]

    @classmethod
    def of(
        cls, recipe: Recipe, architecture: Architecture, matrices: Sequence[MatrixPlan]
    ) -> Shares:
        """Return the layers of a model that share a recipe's bits.

        Raises
        ------
        RecipeError
            If there are no such layers, or candidates must be named.
        """
        own = [rule.pattern for rule in recipe.layers if rule.weights is not None]
        units: dict[object, list[MatrixPlan]] = {}
        fixed: dict[object, list[MatrixPlan]] = {}
        for matrix in matrices:
            if is_layer(matrix) and matrix.quantized:
                ruled = any(is_match(pattern, matrix.name) for pattern in own)
                unit = _unit_of(matrix, recipe, architecture)
                (fixed if ruled else units).setdefault(unit, []).append(matrix)
        if mixed := [unit for unit in units if unit in fixed]:
            one, other = units[mixed[0]][0].name, fixed[mixed[0]][0].name
            raise RecipeError(
                "a rule for weights must apply to all layers that get the same width, got one for "
                f"{other} and none for {one}"
            )
        if not units:
            raise RecipeError(
                "bits and size require a layer without a rule for its weights, got rules for all "
                f"{len(fixed)}"
            )
        groups = tuple(map(tuple, units.values()))
        given = tuple(row for rows in fixed.values() for row in rows)
        return cls(recipe, architecture, groups, given, candidates_of(recipe))

    @property
    def weights(self) -> int:
        """Number of weights over which ``bits`` is averaged."""
        rows = [*self.fixed, *(row for unit in self.units for row in unit)]
        return sum(row.shape[0] * row.shape[1] for row in rows)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the layers that have a rule for their weights."""
        return sum(stored_bytes(row.shape, row.weights) for row in self.fixed)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each unit in each candidate."""
        rows = [[_bytes(unit, spec) for spec in self.candidates] for unit in self.units]
        return np.array(rows, np.int64)

    def bits(self, size: float) -> float:
        """Return the mean bits per weight if the units take ``size`` bytes."""
        return 8 * (size + self.fixed_bytes) / self.weights

    def allocate(self, losses: Callable[[MatrixPlan, int], float]) -> Allocation:
        """Choose a candidate for each unit within the recipe's bits.

        Parameters
        ----------
        losses : callable
            Returns the loss of a row with the candidate at an index.

        Raises
        ------
        BudgetError
            If the bits can't be met; the message states the range.
        """
        table = np.array(
            [
                [sum(losses(row, k) for row in unit) for k in range(len(self.candidates))]
                for unit in self.units
            ]
        )
        for unit, row in zip(self.units, table, strict=True):
            for k, spec in enumerate(self.candidates):
                if any(spec.group_size and m.shape[1] % spec.group_size for m in unit):
                    row[k] = np.inf
            if not np.isfinite(row).any():
                raise RecipeError(
                    f"a candidate's groups must divide the {unit[0].shape[1]} inputs of "
                    f"{unit[0].name}, got {', '.join(map(str, self.candidates))}"
                )
        sizes, bits = self.sizes(), self.recipe.bits
        if bits is None:
            raise RecipeError("bits must be given to choose widths, got None")
        budget = np.floor(bits * self.weights / 8) - self.fixed_bytes
        try:
            return allocate_bits(table, sizes, float(budget))
        except BudgetError:
            possible = np.where(np.isfinite(table), sizes, sizes.max() + 1)
            least = self.bits(possible.min(1).sum())
            most = self.bits(np.where(np.isfinite(table), sizes, 0).max(1).sum())
            names = join_some([str(spec) for spec in self.candidates])
            raise BudgetError(
                f"bits must be at least {np.ceil(least * 1000) / 1000:g}, the bits of all layers "
                f"in their smallest format, and more than {most:.4g} gains nothing, with {names}; "
                f"got {bits:g}"
            ) from None

    def rules(self, choices: Sequence[int] | npt.NDArray[np.int64]) -> tuple[LayerRule, ...]:
        """Return rules for units whose weights differ from the recipe's, each for many blocks."""
        found: dict[tuple[str, str, QuantSpec], list[str]] = {}
        for unit, choice in zip(self.units, choices, strict=True):
            spec = self.candidates[choice]
            for row in unit if spec != self.recipe.weights else ():
                stem, number, rest = _pieces(row, self.architecture)
                found.setdefault((stem, rest, spec), []).append(number)
        return tuple(
            LayerRule(f"re:{stem}{_any_of(numbers)}{rest}$", spec)
            for (stem, rest, spec), numbers in found.items()
        )

    def settled(self, choices: Sequence[int] | npt.NDArray[np.int64]) -> Recipe:
        """Return the recipe with rules instead of its budget."""
        return with_rules(self.recipe, self.rules(choices))


def with_rules(recipe: Recipe, rules: Iterable[LayerRule]) -> Recipe:
    """Return a recipe with additional rules instead of its budget."""
    return replace(recipe, layers=(*recipe.layers, *rules), **_UNSET)


def _any_of(numbers: Iterable[str]) -> str:
    different = list(dict.fromkeys(numbers))
    return f"({'|'.join(different)})" if len(different) > 1 else different[0]


def _bytes(unit: Sequence[MatrixPlan], spec: QuantSpec) -> int:
    group = spec.group_size
    # A candidate whose groups don't fit is never chosen.
    return sum(stored_bytes(m.shape, spec) for m in unit if not group or m.shape[1] % group == 0)


def _unit_of(matrix: MatrixPlan, recipe: Recipe, a: Architecture) -> object:
    """Return a key that is equal for rows that get the same width."""
    if recipe.units == "inputs":
        return (matrix.block, matrix.role) if matrix.expert is not None else matrix.reads
    return _pieces(matrix, a) if matrix.expert is not None else matrix.name


def _pieces(matrix: MatrixPlan, a: Architecture) -> tuple[str, str, str]:
    """Return a row's name before, at and after the number of its block, as regular expressions.

    In an expert's name, any number matches the expert's index, since all experts get one width.
    """
    assert matrix.block is not None  # rules are only for layers of blocks
    path = a.block_path(matrix.block)
    stem, _, number = path.rpartition(".")
    rest = matrix.name.removeprefix(f"{path}.")
    if matrix.expert is not None and a.experts is not None:
        before, _, tail = rest.partition(f"{a.experts.path}.{matrix.expert}.")
        inner = re.escape(f"{before}{a.experts.path}.")
        return f"{re.escape(stem)}\\.", number, f"\\.{inner}\\d+\\.{re.escape(tail)}"
    return f"{re.escape(stem)}\\.", number, f"\\.{re.escape(rest)}"


def stand_in(shares: Shares) -> Recipe:
    """Return a recipe with provisional widths, as even as the budget allows.

    Raises
    ------
    AccumulatorError, RecipeError
        If a candidate can't be applied to a layer.
    BudgetError
        If the bits can't be met.
    """
    a, sensitivity = shares.architecture, shares.recipe.sensitivity
    if sensitivity == "kl" and (a.enclosed or a.second is not None):
        raise RecipeError(
            f"sensitivity must be output or weights for {a.model_type!r}, since only its blocks "
            f"are quantized, got {sensitivity!r}, which needs predicted probabilities"
        )
    for k in range(len(shares.candidates)):
        # Any choice that is invalid should be refused before any work.
        trial = shares.settled([k] * len(shares.units))
        for row in (row for unit in shares.units for row in unit):
            trial.settings_of(row.name)
    even = shares.allocate(
        lambda row, k: row.shape[0] * row.shape[1] * 4.0 ** -shares.candidates[k].format.bits
    )
    return shares.settled(even.choices)


def budget_note(shares: Shares) -> str:
    """Return a plan's note on widths that are still to be chosen."""
    names = ", ".join(dict.fromkeys(spec.format.name for spec in shares.candidates))
    count, bits = sum(map(len, shares.units)), shares.recipe.bits
    return (
        f"calibration chooses the widths of {count} {'layers' if count > 1 else 'layer'} from "
        f"{names}, within {bits:g} bits per weight on average; the widths of this plan are "
        "provisional"
    )
