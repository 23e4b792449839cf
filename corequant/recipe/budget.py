"""Budgets of recipes, in bits or bytes, and the quantizers that they choose from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corequant.errors import RecipeError, SpecError
from corequant.formats import FormatKind, find_format
from corequant.recipe.fields import check_specs, scales_beside, weight_spec
from corequant.specs import QuantSpec

__all__ = ["WIDTHS", "candidates_of", "settle_budget"]

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of the integers that a budget chooses from by default."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FAMILIES = (("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"),)
"""Families of formats with the same scales, by ascending bits."""


def settle_budget(recipe: Any) -> dict[str, Any]:
    """Return the fields of a recipe's budget, checked, with strings parsed.

    Parameters
    ----------
    recipe : Recipe

    Raises
    ------
    RecipeError
        If a field is invalid, or two fields contradict each other.
    """
    bits, given = recipe.bits, recipe.candidates
    if bits is not None and recipe.size is not None:
        raise RecipeError(f"size must be None with bits, got {recipe.size!r} and {bits!r}")
    if bits is not None:
        number = not isinstance(bits, bool) and isinstance(bits, int | float)
        if not number or not 0 < bits < math.inf:
            raise RecipeError(f"bits must be a positive number, got {bits!r}")
    size = None if recipe.size is None else _read_size(recipe.size)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise RecipeError(f"candidates must be a list, got {given!r}")
    scales = scales_beside(recipe.weights)
    specs: list[QuantSpec] = []
    for value in given:
        spec = weight_spec(value, scales)
        if spec is None:
            raise RecipeError("candidates must be quantizers, got None")
        check_specs(spec, None)
        if spec in specs:
            raise RecipeError(f"candidates must differ from each other, got {spec} twice")
        specs.append(spec)
    if specs and bits is None and size is None:
        raise RecipeError(
            f"candidates must be left out without bits or size, got {', '.join(map(str, specs))}"
        )
    return {"bits": bits, "size": size, "candidates": tuple(specs)}


def _read_size(value: Any) -> int:
    """Return a size in bytes, which may be given with a unit."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmg]i?b)?", text)
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])
    if size < 1:
        raise RecipeError(f"size must be bytes, or a size such as 80MB or 1.5GiB, got {value!r}")
    return size


def candidates_of(recipe: Any) -> tuple[QuantSpec, ...]:
    """Return the quantizers that a recipe's budget chooses from, by ascending bits.

    By default they are the integers of 2, 3, 4, 5, 6 and 8 bits with the scales of ``weights``, or
    MXFP4, MXFP6 and MXFP8 if ``weights`` is one of these.

    Parameters
    ----------
    recipe : Recipe

    Raises
    ------
    RecipeError
        If ``weights`` has another format, so that candidates must be named.

    Examples
    --------
    >>> from corequant.recipe import Recipe
    >>> from corequant.recipe.budget import candidates_of
    >>> [spec.format.name for spec in candidates_of(Recipe(bits=3.25))]
    ['int2', 'int3', 'int4', 'int5', 'int6', 'int8']
    """
    if recipe.candidates:
        return tuple(sorted(recipe.candidates, key=lambda spec: spec.format.bits))
    weights: QuantSpec = recipe.weights
    form = weights.format
    for family in _FAMILIES:
        specs = [QuantSpec.parse(name) for name in family]
        if (form, weights.scale_format) in [(s.format, s.scale_format) for s in specs]:
            return tuple(replace(weights, format=spec.format) for spec in specs)
    if form.kind is not FormatKind.INTEGER or form.fraction_bits:
        raise RecipeError(
            f"candidates must be named for weights of {form.name}, such as {weights} and int8"
        )
    sign = "int" if form.signed else "uint"
    try:
        return tuple(replace(weights, format=find_format(f"{sign}{bits}")) for bits in WIDTHS)
    except SpecError as error:
        raise RecipeError(f"candidates must be named for weights {weights}: {error}") from error
