"""What a recipe comes to for one layer."""

from __future__ import annotations

from dataclasses import dataclass

from corequant.rounding.methods import RoundingOptions
from corequant.specs import QuantSpec

__all__ = ["FLOAT", "LayerSettings"]

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
