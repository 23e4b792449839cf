"""``corequant formats``."""

from __future__ import annotations

from typing import Any

from corequant.formats import FormatKind
from corequant.formats import formats as known
from corequant.recipe import READERS
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleRounding, ScaleSearch
from corequant.specs import presets as named
from corequant_cli.commands.arguments import Json, print_json
from corequant_cli.tables import choices

__all__ = ["formats"]

_WEIGHTS = (
    *("int8:channel", "int8:group32:float16", "int4:channel", "int4:group32", "int4:group128"),
    *("int4:group32:float16", "int4:group32:asymmetric:float16", "int3:group32", "int2:group16"),
    *("mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "float8_e4m3fn:channel", "nf4"),
)
"""Weights that people ask for."""


def formats(as_json: Json = False) -> None:
    """List number formats, how scales are shared and found, and which program takes what."""
    values = {"formats": _formats(), "parts": _parts(), "weights": _readers()}
    if as_json:
        print_json(values)
    else:
        choices.formats(values)


def _formats() -> dict[str, dict[str, Any]]:
    return {
        name: {
            "kind": form.kind.value,
            "bits": form.bits,
            "minimum": form.minimum,
            "maximum": form.maximum,
        }
        for name, form in known.items()
        if form.kind is not FormatKind.POWER
    }


def _parts() -> dict[str, list[str]]:
    """Return the words that follow a format in the string form of a quantizer, by what they say."""
    groups = {Granularity.GROUP: "group<n>", Granularity.TENSOR_GROUP: "tensor_group<n>"}
    percentile = {ScaleSearch.PERCENTILE: "percentile<p>"}
    rounding = [rule.value for rule in ScaleRounding if rule is not ScaleRounding.NEAREST]
    return {
        "one scale for each": [groups.get(g, g.value) for g in Granularity],
        "zero points": ["symmetric", "asymmetric"],
        "scales found by": [percentile.get(s, s.value) for s in ScaleSearch],
        "scales stored as": [s.value for s in ScaleFormat],
        "powers of two rounded": rounding,
        "whole formats": list(named),
    }


def _readers() -> dict[str, list[str]]:
    """Return the programs that take weights of each kind, as their writers say."""
    from corequant.recipe.readers import takes

    specs = {text: QuantSpec.parse(text) for text in _WEIGHTS}
    return {text: [r for r in READERS if takes(r, spec)] for text, spec in specs.items()}
