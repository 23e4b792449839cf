"""A model's modules: refused where they aren't as described, then brought to one layout.

Transformers stores GPT-2's matrices transposed and the experts of a layer as one parameter with
three axes. Here each matrix that a plan names becomes the weight of a linear layer (out_features,
in_features) on a view of the same memory, so that everything else finds it by name and can replace
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from corequant.errors import ArchitectureError, CheckpointError
from corequant_transformers.architectures.description import Architecture, Experts
from corequant_transformers.model.expert_list import ExpertList, linear_layer
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "check_blocks",
    "check_description",
    "check_modules",
    "check_places",
    "check_untouched",
    "standardize",
    "standardized",
]

_RECOMPUTED: dict[type, str] = {
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(layer, {!r})",
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer, {!r})",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer, {!r})",
}
"""Hooks that recompute a tensor before each call, and what makes it a parameter again."""


def standardize(
    model: Any,
    plan: ModelPlan,
    make: Callable[[Any, Experts, str], ExpertList] = lambda fused, e, path: ExpertList(fused, e),
) -> dict[str, torch.nn.Module]:
    """Replace modules of other layouts in place, sharing their memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In Transformers' layout, or in this one already.
    plan : ModelPlan
    make : callable
        Makes the list of fused experts, of which it gets the description and the path.

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
    for norm in (*plan.norms, *(m.norm for m in plan.matrices if m.norm and m.own_norm)):
        _find(model, norm, architecture.model_type)
    experts = architecture.experts
    if experts is not None:
        blocks = dict.fromkeys(m.block for m in plan.matrices if m.expert is not None)
        for block in blocks:
            path = f"{architecture.block_path(block or 0)}.{experts.path}"
            fused = _find(model, path, architecture.model_type)
            if hasattr(fused, experts.fused_gate_up):
                replaced[path] = fused
                model.set_submodule(path, make(fused, experts, path))
    if architecture.transposed:
        for matrix in plan.matrices:
            module = _find(model, matrix.name, architecture.model_type)
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                continue
            replaced[matrix.name] = module
            model.set_submodule(matrix.name, linear_layer(module.weight.T, module.bias))
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
    for norm in plan.norms if plan.architecture.has_gains else ():
        if f"{norm}.weight" not in shapes:
            raise ArchitectureError(f"the model has no norm {norm!r} with a weight")
    own = {m.norm for m in plan.matrices if m.own_norm}
    described = {m.name for m in plan.matrices} | set(plan.norms) | own
    for name in shapes:
        # What a description leaves out would not follow a rotation of the stream around it.
        beside = any(name.startswith(f"{path}.") for path in plan.architecture.outside)
        if plan.architecture.enclosed:
            beside = plan.architecture.block_index(name) is None
        if not beside and not {name, name.rpartition(".")[0]} & (described | set(plan.inner)):
            raise ArchitectureError(
                f"the model has {name}, which the description of {kind!r} says nothing about"
            )


def check_description(model: Any, plan: ModelPlan) -> None:
    """Raise ArchitectureError unless a description that a directory brings fits its model.

    Parameters
    ----------
    model : torch.nn.Module
        In the layout of ``standardize``.
    plan : ModelPlan
    """
    if not plan.is_shipped:
        check_modules(plan, {name: tuple(t.shape) for name, t in model.state_dict().items()})


def check_untouched(model: Any) -> None:
    """Raise unless the weights of a model are parameters, as its modules' classes made them.

    Parameters
    ----------
    model : torch.nn.Module

    Raises
    ------
    ArchitectureError
        If torch recomputes one each time, as for parametrized and pruned layers.
    CheckpointError
        If a layer holds codes, as after ``torch.ao.quantization.quantize_dynamic``.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.") and ".quantized" in kind.__module__:
            raise CheckpointError(
                f"{name} must hold a float weight, got {kind.__module__}.{kind.__name__}, which "
                "torch's own quantization put in its place; load the float model again and give it"
            )
        if parametrize.is_parametrized(module):
            tensor = next(iter(module.parametrizations))
            how = type(module.parametrizations[tensor][0]).__name__
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
            raise _recomputed(name, tensor, f"parametrization {how}", remedy)
        for hook in module._forward_pre_hooks.values():
            for recomputing, remedy in _RECOMPUTED.items():
                if isinstance(hook, recomputing):
                    found: Any = hook
                    tensor = getattr(found, "_tensor_name", None) or found.name
                    raise _recomputed(name, tensor, type(hook).__name__, remedy.format(tensor))


def _recomputed(name: str, tensor: str, how: str, remedy: str) -> ArchitectureError:
    return ArchitectureError(
        f"{name}.{tensor} must be a parameter, got a tensor that torch's {how} computes whenever "
        f"the layer is called; make it one, with layer = model.get_submodule({name!r}) and {remedy}"
    )


def check_places(model: Any, architecture: Architecture) -> None:
    """Raise ArchitectureError unless a model has its embedding and head where they are described.

    Parameters
    ----------
    model : torch.nn.Module
    architecture : Architecture
        Description of its model type.
    """
    places = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in (architecture.embedding, architecture.head):
        if name in places:
            continue
        # Wrappers of other packages have the config of what is in them.
        inner = (
            f"give the {type(module).__name__} at {path!r} in it"
            for path, module in model.named_modules()
            if path
            and isinstance(module, transformers.PreTrainedModel)
            and {f"{path}.{a}" for a in (architecture.embedding, architecture.head)} <= places
        )
        remedy = "load it with transformers.AutoModelForCausalLM"
        if architecture.enclosed:
            raise ArchitectureError(
                f"the model must be of the class that its config names, which has {name}, got "
                f"{type(model).__name__} without it; load it with that class"
            )
        raise ArchitectureError(
            f"the model must be a causal language model, which has {name} as "
            f"{architecture.model_type!r} is described, got {type(model).__name__} without it; "
            f"{next(inner, remedy)}"
        )


def check_blocks(model: Any, architecture: Architecture, count: int) -> None:
    """Raise ArchitectureError unless each decoder block is a module of its own.

    Parameters
    ----------
    model : torch.nn.Module
    architecture : Architecture
    count : int
        Decoder blocks that the config speaks of.
    """
    seen: dict[int, str] = {}
    places = dict(model.named_modules(remove_duplicate=False))
    for index in range(count):
        path = architecture.block_path(index)
        if path not in places:
            continue
        # A compiled block stands around another, which may be in both places.
        block = places[path]._modules.get("_orig_mod", places[path])
        first = seen.setdefault(id(block), path)
        if first != path:
            raise ArchitectureError(
                f"{first} and {path} must be two modules, got the same one in both places: each "
                "decoder block is calibrated and rounded for its own place; put a copy "
                "(copy.deepcopy) into one of them"
            )
