"""What was done to a model's modules before it was given: refused where weights are not its own."""

from __future__ import annotations

from typing import Any

import transformers
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from corequant.errors import ArchitectureError, CheckpointError
from corequant_transformers.architectures.known import Architecture

__all__ = ["check_blocks", "check_places", "check_untouched"]

_RECOMPUTED: dict[type, str] = {
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(layer, {!r})",
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer, {!r})",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer, {!r})",
}
"""Hooks that recompute a tensor before each call, and what makes it a parameter again."""


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
        path = architecture.block.format(index)
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
