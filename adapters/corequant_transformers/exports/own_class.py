"""Transformers' own class of a model, which must have the tensors that are exported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from corequant.errors import ArchitectureError
from corequant_transformers.exports.prospect import Candidate
from corequant_transformers.model.configs import as_config_errors
from corequant_transformers.model.parts import build
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["check_layers", "fused_experts", "own_skeleton"]


def own_skeleton(candidate: Candidate) -> Any:
    """Return a model of Transformers' own class, without weights."""
    file = candidate.folder / "float_config.json"
    with as_config_errors(file, candidate.float_config):
        return build(candidate.config)


def fused_experts(model: Any, plan: ModelPlan) -> Iterator[tuple[int, str]]:
    """Yield block and path of the experts that Transformers holds as one parameter.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model of Transformers' own class.
    plan : ModelPlan
    """
    a = plan.architecture
    blocks = dict.fromkeys(m.block for m in plan.matrices if m.expert is not None)
    for block in blocks:
        if a.experts is None or block is None:
            continue
        path = f"{a.block_path(block)}.{a.experts.path}"
        if hasattr(model.get_submodule(path), a.experts.fused_gate_up):
            yield block, path


def check_layers(candidate: Candidate) -> None:
    """Refuse a model whose tensors are not those of Transformers' own class."""
    model, plan = own_skeleton(candidate), candidate.plan
    kind, e = plan.architecture.model_type, plan.architecture.experts
    fused = dict(fused_experts(model, plan))
    for matrix in plan.quantized:
        if matrix.expert is not None and matrix.block in fused:
            continue
        try:
            layer = model.get_submodule(matrix.name)
        except AttributeError:
            layer = None
        wanted = torch.nn.Embedding if matrix.role == "embedding" else torch.nn.Linear
        if not isinstance(layer, wanted):
            raise ArchitectureError(
                f"{matrix.name} of {kind!r} is not a linear layer of its own in Transformers, and "
                "compressed-tensors quantizes only these"
            )
        if wanted is torch.nn.Linear and type(layer).forward is not wanted.forward:
            raise ArchitectureError(
                f"{matrix.name} of {kind!r} is a {type(layer).__name__} in Transformers, which "
                "multiplies by a weight that a compressed layer doesn't have"
            )
    expected = set(model.state_dict())
    if plan.tied:
        expected.discard(f"{plan.architecture.head}.weight")
    if plan.architecture.enclosed:
        expected -= set(model.all_tied_weights_keys)
    if e is not None:
        biases = (e.fused_gate_up_bias, e.fused_down_bias)
        names = [n for n in (e.fused_gate_up, e.fused_down, *biases) if n is not None]
        expected -= {f"{path}.{name}" for path in fused.values() for name in names}
        kinds = ("weight", "bias") if any(biases) else ("weight",)
        rows = [m for m in plan.matrices if m.block in fused and m.expert is not None]
        expected |= {f"{m.name}.{kind}" for m in rows for kind in kinds}
    quantized = {f"{m.name}.weight" for m in plan.quantized}
    different = (expected - quantized) ^ set(candidate.rest())
    if different:
        raise ArchitectureError(
            f"merging changed which tensors {kind!r} has, so that Transformers' own class can't "
            f"load it: {min(different)}"
        )
    if plan.folds and plan.architecture.subtracts_mean:
        # With the same tensors, the class would compute something else.
        raise ArchitectureError(
            f"the norms of {kind!r} subtract the mean in Transformers' own class, which is done in "
            "the weights here, where the residual rotation is merged: other programs would "
            "subtract that of the rotated channels; quantize with rotation 'heads'"
        )
    _check_initialization(model, plan)


def _check_initialization(model: Any, plan: ModelPlan) -> None:
    """Refuse a class that wants weights of layers which hold codes when a model is loaded."""
    for matrix in plan.quantized:
        path = matrix.name.rpartition(".")[0]
        try:
            layer = model.get_submodule(matrix.name)
        except AttributeError:
            # One of the experts that are one parameter.
            continue
        if not isinstance(layer, torch.nn.Linear):
            continue
        del layer.weight
        try:
            model._init_weights(layer)
            if matrix.block is not None:
                model._init_weights(model.get_submodule(path))
        except AttributeError:
            raise ArchitectureError(
                f"{type(model).__name__} sets the weight of {matrix.name} while it is loaded, "
                "which is not there as codes of compressed-tensors"
            ) from None
