"""Check that a model's config rebuilds it, and refuse state that a saved model would lose.

A directory holds tensors and a config. Anything else that a model's modules hold, such as changed
numbers, hooks or classes, would be lost silently, so it is compared before anything is written.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from corequant.errors import ArchitectureError
from corequant_transformers.model.configs import (
    as_config_errors,
    check_config,
    config_of,
    settle_config,
)
from corequant_transformers.model.parts import is_rounded, skeleton
from corequant_transformers.model.replicas import is_own, replicate

__all__ = ["check_rebuilt", "rebuild"]

_CONFIG = Path("the model's config")
_UNKNOWN = object()

_FREE = frozenset(
    "all_tied_weights_keys architectures attn_implementation bos_token_id dtype eos_token_id "
    "gradient_checkpointing hf_device_map hf_quantizer id2label inplace is_gradient_checkpointing "
    "is_quantized label2id loss_type max_seq_len_cached name_or_path output_attentions "
    "output_hidden_states pad_token_id padding_idx return_dict rope_deltas scale_grad_by_freq "
    "sparse tie_word_embeddings torch_dtype training transformers_version use_cache vocab_size "
    "warnings_issued".split()
)
"""Attributes of modules and fields of configs on which a loaded model's logits don't depend."""

_METHODS = (types.FunctionType, property, classmethod, staticmethod)
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


def rebuild(text: str) -> Any:
    """Return the structure that loading builds from the text of a model's config.

    Raises
    ------
    CheckpointError
        If Transformers can't make a model from it.
    """
    values = json.loads(text)
    check_config(values, _CONFIG)
    with as_config_errors(_CONFIG, values):
        config = config_of(values)
        return skeleton(settle_config(config, _CONFIG))


def check_rebuilt(model: Any, expected: Any, replaced: Collection[str] = ()) -> None:
    """Raise unless a model computes what the structure built from its config computes.

    Parameters
    ----------
    model : torch.nn.Module
        Only read.
    expected : torch.nn.Module
        The structure that loading builds, in the model's layout.
    replaced : collection of str
        Paths of quantized layers, of which only biases, hooks and functions are compared.

    Raises
    ------
    ArchitectureError
        Names the first module and attribute that differ, and both values.
    """
    found = dict(replicate(model).named_modules(remove_duplicate=False))
    wanted = dict(expected.named_modules(remove_duplicate=False))
    for path, module in wanted.items():
        given = found.get(path)
        if given is None:
            raise _differs(path, _name(type(module)), "no module there")
        if path not in replaced:
            _check_class(path, type(given), type(module))
            _check_attributes(path, given, module)
            _check_buffers(path, given, module)
        _check_tensors(path, given, module, biases_only=path in replaced)
    for path, module in found.items():
        _check_functions(path, module)
        parent = found.get(path.rpartition(".")[0])
        if path not in wanted and isinstance(parent, _CONTAINERS):
            raise _differs(path, "absent", _name(type(module)))
        if path not in wanted:
            for name in _stored(module):
                raise _differs(f"{path}.{name}", "absent", "a tensor")


def _differs(what: str, wanted: str, got: str) -> ArchitectureError:
    return _lost(
        f"{what or 'the model'} must be {wanted} as in a model built from its config, got {got}",
        "set it through the config, or undo it",
    )


def _lost(message: str, remedy: str) -> ArchitectureError:
    return ArchitectureError(
        f"{message}: loading builds the saved model from its config, and it would compute something"
        f" else; {remedy}, or keep the result in memory without saving it"
    )


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(kind: type) -> str:
    return kind.__qualname__


def _stored(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own tensors that a state dict holds."""
    own = {**module._parameters, **module._buffers}
    passing = module._non_persistent_buffers_set
    return {k: v for k, v in own.items() if v is not None and k not in passing}


def _check_tensors(path: str, given: Any, module: Any, *, biases_only: bool) -> None:
    found, wanted = _stored(given), _stored(module)
    names = {"bias"} if biases_only else found.keys() | wanted.keys()
    for name in sorted(names):
        if (name in found) != (name in wanted):
            told = ["a tensor" if name in tensors else "absent" for tensors in (wanted, found)]
            raise _differs(_at(path, name), *told)


def _check_class(path: str, given: type, wanted: type) -> None:
    if given is wanted:
        return
    if not issubclass(given, wanted):
        raise _differs(path, _name(wanted), _name(given))
    for kind in given.__mro__[: given.__mro__.index(wanted)]:
        for name, value in vars(kind).items():
            known = name == "__call__" or (hasattr(wanted, name) and not name.startswith("__"))
            if known and isinstance(value, _METHODS):
                raise _differs(path, _name(wanted), f"{_name(given)} with its own {name}")


