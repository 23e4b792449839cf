"""Descriptions of what a plan does to each tensor of a model."""

from __future__ import annotations

from typing import Any

from corequant_transformers.planning.matrix_plan import MatrixPlan, Side
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["fates"]


def fates(plan: ModelPlan) -> list[dict[str, Any]]:
    """Return what a plan does to each tensor: name, shape and a phrase.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> table = cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16))
    >>> cqhf.fates(table)[0]
    {'name': 'model.embed_tokens.weight', 'shape': [128, 48], 'fate': 'rotated in columns, float'}
    """
    rows: list[dict[str, Any]] = [
        {"name": f"{m.name}.weight", "shape": list(m.shape), "fate": ", ".join(_acts(m, plan))}
        for m in plan.matrices
    ]
    fate = "becomes neutral" if plan.folds else "follows the residual stream"
    width = [plan.dimensions.hidden]
    if plan.architecture.has_gains:
        rows += [{"name": f"{n}.weight", "shape": width, "fate": fate} for n in plan.norms]
    inside = [(m.norm, m.shape[1]) for m in plan.matrices if m.own_norm]
    return rows + [
        {"name": f"{n}.weight", "shape": [size], "fate": "becomes neutral"} for n, size in inside
    ]


def _acts(matrix: MatrixPlan, plan: ModelPlan) -> list[str]:
    acts = ["norm folded"] if plan.folds_norm(matrix) else []
    sides = [(matrix.input, "columns"), *((s.output, "rows") for s in matrix.row_slices)]
    acts += dict.fromkeys(f"{words} in {where}" for side, where in sides if (words := _words(side)))
    if matrix.online:
        acts.append(f"input rotated at run time by {matrix.input.rotation}")
    acts.append(f"rounded to {matrix.weights}" if matrix.quantized else "float")
    return acts


def _words(side: Side) -> str:
    words = {
        "centered": side.centered,
        "permuted": side.permutation is not None,
        "scaled": side.factors not in (None, "residual"),
        "rotated": side.rotation is not None,
    }
    return " and ".join(word for word, acted in words.items() if acted)
