"""Decide each region's permutation and factors from its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import corequant as cq
from corequant.hadamard import valid_block_sizes
from corequant.recipe import Recipe
from corequant.selection import (
    Selection,
    rotation_error,
    select_permutation,
    select_scales,
)
from corequant_transformers.planning import MatrixPlan, ModelPlan
from corequant_transformers.transforming import Choices

__all__ = ["Calibration", "choose", "choose_block_sizes", "needs_second_order", "needs_tokens"]

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
    draw : int
        Which draw of the residual stream's signs is taken.
    draw_losses : tuple of float
        Losses of all draws that were tried.
    """

    tokens: npt.NDArray[np.int64]
    statistics: Mapping[str, cq.ActivationStats]
    held_out: Mapping[str, cq.ActivationStats]
    draw: int = 0
    draw_losses: tuple[float, ...] = ()


def needs_second_order(recipe: Recipe) -> bool:
    """Tell whether the recipe's permutation needs the energy statistic."""
    return recipe.permutation in SECOND_ORDER


def needs_tokens(recipe: Recipe) -> bool:
    """Tell whether the recipe's choices need tokens, not only sums over them."""
    judged = recipe.permutation in ("rangediff", "auto") or recipe.block_size == "auto"
    return judged or recipe.factors != "none"


def choose_block_sizes(plan: ModelPlan, calibration: Calibration) -> Recipe:
    """Return the plan's recipe with a block size for each layer instead of an automatic one."""
    recipe = plan.recipe
    if recipe.block_size != "auto":
        return recipe
    width = plan.dimensions.intermediate
    candidates = [b for b in valid_block_sizes(width) if b >= 16 and b & (b - 1) == 0 and b < width]
    sizes = []
    for index, matrix in enumerate(plan.online):
        x = calibration.held_out[matrix.name].tokens
        spec = _activations(recipe)
        limit = (1 + recipe.tolerance) * rotation_error(x, None, spec)
        chosen = width
        for b in candidates:
            p = _permutation(recipe, matrix.name, b, calibration, index).permutation
            if rotation_error(x, b, spec, permutation=p) <= limit:
                chosen = b
                break
        sizes.append(chosen)
    return replace(recipe, block_size=tuple(sizes))


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
    factors = plan.draw_signs(calibration.draw)
    rows = []
    for index, matrix in enumerate(plan.regions):
        row: dict[str, Any] = {"name": matrix.name}
        order = cq.identity_permutation(matrix.shape[1])
        if matrix.input.permutation is not None:
            b = matrix.input.rotation or 1
            chosen = _permutation(plan.recipe, matrix.name, b, calibration, index)
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
    recipe: Recipe, name: str, b: int, calibration: Calibration, index: int
) -> Selection:
    statistics = calibration.statistics[name]
    generator = np.random.default_rng([recipe.seed, index])
    spec = _activations(recipe)
    match recipe.permutation:
        case "auto":
            held_out = calibration.held_out[name].tokens
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
    spec = _activations(recipe)
    return select_scales(seen, judge, W, matrix.input.rotation, spec, recipe.weights, **options)


def _activations(recipe: Recipe) -> cq.QuantSpec:
    # Without a quantizer to choose for, the usual one stands in.
    return recipe.activations or cq.QuantSpec.parse("int4:token:asymmetric")


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
