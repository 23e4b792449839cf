"""Decide each region's permutation and factors from its statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.calibration import ActivationStats
from corequant.diagnostics import block_mass
from corequant.errors import CalibrationError
from corequant.hadamard import valid_block_sizes
from corequant.permutation import identity_permutation
from corequant.recipe import LayerSettings
from corequant.selection import (
    Selection,
    make_permutation,
    permutation_needs,
    rotation_error,
    select_permutation,
    select_scales,
)
from corequant.specs import QuantSpec
from corequant_transformers.planning.matrix_plan import Region
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "Calibration",
    "RegionChoice",
    "block_of",
    "check_calibration",
    "choose",
    "choose_block_size",
    "needs_second_order",
    "needs_tokens",
    "width_of",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows and the float model's statistics on them; made by ``calibrate``.

    Attributes
    ----------
    tokens : numpy.ndarray (windows, length), int64
    statistics : mapping of str to ActivationStats
        Statistics of each region's channels, by the region's name.
    held_out : mapping of str to ActivationStats
        The same on the last window, which ``statistics`` has not seen then, for choices that are
        judged by tokens; empty where the recipe needs none.
    routed : mapping of str to int
        Tokens that reached rare experts whose statistics are those of all tokens of their layer, by
        the region's name.
    draw : int
        Index of the draw of the residual stream's signs that is taken.
    draw_losses : tuple of float
        Losses of all draws that were tried.
    data : mapping of str to values, optional
        What the windows were taken from, for the report.
    """

    tokens: npt.NDArray[np.int64]
    statistics: Mapping[str, ActivationStats]
    held_out: Mapping[str, ActivationStats]
    draw: int = 0
    draw_losses: tuple[float, ...] = ()
    data: Mapping[str, Any] | None = None
    routed: Mapping[str, int] = field(default_factory=dict)


def needs_second_order(region: Region) -> bool:
    """Return whether the choice of a region's permutation needs the energy statistic."""
    return "energy_gram" in permutation_needs(region.settings.permutation)


def needs_tokens(plan: ModelPlan) -> bool:
    """Return whether a plan's choices need tokens, not only sums over them."""
    if plan.recipe.block_size == "auto" or plan.recipe.factors != "none":
        return True
    return any("tokens" in permutation_needs(r.settings.permutation) for r in plan.regions)


def block_of(region: Region, plan: ModelPlan) -> int | None:
    """Return the only decoder block whose layers read a region; None where several do."""
    found = {plan.architecture.block_index(f"{reader}.") for reader in region.readers}
    return found.pop() if len(found) == 1 else None


def width_of(plan: ModelPlan, block: int) -> int:
    """Return the width of what a block's MLP rotates at run time; 1 without an MLP."""
    outputs = [m for m in plan.mlp_outputs if m.block == block]
    # A shared MLP has a width of its own.
    ordered = sorted(outputs, key=lambda m: m.expert is None)
    return ordered[0].shape[1] if ordered else 1


def check_calibration(plan: ModelPlan, calibration: Calibration) -> None:
    """Refuse a calibration that lacks what the choices of a plan are made from.

    Raises
    ------
    CalibrationError
        If it was made for another model, or for a recipe that needs less.
    """
    held, tokens = calibration.statistics, needs_tokens(plan)
    for region in plan.regions:
        found = held.get(region.name)
        lacks = None
        if found is None or found.d != region.width:
            lacks = f"{region.width} channels of {region.name}"
        elif needs_second_order(region) and "energy_gram" not in found.to_arrays():
            lacks = f"the second-order statistics of {region.name}"
        elif tokens and region.name not in calibration.held_out:
            lacks = f"tokens of {region.name}"
        if lacks is not None:
            raise CalibrationError(
                f"the calibration must hold {lacks}, which the recipe's permutation "
                f"{region.settings.permutation!r}, block size or factors need, got one without; "
                "call calibrate with this model and this recipe"
            )


def choose_block_size(plan: ModelPlan, indices: Sequence[int], calibration: Calibration) -> int:
    """Return the least block length whose error is within the recipe's tolerance.

    Parameters
    ----------
    plan : ModelPlan
    indices : sequence of int
        Indices of the plan's regions that the MLP of one decoder block reads. Experts share one
        size: the largest that any of them needs.
    calibration : Calibration
    """
    largest = 0
    for index in indices:
        region = plan.regions[index]
        spec = _activations(region.settings)
        judged = _judged(region, calibration)
        if not judged.count:
            # An expert that no token was routed to gets the size of the others.
            continue
        x, width = judged.tokens, region.width
        limit = (1 + plan.recipe.tolerance) * rotation_error(x, None, spec)
        chosen = width
        for b in valid_block_sizes(width):
            if b < 16 or b & (b - 1) or b == width:
                continue
            p = _permutation(plan, region, b, calibration, index).permutation
            if rotation_error(x, b, spec, permutation=p) <= limit:
                chosen = b
                break
        largest = max(largest, chosen)
    return largest


