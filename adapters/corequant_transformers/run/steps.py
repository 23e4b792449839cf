"""Names of the steps that quantizing a model takes."""

from __future__ import annotations

from corequant_transformers.model.parts import ENTRY, EXIT, OUTSIDE
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["quantizes", "steps_of"]


def steps_of(plan: ModelPlan) -> list[str]:
    """Return the names of the steps that quantizing a model takes, in their order."""
    blocks = range(plan.dimensions.blocks)
    return [
        *(f"calibrate-{i:05d}" for i in blocks),
        "choose",
        *([OUTSIDE] if plan.architecture.outside else []),
        ENTRY,
        *(f"block-{i:05d}" for i in blocks),
        EXIT,
    ]


def quantizes(step: str) -> bool:
    """Return whether a step's tensors are a part of the quantized model."""
    return step.startswith("block") or step in (OUTSIDE, ENTRY, EXIT)