def _check_attributes(path: str, given: Any, module: Any) -> None:
    advanced = _has_changing_rope(module)
    for name, value in module.__dict__.items():
        # Dropout is off wherever a quantized model is used.
        if name.startswith("_") or name in _FREE or "drop" in name:
            continue
        if isinstance(module, torch.nn.Dropout) or (advanced and "max_seq_len_cached" in name):
            continue
        other = getattr(given, name, _UNKNOWN)
        if isinstance(value, transformers.PreTrainedConfig):
            _check_config(_at(path, name), other, value)
        else:
            _check_value(_at(path, name), other, value)
    for name, value in given.__dict__.items():
        usual = getattr(type(module), name, _UNKNOWN)
        if name in module.__dict__ or name.startswith("_") or name in _FREE or callable(usual):
            continue
        if usual is not _UNKNOWN and not isinstance(usual, property):
            _check_value(_at(path, name), value, usual)


def _check_value(what: str, given: Any, wanted: Any) -> None:
    expected = _plain(wanted)
    if expected is not _UNKNOWN and _plain(given) != expected:
        raise _differs(what, repr(wanted)[:80], repr(given)[:80])


def _check_config(what: str, given: Any, wanted: Any) -> None:
    if not isinstance(given, transformers.PreTrainedConfig):
        raise _differs(what, _name(type(wanted)), repr(given)[:80])
    _check_fields(what, given.to_dict(), wanted.to_dict(), wanted.sub_configs)


def _check_fields(what: str, given: Any, wanted: dict[str, Any], parts: Collection[str]) -> None:
    for name, value in wanted.items():
        found = given.get(name) if isinstance(given, dict) else _UNKNOWN
        if name.startswith("_") or name in _FREE or "drop" in name:
            continue
        if name in parts and isinstance(value, dict):
            _check_fields(f"{what}.{name}", found, value, ())
        else:
            _check_value(f"{what}.{name}", found, value)


def _plain(value: Any) -> Any:
    """Return what two values are compared by, or ``_UNKNOWN`` for those that can't be compared."""
    if isinstance(value, types.NoneType | bool | int | float | str | torch.dtype):
        return repr(value) if value != value else value
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, functools.partial):
        return (_plain(value.func), _plain(value.args), _plain(value.keywords))
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return (value.__module__, value.__qualname__)
    return _UNKNOWN


def _check_buffers(path: str, given: Any, module: Any) -> None:
    """Compare what is computed when a model is loaded."""
    for name in sorted(module._non_persistent_buffers_set):
        wanted, found = module._buffers.get(name), getattr(given, name, None)
        # It depends on the longest sequence so far, and is computed from the original buffer.
        if _has_changing_rope(module) and f"original_{name}" in module._buffers:
            continue
        if wanted is None or wanted.is_meta:
            continue
        if not isinstance(found, torch.Tensor) or not is_rounded(found, wanted):
            raise _differs(_at(path, name), _numbers(wanted), _numbers(found))


def _has_changing_rope(module: Any) -> bool:
    kinds = str(getattr(module, "rope_type", ""))
    return "dynamic" in kinds or "longrope" in kinds


def _numbers(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)[:80]
    values = tensor.detach().flatten()[:3].tolist()
    more = ", ..." if tensor.numel() > 3 else ""
    return f"[{', '.join(f'{v:.6g}' for v in values)}{more}]"


def _check_functions(path: str, module: Any) -> None:
    """Refuse hooks, and functions that replace methods."""
    for name in _exchanged(module):
        # A model's own other methods have no part in what its modules compute.
        if path or name == "forward":
            raise _lost(
                f"{_at(path, name)} must be its class's method, got a function in its place",
                "delete it",
            )
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            # Transformers' own only watch.
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                got = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise _lost(
                    f"{path or 'the model'} must have no forward hooks, got {got}", "remove it"
                )


def _exchanged(module: Any) -> Iterator[str]:
    if hasattr(module, "_hf_hook"):
        # Accelerate's stand-ins move tensors between devices, and compute the same.
        return
    for name, value in module.__dict__.items():
        method = getattr(type(module), name, None)
        if isinstance(value, torch.nn.Module) or not callable(value) or not callable(method):
            continue
        if not is_own(value, module, name):
            yield name