@dataclass(frozen=True, eq=False)
class RegionChoice:
    """Permutation and factors chosen for a region.

    Attributes
    ----------
    permutation : numpy.ndarray (channels,), int64, optional
    factors : numpy.ndarray (channels,), float64, optional
    row : dict
        Plain values for the report.
    """

    permutation: npt.NDArray[np.int64] | None
    factors: npt.NDArray[np.float64] | None
    row: dict[str, Any]


def choose(
    plan: ModelPlan, index: int, calibration: Calibration, weight: Callable[[str], Array]
) -> RegionChoice:
    """Choose permutation and factors for a region.

    Parameters
    ----------
    plan : ModelPlan
    index : int
        Index of one of the plan's regions.
    calibration : Calibration
    weight : callable
        Returns the untransformed weight (out_features, in_features) of a region's matrix.
    """
    region = plan.regions[index]
    seen = calibration.statistics[region.name].count
    count = calibration.routed.get(region.name, seen)
    row: dict[str, Any] = {"name": region.name, "tokens": count}
    order, permutation, factors = identity_permutation(region.width), None, None
    if region.expert and count < plan.recipe.expert_tokens:
        row["rare"] = "shared" if region.name in calibration.routed else "nearest"
    if not count:
        row["unrouted"] = True
    if not seen or row.get("rare") == "nearest":
        # It tells too little; what is neutral is exact too.
        if region.permuted:
            permutation = order
            row["permutation"] = "identity"
        if region.factored:
            factors = np.ones(region.width)
            row["factors"] = "none"
        return RegionChoice(permutation, factors, row)
    if region.permuted:
        b = region.side.rotation or 1
        chosen = _permutation(plan, region, b, calibration, index)
        order = permutation = chosen.permutation
        row |= {"permutation": chosen.method, "errors": chosen.errors}
    if region.factored:
        factors, errors = _factors(plan, region, calibration, weight, order)
        row |= {"factors": min(errors, key=lambda n: errors[n]), "output_errors": errors}
    return RegionChoice(permutation, factors, row | _masses(region, calibration, order))


def _permutation(
    plan: ModelPlan, region: Region, b: int, calibration: Calibration, index: int
) -> Selection:
    statistics, method = calibration.statistics[region.name], region.settings.permutation
    generator = np.random.default_rng([plan.recipe.seed, index])
    spec, heads = _activations(region.settings), region.side.heads
    if method == "auto":
        held_out = _judged(region, calibration).tokens
        return select_permutation(statistics, held_out, b, spec, heads=heads, seed=generator)
    p = make_permutation(
        method, statistics, b, symmetric=spec.symmetric, heads=heads, seed=generator
    )
    return Selection(p, method)


def _judged(region: Region, calibration: Calibration) -> ActivationStats:
    """Return what judges a choice; an expert without held-out tokens is judged by those it has."""
    held_out = calibration.held_out[region.name]
    return held_out if held_out.count else calibration.statistics[region.name]


def _factors(
    plan: ModelPlan,
    region: Region,
    calibration: Calibration,
    weight: Callable[[str], Array],
    order: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
    seen = calibration.statistics[region.name].tokens[:, order]
    judge = _judged(region, calibration).tokens[:, order]
    W = weight(region.name)[:, order].astype(np.float32)
    options: dict[str, Any] = {} if plan.recipe.factors == "scales" else {"exponents": ()}
    options["mean_square"] = calibration.statistics[region.name].mean_square[order]
    spec, weights = _activations(region.settings), region.settings.weights
    assert weights is not None, "regions are those of matrices that are quantized"
    return select_scales(seen, judge, W, region.side.rotation, spec, weights, **options)


def _activations(settings: LayerSettings) -> QuantSpec:
    # Without a quantizer to choose for, the usual one stands in.
    return settings.activations or QuantSpec.parse("int4:token:asymmetric")


def _masses(
    region: Region, calibration: Calibration, order: npt.NDArray[np.int64]
) -> dict[str, float]:
    b = _block_length(region)
    mean = calibration.statistics[region.name].mean_abs
    return {
        "largest_block_mass": float(block_mass(mean, b).max()),
        "largest_block_mass_permuted": float(block_mass(mean[order], b).max()),
        "mean_block_mass": float(block_mass(mean, b).mean()),
    }


def _block_length(region: Region) -> int:
    # A rotation over repeated heads can be wider than the channels that are counted once.
    return math.gcd(region.side.rotation or 1, region.width)
