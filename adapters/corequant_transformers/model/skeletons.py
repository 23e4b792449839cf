"""A model's structure without its weights, which are on torch's meta device and take no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from corequant_transformers.architectures.known import own_config
from corequant_transformers.model.loaders import make_model
from corequant_transformers.model.replicas import replicate
from corequant_transformers.model.surroundings import quiet_transformers

__all__ = ["build", "is_rounded", "skeleton"]


def skeleton(model: Any) -> Any:
    """Return a model's structure with its parameters on the meta device.

    Parameters
    ----------
    model : transformers.PreTrainedModel or transformers.PreTrainedConfig
        A model is left as it is.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, float32, with buffers that don't come from files in place.
    """
    if isinstance(model, torch.nn.Module):
        result: Any = replicate(model, _emptied, plain=True)
        result.config.architectures = own_config(result).architectures
        result.config.return_dict = True
        _settle_buffers(result)
        return result
    result = build(model)
    for owner, module in _with_owners(result):
        module._buffers.update(_computed_buffers(owner, module))
    _compute_buffers_from_above(result)
    return result.eval().requires_grad_(False)


def _with_owners(model: Any, owner: Any = None) -> Iterator[tuple[Any, torch.nn.Module]]:
    """Yield all modules, each with the model of Transformers that it is directly a part of."""
    owner = model if isinstance(model, transformers.PreTrainedModel) else owner
    if owner is not None:
        yield owner, model
    for child in model.children():
        yield from _with_owners(child, owner)


def _computed_buffers(model: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's buffers as Transformers computes them when it loads a model."""
    own = {name: b for name, b in module._buffers.items() if b is not None}
    if not own:
        return {}
    fresh: Any = copy.copy(module)
    made = {
        name: (
            torch.full_like(b, torch.nan, device="cpu", dtype=torch.float32)
            if b.is_floating_point()
            else torch.empty_like(b, device="cpu")
        )
        for name, b in own.items()
    }
    fresh.__dict__["_buffers"] = {**module._buffers, **made}
    model._init_weights(fresh)
    return {name: fresh._buffers[name] for name in own}


def _compute_buffers_from_above(model: Any) -> None:
    """Compute in place the buffers that a module around theirs computes when a model is loaded."""
    absent = {
        path
        for path, module in model.named_modules()
        for b in module._buffers.values()
        if b is not None and b.is_floating_point() and not b.is_meta and bool(b.isnan().any())
    }
    if not absent:
        return
    around = {id(model)}
    for path, module in model.named_modules():
        if any(name.startswith(f"{path}.") for name in absent):
            around.add(id(module))
    for owner, module in _with_owners(model):
        if id(module) in around:
            owner._init_weights(module)


def _settle_buffers(model: Any) -> None:
    """Undo in place what a cast of the model rounded that loading would compute in float32."""
    for owner, module in _with_owners(model):
        own = {n for n in module._non_persistent_buffers_set if module._buffers[n] is not None}
        if not own:
            continue
        computed = _computed_buffers(owner, module)
        for name in own:
            there: Any = module._buffers[name]
            if is_rounded(there, computed[name]):
                module._buffers[name] = computed[name].to(there.device)


def is_rounded(found: torch.Tensor, computed: torch.Tensor) -> bool:
    """Return whether a buffer differs from the one that loading computes by rounding alone."""
    there = found.detach().cpu()
    if there.shape != computed.shape or there.is_floating_point() != computed.is_floating_point():
        return False
    if not computed.is_floating_point():
        return torch.equal(there, computed)
    there = there.float()
    # Devices differ in the last bits of powers.
    if torch.allclose(there, computed, rtol=1e-6, atol=0):
        return True
    half, brain = torch.float16, torch.bfloat16
    casts = [computed.to(a).to(b).float() for a in (half, brain) for b in (half, brain)]
    return any(torch.equal(there, cast) for cast in casts)


def build(config: Any) -> Any:
    """Return a model of a config, in float32, with all of it on the meta device.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Copied.
    """
    config = copy.deepcopy(config)
    # Transformers would make a dtype that it is told the process's own while it builds.
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if each is not None:
            each.dtype = None
    with quiet_transformers(), torch.device("meta"):
        result: Any = make_model(config)
    result.config.dtype = torch.float32
    return torch.nn.Module.float(result)


def _emptied(parameter: torch.Tensor) -> torch.Tensor:
    there = parameter.detach().to("meta", torch.float32)
    return torch.nn.Parameter(there, requires_grad=False)
