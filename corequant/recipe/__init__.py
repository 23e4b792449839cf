"""How a model is quantized."""

from __future__ import annotations

from corequant.recipe.model import (
    DTYPES,
    FACTORS,
    PERMUTATIONS,
    REFERENCES,
    ROTATIONS,
    ROUNDINGS,
    Recipe,
)
from corequant.recipe.settings import FLOAT, LayerSettings

__all__ = [
    "DTYPES",
    "FACTORS",
    "FLOAT",
    "PERMUTATIONS",
    "REFERENCES",
    "ROTATIONS",
    "ROUNDINGS",
    "LayerSettings",
    "Recipe",
]
