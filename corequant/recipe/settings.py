"""A recipe's settings for one layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from corequant.errors import RecipeError, SpecError
from corequant.rounding.accumulators import AccumulatorSpec, check_tile
from corequant.rounding.fitting import check_fitted
from corequant.rounding.methods import RoundingOptions, rounding_methods
from corequant.specs import GROUPED, QuantSpec

__all__ = ["FLOAT", "LayerSettings", "left_out", "read_accumulator"]

_NEAREST = RoundingOptions()


@dataclass(frozen=True)
class LayerSettings:
    """How one linear layer is quantized; by default it isn't.

    Attributes
    ----------
    weights : QuantSpec, optional
        Quantizer of its weight; None leaves the layer in float.
    activations : QuantSpec, optional
        Quantizer of its input at run time; None leaves it in float.
    options : RoundingOptions
        How its weight is rounded.
    permutation : str
        Method that chooses the permutation of its input's channels, where they have one of their
        own.
    """

    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    options: RoundingOptions = _NEAREST
    permutation: str = "identity"


FLOAT = LayerSettings()
"""Of a layer that stays in float."""


def left_out(rounding: str, weights: QuantSpec, *, other: bool) -> dict[str, Any]:
    """Return a recipe's options, and their values without effect, that layers of a rule don't take.

    Parameters
    ----------
    rounding : str
        Method for the layers.
    weights : QuantSpec
        Quantizer of their weights.
    other : bool
        Whether it is another method than the recipe's, whose damping would mean something else.
    """
    method = rounding_methods()[rounding]
    options: dict[str, Any] = {}
    if other:
        options["damping"] = None
    if "correction" not in method.options:
        options["correction"] = 0.0
    if "refit" not in method.options or weights.granularity not in GROUPED:
        options["refit"] = False
    if not method.needs_moments:
        options |= {"magr": 0.0, "reference": "block"}
    try:
        check_fitted(weights)
    except SpecError:
        options["fit_scales"] = False
    return options


def read_accumulator(
    value: Any, weights: QuantSpec, activations: QuantSpec | None
) -> AccumulatorSpec:
    """Return the accumulator that a recipe names, for the products of some weights and activations.

    Raises
    ------
    AccumulatorError
        If it is too narrow for any weight.
    RecipeError
        If it is malformed or doesn't go with the quantizers.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)[x×])?([1-9]\d*)", str(value).strip())
    if found is None:
        raise RecipeError(
            f"accumulator must be a width in bits, or tile and width such as 128x16, got {value!r}"
        )
    if activations is None:
        raise RecipeError(f"accumulator must be None without quantized activations, got {value!r}")
    tile = None if found[1] is None else int(found[1])
    if tile is None and weights.group_size is not None:
        raise RecipeError(
            "accumulator must name a tile that divides the weights' group size "
            f"{weights.group_size}, such as {weights.group_size}x{found[2]}, got {value}"
        )
    spec = AccumulatorSpec(int(found[2]), tile, activations.format)
    check_tile(spec, tile or 1, weights)
    return spec
