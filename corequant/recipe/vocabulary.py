"""Quantizers of the two matrices with a row for each token: embedding and head."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from corequant.errors import RecipeError, SpecError
from corequant.recipe.quantizers import scales_beside
from corequant.specs import Granularity, QuantSpec

__all__ = ["vocabulary_spec", "vocabulary_text"]


def vocabulary_spec(recipe: Any, name: str) -> QuantSpec | None:
    """Return a quantizer of the embedding or the head, which may be given as a string.

    Parameters
    ----------
    recipe : Recipe
        A string searches its scales, whose format goes along with those of the weights, unless it
        says otherwise; ``none`` is None.
    name : str
        Field of the recipe.

    Raises
    ------
    RecipeError
        If it is none for weights.

    Examples
    --------
    >>> from corequant.recipe import Recipe
    >>> str(Recipe(weights="int4:group32:bfloat16", head="int8:channel").head)
    'int8:channel:symmetric:mse:bfloat16'
    """
    value = getattr(recipe, name)
    if isinstance(value, str):
        if value.strip().lower() == "none":
            return None
        try:
            value = QuantSpec.parse(value, **_defaults(recipe))
        except SpecError as error:
            raise RecipeError(f"{name}: {error}") from error
    if value is not None and not isinstance(value, QuantSpec):
        raise RecipeError(f"{name} must be a QuantSpec or None, got {type(value).__name__}")
    if value is not None and value.granularity is Granularity.TOKEN:
        raise RecipeError(f"{name} can't be scaled by token, got {value}; a row's scale is channel")
    return value


def vocabulary_text(recipe: Any, name: str) -> str | None:
    """Return the string that ``vocabulary_spec`` reads as what a recipe has."""
    spec: QuantSpec | None = getattr(recipe, name)
    if spec is None:
        return None
    search, kind = f":{spec.scale_search.value}", f":{spec.scale_format.value}"
    for more in ("", search, kind):
        with suppress(SpecError):
            if QuantSpec.parse(f"{spec}{more}", **_defaults(recipe)) == spec:
                return f"{spec}{more}"
    return f"{spec}{search}{kind}"


def _defaults(recipe: Any) -> dict[str, Any]:
    return {"scale_search": "mse", "scale_format": scales_beside(recipe.weights)}
