"""Names that fields of a recipe take."""

from __future__ import annotations

from typing import Any

from corequant.errors import RecipeError
from corequant.rounding.methods import rounding_methods
from corequant.selection import METHODS

__all__ = [
    "CHOICES",
    "DTYPES",
    "FACTORS",
    "PERMUTATIONS",
    "RARE_EXPERTS",
    "REFERENCES",
    "ROTATIONS",
    "ROUNDINGS",
    "SAMPLINGS",
    "check_choice",
]

PERMUTATIONS = (*METHODS, "auto")
"""Names that ``Recipe.permutation`` takes."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""Names that ``Recipe.dtype`` takes."""

FACTORS = ("none", "signs", "scales")
"""Names that ``Recipe.factors`` takes."""

ROTATIONS = ("merged", "online", "offline", "heads")
"""Names that ``Recipe.rotation`` takes."""

REFERENCES = ("block", "model")
"""Names that ``Recipe.reference`` takes."""

SAMPLINGS = ("consecutive", "random")
"""Names that ``Recipe.sampling`` takes."""

RARE_EXPERTS = ("shared", "nearest")
"""Names that ``Recipe.rare_experts`` takes."""

ROUNDINGS = tuple(rounding_methods())
"""Names that ``Recipe.rounding`` takes."""

CHOICES = {
    "permutation": PERMUTATIONS,
    "factors": FACTORS,
    "dtype": DTYPES,
    "rotation": ROTATIONS,
    "rounding": ROUNDINGS,
    "reference": REFERENCES,
    "sampling": SAMPLINGS,
    "rare_experts": RARE_EXPERTS,
}
"""Names that each field takes, in the order in which they are checked."""


def check_choice(field: str, value: Any) -> None:
    """Raise RecipeError unless a value is among those of a field."""
    if value not in CHOICES[field]:
        raise RecipeError(f"{field} must be one of {', '.join(CHOICES[field])}, got {value!r}")
