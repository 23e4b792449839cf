"""Decide each region's permutation and factors from its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import corequant as cq
from corequant.recipe import Recipe
from corequant.selection import Selection, select_permutation, select_scales
from corequant_transformers.planning import MatrixPlan, ModelPlan
from corequant_transformers.transforming import Choices

__all__ = ["Calibration", "choose", "needs_second_order", "needs_tokens"]

Array = npt.NDArray[Any]
SECOND_ORDER = ("energy", "energydiff", "rangediff", "auto")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows and the float model's statistics on them; made by ``calibrate``.

    Attributes
    ----------
    tokens : numpy.ndarray (windows, length), int64
    statistics : mapping of str to ActivationStats
        Of what each MLP's ``down`` reads, by its name.
    held_out : mapping of str to ActivationStats
        The same on the last window, which ``statistics`` has not seen then, for choices that are
        judged by tokens; empty where the recipe needs none.
    """

    tokens: npt.NDArray[np.int64]
    statistics: Mapping[str, cq.ActivationStats]
    held_out: Mapping[str, cq.ActivationStats]


def needs_second_order(recipe: Recipe) -> bool:
    """Tell whether the recipe's permutation needs the energy statistic."""
    return recipe.permutation in SECOND_ORDER


def needs_tokens(recipe: Recipe) -> bool:
    """Tell whether the recipe's choices need tokens, not only sums over them."""
    return recipe.permutation in ("rangediff", "auto") or recipe.factors != "none"


def choose(
    plan: ModelPlan,
    calibration: Calibration,
    weight: Callable[[str], Array],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Choices, list[dict[str, Any]]]:
    """Choose permutations and factors for every region.

    Parameters
    ----------
    plan : ModelPlan
    calibration : Calibration
    weight : callable
        Returns the untransformed weight (out_features, in_features) of a region's matrix.
    progress : callable

    Returns
    -------
    choices : Choices
        With the residual stream's signs.
    rows : list of dict
        Plain values for the report, one for each region.
    """
    permutations: dict[str, npt.NDArray[np.int64]] = {}
    factors = plan.draw_signs()
    rows = []
    for index, matrix in enumerate(plan.regions):
        row: dict[str, Any] = {"name": matrix.name}
        order = cq.identity_permutation(matrix.shape[1])
        if matrix.input.permutation is not None:
            chosen = _permutation(plan.recipe, matrix, calibration, index)
            order = permutations[matrix.name] = chosen.permutation
            row |= {"permutation": chosen.method, "errors": chosen.errors}
        if matrix.input.factors is not None:
            found, errors = _factors(plan.recipe, matrix, calibration, weight, order)
            factors[matrix.name] = found
            row |= {"factors": min(errors, key=lambda n: errors[n]), "output_errors": errors}
        rows.append(row | _masses(matrix, calibration, order))
        progress(index + 1, len(plan.regions))
    return Choices(permutations, factors), rows


def _permutation(
    recipe: Recipe, matrix: MatrixPlan, calibration: Calibration, index: int
) -> Selection:
    statistics = calibration.statistics[matrix.name]
    b = matrix.input.rotation or 1
    generator = np.random.default_rng([recipe.seed, index])
    spec = recipe.activations or cq.QuantSpec.parse("int4:token:asymmetric")
    match recipe.permutation:
        case "auto":
            held_out = calibration.held_out[matrix.name].tokens
            return select_permutation(statistics, held_out, b, spec, seed=generator)
        case "massdiff":
            p = cq.massdiff(statistics.mean_abs, b)
        case "zigzag":
            p = cq.zigzag(statistics.absmax, b)
        case "absmax":
            p = cq.absmax(statistics.absmax, b)
        case "random":
            p = cq.random_permutation(statistics.d, generator)
        case "energy":
            p = cq.massdiff(statistics.mean_energy, b)
        case "energydiff":
            p = cq.energydiff(statistics.energy_gram, b)
        case "rangediff":
            start = cq.energydiff(statistics.energy_gram, b)
            p = cq.rangediff(
                statistics.tokens, b, start=start, symmetric=spec.symmetric, seed=generator
            )
        case _:
            p = cq.identity_permutation(statistics.d)
    return Selection(p, recipe.permutation)


def _factors(
    recipe: Recipe,
    matrix: MatrixPlan,
    calibration: Calibration,
    weight: Callable[[str], Array],
    order: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
    seen = calibration.statistics[matrix.name].tokens[:, order]
    judge = calibration.held_out[matrix.name].tokens[:, order]
    W = weight(matrix.name)[:, order].astype(np.float32)
    options: dict[str, Any] = {} if recipe.factors == "scales" else {"exponents": ()}
    spec = recipe.activations or cq.QuantSpec.parse("int4:token:asymmetric")
    return select_scales(seen, judge, W, matrix.input.rotation, spec, recipe.weights, **options)


def _masses(
    matrix: MatrixPlan, calibration: Calibration, order: npt.NDArray[np.int64]
) -> dict[str, float]:
    b = matrix.input.rotation or 1
    mean = calibration.statistics[matrix.name].mean_abs
    return {
        "largest_block_mass": float(cq.block_mass(mean, b).max()),
        "largest_block_mass_permuted": float(cq.block_mass(mean[order], b).max()),
        "mean_block_mass": float(cq.block_mass(mean, b).mean()),
    }
