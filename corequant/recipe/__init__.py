"""How a model is quantized."""

from __future__ import annotations

from corequant.recipe.budget import WIDTHS, candidates_of
from corequant.recipe.fields import (
    DTYPES,
    FACTORS,
    PERMUTATIONS,
    REFERENCES,
    ROTATIONS,
    ROUNDINGS,
    SAMPLINGS,
    SENSITIVITIES,
    UNITS,
    has_budget,
)
from corequant.recipe.layers import LayerRule
from corequant.recipe.model import Recipe
from corequant.recipe.preset import (
    DEFAULT_PRESET,
    PRESETS,
    READERS,
    Preset,
    check_reader,
    find_preset,
)
from corequant.recipe.readers import takes
from corequant.recipe.settings import FLOAT, LayerSettings

__all__ = [
    "DEFAULT_PRESET",
    "DTYPES",
    "FACTORS",
    "FLOAT",
    "PERMUTATIONS",
    "PRESETS",
    "READERS",
    "REFERENCES",
    "ROTATIONS",
    "ROUNDINGS",
    "SAMPLINGS",
    "SENSITIVITIES",
    "UNITS",
    "WIDTHS",
    "LayerRule",
    "LayerSettings",
    "Preset",
    "Recipe",
    "candidates_of",
    "check_reader",
    "find_preset",
    "has_budget",
    "takes",
]
