"""Transforms of experts that are read few at a time: carried out, and checked, on each that is."""

from __future__ import annotations

from typing import Any

from corequant_transformers.model.streamed_experts import Layers, StreamedExperts
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import (
    Choices,
    FoldedNorm,
    folded_norm,
    hook_rotation,
    transform_module,
)
from corequant_transformers.transforms.verification import (
    acts,
    check_moved,
    check_online,
    fingerprint,
    stays,
)

__all__ = ["transform_experts"]


def transform_experts(
    model: Any, experts: StreamedExperts, plan: ModelPlan, choices: Choices
) -> int:
    """Have a block's experts transformed whenever they are opened; return how many matrices change.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the block open, whose other matrices are not transformed yet.
    experts : StreamedExperts
    plan : ModelPlan
        The block's.
    choices : Choices

    Raises
    ------
    VerificationError
        When an expert is opened, if one of its matrices should change and doesn't.
    """
    rows: dict[int, dict[str, tuple[MatrixPlan, FoldedNorm | None]]] = {}
    changing = set()
    for matrix in plan.matrices:
        if matrix.expert is None:
            continue
        name = matrix.name.removeprefix(f"{experts.path}.{matrix.expert}.")
        # The norm has its gain for as long as the block isn't transformed.
        rows.setdefault(matrix.expert, {})[name] = matrix, folded_norm(model, matrix, plan)
        module = experts.layers(matrix.expert)[name]
        hook_rotation(module, matrix)
        if matrix.online:
            check_online(module, matrix)
        if acts(matrix, plan, choices):
            changing.add(matrix.name)

    def transform(index: int, layers: Layers) -> None:
        for name, (matrix, norm) in rows[index].items():
            layer = layers[name]
            before = fingerprint(layer.weight)
            transform_module(layer, matrix, norm, choices)
            if matrix.name in changing and stays(layer.weight, before, matrix, choices):
                check_moved([matrix.name], len(changing))

    experts.change(transform)
    return len(changing)
