"""One layout for every model: each matrix that a plan names is the weight of a linear layer.

Transformers stores GPT-2's matrices transposed and the experts of a layer as one parameter with
three axes. Here they become linear layers (out_features, in_features) on views of the same memory,
so that everything else finds them by name and can watch and replace them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.known import Experts
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["ExpertList", "check_modules", "standardize", "standardized"]


class ExpertList(torch.nn.Module):
    """Experts with linear layers of their own, called as Transformers calls its fused ones.

    Parameters
    ----------
    fused : torch.nn.Module
        With the parameters that ``description`` names, and the activation function ``act_fn``.
    description : Experts
    """

    def __init__(self, fused: Any, description: Experts) -> None:
        super().__init__()
        self.act_fn: Any = fused.act_fn
        self.description = description
        gate_up = getattr(fused, description.fused_gate_up)
        down = getattr(fused, description.fused_down)
        for index, (both, out) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = both.chunk(2)
            layers = {description.gate: gate, description.up: up, description.down: out}
            expert = torch.nn.ModuleDict({name: _linear(W) for name, W in layers.items()})
            self.add_module(str(index), expert)

    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what the chosen experts give, weighted and summed.

        Parameters
        ----------
        hidden_states : torch.Tensor (tokens, hidden)
        chosen, weights : torch.Tensor (tokens, experts per token)
            Indices of experts, and their shares.
        """
        names = self.description
        total = torch.zeros_like(hidden_states)
        for index in torch.unique(chosen).tolist():
            expert: Any = self.get_submodule(str(index))
            token, position = torch.where(chosen == index)
            x = hidden_states[token]
            inner = self.act_fn(expert[names.gate](x)) * expert[names.up](x)
            y = expert[names.down](inner) * weights[token, position, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


def _linear(W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(W.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def standardize(model: Any, plan: ModelPlan) -> dict[str, torch.nn.Module]:
    """Replace modules of other layouts in place, sharing their memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In Transformers' layout, or in this one already.
    plan : ModelPlan

    Returns
    -------
    dict of str to torch.nn.Module
        The modules that were replaced, by path; ``model.set_submodule`` puts them back.

    Raises
    ------
    ArchitectureError
        If the model lacks a module that its architecture's description names.
    """
    architecture, replaced = plan.architecture, {}
    experts = architecture.experts
    if experts is not None:
        blocks = dict.fromkeys(m.block for m in plan.matrices if m.expert is not None)
        for block in blocks:
            path = f"{architecture.block.format(block)}.{experts.path}"
            fused = _find(model, path, architecture.model_type)
            if hasattr(fused, experts.fused_gate_up):
                replaced[path] = fused
                model.set_submodule(path, ExpertList(fused, experts))
    if architecture.transposed:
        for matrix in plan.matrices:
            module = _find(model, matrix.name, architecture.model_type)
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                continue
            replaced[matrix.name] = module
            model.set_submodule(matrix.name, _linear(module.weight.T, module.bias))
    return replaced


@contextmanager
def standardized(model: Any, plan: ModelPlan) -> Iterator[None]:
    """Standardize a model for a while and put its own modules back afterwards."""
    replaced = standardize(model, plan)
    try:
        yield
    finally:
        for path, module in replaced.items():
            model.set_submodule(path, module)


def _find(model: Any, path: str, kind: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(
            f"the model has no module {path!r}, which the description of {kind!r} names"
        ) from None


def check_modules(plan: ModelPlan, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ArchitectureError unless the plan and the model have the same matrices and norms.

    Parameters
    ----------
    plan : ModelPlan
    shapes : dict
        Shape of every parameter of the model by its name, in the layout of ``standardize``.
    """
    kind = plan.architecture.model_type
    for matrix in plan.matrices:
        found = shapes.get(f"{matrix.name}.weight")
        if found != matrix.shape:
            raise ArchitectureError(
                f"{matrix.name}.weight must have shape {matrix.shape} as {kind!r} is described, "
                f"got {found}"
            )
    for norm in plan.norms:
        if f"{norm}.weight" not in shapes:
            raise ArchitectureError(f"the model has no norm {norm!r} with a weight")
    blocks = [plan.architecture.block.format(i) for i in range(plan.dimensions.blocks)]
    inner = {f"{block}.{name}" for block in blocks for name in plan.architecture.inner}
    described = {m.name for m in plan.matrices} | set(plan.norms) | inner
    for name in shapes:
        # What a description leaves out would not follow a rotation of the stream around it.
        if name.rpartition(".")[0] not in described:
            raise ArchitectureError(
                f"the model has {name}, which the description of {kind!r} says nothing about"
            )
