"""Decide each region's permutation and factors from its statistics."""

from __future__ import annotations

import math
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
    make_permutation,
    rotation_error,
    select_permutation,
    select_scales,
)
from corequant_transformers.planning import ModelPlan
from corequant_transformers.rows import Region
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
        Of the channels of each region of the plan, by its name.
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
    blocks = {m.name: m.block for m in plan.mlp_outputs}
    sizes = {m.block: 0 for m in plan.mlp_outputs}
    for index, region in enumerate(plan.regions):
        if region.name not in blocks:
            continue
        width, block = region.width, blocks[region.name]
        judged = _judged(region, calibration)
        if not judged.count:
            # An expert that no token was routed to goes along with the others.
            continue
        x = judged.tokens
        spec = _activations(recipe)
        limit = (1 + recipe.tolerance) * rotation_error(x, None, spec)
        chosen = width
        for b in valid_block_sizes(width):
            if b < 16 or b & (b - 1) or b == width:
                continue
            p = _permutation(recipe, region, b, calibration, index).permutation
            if rotation_error(x, b, spec, permutation=p) <= limit:
                chosen = b
                break
        # The experts of a block share one size: the largest that any of them needs.
        sizes[block] = max(sizes[block], chosen)
    return replace(recipe, block_size=tuple(sizes.values()))


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
    for index, region in enumerate(plan.regions):
        count = calibration.statistics[region.name].count
        row: dict[str, Any] = {"name": region.name, "tokens": count}
        order = cq.identity_permutation(region.width)
        if not count:
            # An expert that no token was routed to tells nothing; what is neutral is exact too.
            row["unrouted"] = True
            if region.permuted:
                permutations[region.name] = order
                row["permutation"] = "identity"
            if region.factored:
                factors[region.name] = np.ones(region.width)
                row["factors"] = "none"
            rows.append(row)
            progress(index + 1, len(plan.regions))
            continue
        if region.permuted:
            b = region.side.rotation or 1
            chosen = _permutation(plan.recipe, region, b, calibration, index)
            order = permutations[region.name] = chosen.permutation
            row |= {"permutation": chosen.method, "errors": chosen.errors}
        if region.factored:
            found, errors = _factors(plan.recipe, region, calibration, weight, order)
            factors[region.name] = found
            row |= {"factors": min(errors, key=lambda n: errors[n]), "output_errors": errors}
        rows.append(row | _masses(region, calibration, order))
        progress(index + 1, len(plan.regions))
    return Choices(permutations, factors), rows


def _permutation(
    recipe: Recipe, region: Region, b: int, calibration: Calibration, index: int
) -> Selection:
    statistics = calibration.statistics[region.name]
    generator = np.random.default_rng([recipe.seed, index])
    spec, heads = _activations(recipe), region.side.heads
    if recipe.permutation == "auto":
        held_out = _judged(region, calibration).tokens
        return select_permutation(statistics, held_out, b, spec, heads=heads, seed=generator)
    p = make_permutation(
        recipe.permutation, statistics, b, symmetric=spec.symmetric, heads=heads, seed=generator
    )
    return Selection(p, recipe.permutation)


def _judged(region: Region, calibration: Calibration) -> cq.ActivationStats:
    """Return what judges a choice; an expert without held-out tokens is judged by those it has."""
    held_out = calibration.held_out[region.name]
    return held_out if held_out.count else calibration.statistics[region.name]


def _factors(
    recipe: Recipe,
    region: Region,
    calibration: Calibration,
    weight: Callable[[str], Array],
    order: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
    seen = calibration.statistics[region.name].tokens[:, order]
    judge = _judged(region, calibration).tokens[:, order]
    W = weight(region.name)[:, order].astype(np.float32)
    options: dict[str, Any] = {} if recipe.factors == "scales" else {"exponents": ()}
    options["mean_square"] = calibration.statistics[region.name].mean_square[order]
    spec = _activations(recipe)
    return select_scales(seen, judge, W, region.side.rotation, spec, recipe.weights, **options)


def _activations(recipe: Recipe) -> cq.QuantSpec:
    # Without a quantizer to choose for, the usual one stands in.
    return recipe.activations or cq.QuantSpec.parse("int4:token:asymmetric")


def _masses(
    region: Region, calibration: Calibration, order: npt.NDArray[np.int64]
) -> dict[str, float]:
    b = _block_length(region)
    mean = calibration.statistics[region.name].mean_abs
    return {
        "largest_block_mass": float(cq.block_mass(mean, b).max()),
        "largest_block_mass_permuted": float(cq.block_mass(mean[order], b).max()),
        "mean_block_mass": float(cq.block_mass(mean, b).mean()),
    }


def _block_length(region: Region) -> int:
    # A rotation over repeated heads can be wider than the channels that are counted once.
    return math.gcd(region.side.rotation or 1, region.width)
