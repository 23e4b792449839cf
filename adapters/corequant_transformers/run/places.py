"""Where the regions of a plan lie."""

from __future__ import annotations

from corequant_transformers.model.parts import part_of
from corequant_transformers.planning.matrix_plan import Region
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["block_of", "width_of"]


def block_of(region: Region, plan: ModelPlan) -> int | None:
    """Return the only decoder block whose layers read a region; None where several do."""
    found = {part_of(f"{reader}.", plan) for reader in region.readers}
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, int) else None


def width_of(plan: ModelPlan, block: int) -> int:
    """Return the width of what a block's MLP rotates at run time; 1 without an MLP."""
    outputs = [m for m in plan.mlp_outputs if m.block == block]
    # An MLP beside experts has a width of its own.
    ordered = sorted(outputs, key=lambda m: m.expert is None)
    return ordered[0].shape[1] if ordered else 1
