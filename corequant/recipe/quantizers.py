"""Quantizers as a recipe reads and writes them."""

from __future__ import annotations

from typing import Any

from corequant.errors import RecipeError, SpecError
from corequant.specs import Granularity, QuantSpec, ScaleFormat

__all__ = [
    "activation_spec",
    "check_specs",
    "scales_beside",
    "spec_text",
    "weight_spec",
]


def weight_spec(value: Any, scales: ScaleFormat = ScaleFormat.FLOAT32) -> Any:
    """Return a quantizer of weights that may be given as a string; it searches its scales then.

    ``scales`` is the format of its scales unless the string names one.
    """
    if not isinstance(value, str):
        return value
    try:
        return QuantSpec.parse(value, scale_search="mse", scale_format=scales)
    except SpecError as error:
        raise RecipeError(str(error)) from error


def scales_beside(weights: QuantSpec) -> ScaleFormat:
    """Return the format of scales that go along with those of a recipe's weights in one file."""
    if weights.scale_format in (ScaleFormat.E8M0, ScaleFormat.E4M3):
        # Readers compute in bfloat16 beside four-bit floats.
        return ScaleFormat.BFLOAT16
    if weights.scale_format is ScaleFormat.POWER_OF_TWO:
        return ScaleFormat.FLOAT32
    return weights.scale_format


def activation_spec(value: Any) -> Any:
    """Return a quantizer of activations that may be given as a string; ``none`` is None."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return None
    try:
        return QuantSpec.parse(value, granularity="token")
    except SpecError as error:
        raise RecipeError(str(error)) from error


def check_specs(weights: Any, activations: Any) -> None:
    """Raise RecipeError unless both are quantizers for what they are meant for, or None."""
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
    """Return a quantizer of weights as ``weight_spec`` reads it."""
    # The default search of weights here is not QuantSpec's.
    text = str(spec)
    search = spec.scale_search.value
    given = any(part.startswith(search) for part in text.split(":"))
    return text if given else f"{text}:{search}"
