"""A recipe's rules for layers, checked against a model: names that exist, layers that agree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from corequant.errors import RecipeError
from corequant.recipe import Recipe
from corequant.recipe.layers import is_match
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["check_rules", "fusion_conflict", "is_layer"]

_OUTPUTS = ("attention_output", "mlp_output")
"""Roles of matrices whose input channels are permuted on their own."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_rules(recipe: Recipe, matrices: Sequence[MatrixPlan]) -> None:
    """Refuse rules that have no effect, or one that can't be carried out.

    Parameters
    ----------
    recipe : Recipe
    matrices : sequence of MatrixPlan
        Rows made by the recipe.

    Raises
    ------
    RecipeError
        If a pattern names nothing, nothing is left to quantize, or layers that read the same input
        quantize it differently.
    """
    names = [m.name for m in matrices]
    layers = [m.name for m in matrices if is_layer(m)]
    for pattern in recipe.keep:
        _check_matches("keep must name layers", pattern, names)
    for rule in recipe.layers:
        what = "layers must name layers"
        if not rule.keep:
            what = "layers must name linear layers of decoder blocks"
        if not rule.keep and any(is_match(rule.pattern, name) for name in set(names) - set(layers)):
            what = f"{what} (for embedding and head set 'embeddings' and 'head')"
        among = names if rule.keep else layers
        if rule.optional and not any(is_match(rule.pattern, name) for name in names):
            continue
        found = _check_matches(what, rule.pattern, among)
        outputs = {m.name for m in matrices if m.role in _OUTPUTS}
        if rule.permutation is not None and not outputs.intersection(found):
            raise RecipeError(
                f"permutation of the rule for {rule.pattern!r} must be left out: only layers such "
                f"as {_listed(outputs)} have a permutation of their own, got "
                f"{_listed(found)}"
            )
    if not any(m.quantized for m in matrices):
        raise RecipeError(
            f"keep and layers must leave a layer to quantize, got all {len(layers)} kept"
        )
    _check_inputs(matrices)


def is_layer(matrix: MatrixPlan) -> bool:
    """Return whether a matrix is a linear layer of a decoder block, which rules can be for."""
    return matrix.block is not None and matrix.role not in ("router", "steering")


def _check_matches(rule: str, pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if is_match(pattern, name)]
    if not found:
        raise RecipeError(f"{rule}, got {pattern!r}, which matches none of {_listed(names)}")
    return found


def _listed(names: Iterable[str]) -> str:
    """Return names in one line, those that differ in numbers alone as one."""
    ranges: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(n) for n in _NUMBER.findall(name)]
        seen = ranges.setdefault(_NUMBER.sub("#", name), [[n, n] for n in numbers])
        for pair, n in zip(seen, numbers, strict=True):
            pair[:] = min(pair[0], n), max(pair[1], n)
    texts = []
    for form, pairs in ranges.items():
        text = form
        for least, most in pairs:
            text = text.replace("#", str(least) if least == most else f"{{{least}..{most}}}", 1)
        texts.append(text)
    return ", ".join(texts)


def _check_inputs(matrices: Iterable[MatrixPlan]) -> None:
    """Refuse layers that read the same input and round it differently: it is rounded once."""
    first: dict[str, MatrixPlan] = {}
    for matrix in matrices:
        if not matrix.quantized:
            continue
        other = first.setdefault(matrix.reads, matrix)
        if other.activations != matrix.activations:
            raise RecipeError(
                f"layers that read the same input must have the same activations, got "
                f"{other.activations or 'none'} for {other.name} and "
                f"{matrix.activations or 'none'} for {matrix.name}; give a rule for both"
            )


def fusion_conflict(matrices: Iterable[MatrixPlan]) -> str | None:
    """Return what keeps vLLM from loading the export of a plan, if anything.

    It fuses query, key and value, or gate and up, into one matrix with at most one quantizer.
    """
    first: dict[str, MatrixPlan] = {}
    for matrix in matrices:
        if not is_layer(matrix):
            continue
        other = first.setdefault(matrix.reads, matrix)
        if _scheme(other) != _scheme(matrix):
            return (
                f"vLLM fuses {other.name} and {matrix.name} into one matrix with one quantizer, "
                f"and they are {_words(other)} and {_words(matrix)}"
            )
    return None


def _scheme(matrix: MatrixPlan) -> object:
    return matrix.settings.weights, matrix.activations


def _words(matrix: MatrixPlan) -> str:
    return str(matrix.weights) if matrix.quantized else "float"
