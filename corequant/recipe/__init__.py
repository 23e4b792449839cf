"""How a model is quantized."""

from __future__ import annotations

from corequant.recipe.fields import (
    DTYPES,
    FACTORS,
    PERMUTATIONS,
    REFERENCES,
    ROTATIONS,
    ROUNDINGS,
    SAMPLINGS,
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
    "LayerRule",
    "LayerSettings",
    "Preset",
    "Recipe",
    "check_reader",
    "find_preset",
]
