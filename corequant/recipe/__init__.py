"""How a model is quantized."""

from __future__ import annotations

from corequant.recipe.model import (
    FACTORS,
    PERMUTATIONS,
    REFERENCES,
    ROTATIONS,
    ROUNDINGS,
    Recipe,
)

__all__ = ["FACTORS", "PERMUTATIONS", "REFERENCES", "ROTATIONS", "ROUNDINGS", "Recipe"]
