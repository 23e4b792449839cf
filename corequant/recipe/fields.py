"""Values that the fields of a recipe accept: names, quantizers, and combinations of them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from corequant._validation import check_index
from corequant.errors import RecipeError, SpecError
from corequant.rounding.methods import rounding_methods
from corequant.selection import METHODS
from corequant.specs import Granularity, QuantSpec, ScaleFormat

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
    "SENSITIVITIES",
    "UNITS",
    "activation_spec",
    "check_choice",
    "check_numbers",
    "check_rotation",
    "check_specs",
    "has_budget",
    "scales_beside",
    "spec_text",
    "vocabulary_spec",
    "vocabulary_text",
    "weight_spec",
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

SENSITIVITIES = ("kl", "output", "weights")
"""Names that ``Recipe.sensitivity`` takes."""

UNITS = ("layers", "inputs")
"""Names that ``Recipe.units`` takes."""

ROUNDINGS = tuple(rounding_methods())
"""Names that ``Recipe.rounding`` takes."""

_LEAST = {"samples": 1, "sequence_length": 2, "seed": 0, "steps": 0, "sign_trials": 1}
_LEAST |= {"expert_tokens": 1}

CHOICES = {
    "permutation": PERMUTATIONS,
    "factors": FACTORS,
    "dtype": DTYPES,
    "rotation": ROTATIONS,
    "rounding": ROUNDINGS,
    "reference": REFERENCES,
    "sampling": SAMPLINGS,
    "rare_experts": RARE_EXPERTS,
    "sensitivity": SENSITIVITIES,
    "units": UNITS,
}
"""Names that each field takes, in the order in which they are checked."""


def check_choice(field: str, value: Any) -> None:
    """Raise RecipeError unless a value is among those of a field."""
    if value not in CHOICES[field]:
        raise RecipeError(f"{field} must be one of {', '.join(CHOICES[field])}, got {value!r}")


def check_numbers(recipe: Any) -> None:
    """Raise RecipeError unless the numbers of a recipe and its flag are valid."""
    size, tolerance = recipe.block_size, recipe.tolerance
    if isinstance(size, str) and size != "auto":
        raise RecipeError(f"block_size must be an integer, several, 'auto' or None, got {size!r}")
    whole = [(name, getattr(recipe, name), least) for name, least in _LEAST.items()]
    if size is not None and size != "auto":
        whole += [("block_size", each, 1) for each in (size if isinstance(size, tuple) else [size])]
    if recipe.head_block_size is not None:
        whole.append(("head_block_size", recipe.head_block_size, 1))
    for name, value, least in whole:
        try:
            check_index(name, value, least)
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from error
    check_rotation(recipe)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise RecipeError(f"tolerance must be a number, got {tolerance!r}")
    if not 0 <= tolerance < float("inf"):
        raise RecipeError(f"tolerance must be finite and not negative, got {tolerance}")
    if not isinstance(recipe.random_signs, bool):
        raise RecipeError(f"random_signs must be true or false, got {recipe.random_signs!r}")


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


def has_budget(recipe: Any) -> bool:
    """Return whether the widths of a recipe's layers are still to be chosen."""
    return recipe.bits is not None or recipe.size is not None


# ---- quantizers


def weight_spec(value: Any, scales: ScaleFormat = ScaleFormat.FLOAT32) -> Any:
    """Return a quantizer of weights; one that is given as a string searches its scales.

    ``scales`` is the format of its scales unless the string names one.
    """
    if not isinstance(value, str):
        return value
    try:
        return QuantSpec.parse(value, scale_search="mse", scale_format=scales)
    except SpecError as error:
        raise RecipeError(str(error)) from error


def scales_beside(weights: QuantSpec) -> ScaleFormat:
    """Return the format of scales that can be combined with the weights' scales in one file."""
    if weights.scale_format in (ScaleFormat.E8M0, ScaleFormat.E4M3):
        # Readers compute in bfloat16 with four-bit floats.
        return ScaleFormat.BFLOAT16
    if weights.scale_format is ScaleFormat.POWER_OF_TWO:
        return ScaleFormat.FLOAT32
    return weights.scale_format


def activation_spec(value: Any) -> Any:
    """Return a quantizer of activations, parsed if it is a string; ``none`` is None."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return None
    try:
        return QuantSpec.parse(value, granularity="token")
    except SpecError as error:
        raise RecipeError(str(error)) from error


def check_specs(weights: Any, activations: Any) -> None:
    """Raise RecipeError unless both are None or quantizers for weights and activations."""
    if weights is not None and not isinstance(weights, QuantSpec):
        raise RecipeError(f"weights must be a QuantSpec, got {type(weights).__name__}")
    if weights is not None and weights.granularity is Granularity.TOKEN:
        raise RecipeError(f"weights can't be scaled by token, got {weights}")
    if activations is not None and not isinstance(activations, QuantSpec):
        got = type(activations).__name__
        raise RecipeError(f"activations must be a QuantSpec or None, got {got}")
    if activations is not None and activations.granularity is Granularity.CHANNEL:
        raise RecipeError(
            f"activations can't be scaled by channel at run time, got {activations}; "
            "use token, group or tensor"
        )


def spec_text(spec: QuantSpec) -> str:
    """Return a quantizer of weights as a string that ``weight_spec`` reads."""
    # The default search for weights differs from QuantSpec's.
    text = str(spec)
    search = spec.scale_search.value
    given = any(part.startswith(search) for part in text.split(":"))
    return text if given else f"{text}:{search}"


# ---- embedding and head, the two matrices with a row for each token


def vocabulary_spec(recipe: Any, name: str) -> QuantSpec | None:
    """Return the quantizer of the embedding or of the head, parsed if it is a string.

    Parameters
    ----------
    recipe : Recipe
        Recipe with the field. A quantizer given as a string searches its scales and stores them in
        the format of the weights' scales, unless the string says otherwise; ``none`` is None.
    name : str
        Field of the recipe.

    Raises
    ------
    RecipeError
        If it is not a quantizer for weights.

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
    """Return a string that ``vocabulary_spec`` reads as the field of a recipe."""
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
