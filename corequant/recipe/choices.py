"""Names that fields of a recipe accept, and fields that depend on the rotation."""

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
    "check_rotation",
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


def check_rotation(recipe: Any) -> None:
    """Raise RecipeError unless block sizes and factors of a recipe suit its rotation."""
    size, rotation = recipe.block_size, recipe.rotation
    if rotation in ("offline", "heads") and (size is not None or recipe.factors != "none"):
        raise RecipeError(
            f"block_size must be None and factors 'none' with rotation {rotation!r}, which has no "
            f"rotation of down_proj, got block_size={size!r} and factors={recipe.factors!r}"
        )
    if rotation != "online":
        return
    if not isinstance(size, int | None):
        raise RecipeError(
            "block_size must be one integer or None with rotation 'online', since all layers "
            f"share the residual stream's permutation, got {size!r}"
        )
    if recipe.head_block_size is not None:
        raise RecipeError(
            "head_block_size must be None with rotation 'online', which rotates the output "
            f"projection's input by block_size, got {recipe.head_block_size}"
        )
