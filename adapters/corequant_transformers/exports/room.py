"""The part of a budget that is left for layers in the files of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from corequant.errors import BudgetError, RecipeError
from corequant.recipe import READERS, Recipe, candidates_of, takes
from corequant_transformers.exports.sizes import sizes
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.planning.widths import Shares

__all__ = ["settle_budget"]

_SLACK = 1024
"""Bytes by which a file's header and the alignment of its tensors may differ."""


def settle_budget(
    recipe: Recipe,
    reader: str,
    make_plan: Callable[[Recipe], ModelPlan],
    model: str | Path | Any,
) -> Recipe:
    """Return a recipe with a budget in bits, and candidates that a program can load.

    Parameters
    ----------
    recipe : Recipe
        Recipe with a budget.
    reader : str
        One of ``READERS``.
    make_plan : callable
        Returns the plan of a recipe for the model.
    model : str, Path or transformers.PreTrainedModel

    Raises
    ------
    BudgetError
        If the size can't be met; the message states the range.
    RecipeError
        If the program can load none of the candidates.
    """
    given = candidates_of(recipe)
    candidates = tuple(spec for spec in given if takes(reader, spec))
    if not candidates:
        raise RecipeError(
            f"candidates must be weights that {reader} can load, got "
            f"{', '.join(map(str, given))}; 'corequant formats' lists them"
        )
    if reader == "vllm":
        recipe = replace(recipe, units="inputs")
    recipe = replace(recipe, candidates=candidates)
    if recipe.size is None:
        return recipe
    bits = _bits_for(recipe, reader, make_plan, model)
    return replace(recipe, size=None, bits=bits)


def _bits_for(
    recipe: Recipe, reader: str, make_plan: Callable[[Recipe], ModelPlan], model: Any
) -> float:
    """Return the mean bits per weight with which any choice of widths keeps to the size."""
    size = recipe.size or 0
    plain = replace(recipe, size=None, candidates=())
    table = make_plan(plain)
    shares = Shares.of(recipe, table.architecture, table.matrices)
    beside, reachable = 0, []
    for k, bytes_ in enumerate(shares.sizes().sum(0).tolist()):
        whole = make_plan(replace(shares.settled([k] * len(shares.units))))
        found = sizes(whole, model)[READERS[reader]]
        if found is None:
            raise RecipeError(
                f"size can't be met for {reader}, which can't hold the result in "
                f"{shares.candidates[k]}"
            )
        reachable.append(found)
        beside = max(beside, found - bytes_)
    room = size - beside - _SLACK
    if size < min(reachable) + _SLACK:
        raise BudgetError(
            f"size must be at least {min(reachable) + _SLACK} bytes, and more than "
            f"{max(reachable)} gains nothing, got {size}"
        )
    return shares.bits(room)
