"""Replicas of a model's structure: new modules around the same tensors.

Whatever is done to a model on the way, such as standing in for modules, watching what they read,
or leaving training mode, is done to such a replica. The model that was given may run elsewhere at
the same time, and nothing about it changes, not even for a moment.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.utils.hooks import RemovableHandle

from corequant.errors import ArchitectureError, BackendError, CheckpointError
from corequant_transformers.model.layouts import check_untouched
from corequant_transformers.model.quantized_linear import QuantizedLinear

__all__ = ["check_given", "check_plain", "is_own", "replicate", "standing_in", "unwrap"]

_CONTAINERS = (list, tuple, set, dict, OrderedDict)
_CONFIGS = (transformers.PreTrainedConfig, transformers.GenerationConfig)
_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DECODES_LATER = "ct_decompress_hook"
"""Where compressed-tensors keeps the hook that decodes a model's weights when it is first called:
in place, and with a note in the config that the model's replicas share."""


def unwrap(model: Any) -> Any:
    """Return the Transformers model in a wrapper that computes the same.

    Parameters
    ----------
    model : torch.nn.Module
        Possibly in a wrapper, such as those of ``torch.compile`` or ``torch.nn.DataParallel``.

    Raises
    ------
    TypeError
        If it doesn't contain a Transformers model.
    """
    found = model
    while True:
        if _is_compiled(found):
            found = found._orig_mod
        elif isinstance(found, _PARALLEL):
            found = found.module
        else:
            break
    if not isinstance(found, torch.nn.Module) or not hasattr(found, "config"):
        got = repr(model) if isinstance(model, str) else type(model).__name__
        raise TypeError(
            f"model must be a Transformers model, got {got}; one in a directory is read by "
            "corequant_transformers.Source(path).load(), a quantized one by "
            "corequant_transformers.load(path)"
        )
    if not isinstance(found.config, transformers.PreTrainedConfig):
        raise TypeError(
            f"model must be a Transformers model, got {type(found).__name__}, whose config is a "
            f"{type(found.config).__name__}, not a transformers.PreTrainedConfig; convert config "
            "and weights to a Transformers model first"
        )
    return found


def check_given(model: Any, *, floating: bool = True) -> Any:
    """Return the Transformers model that was given, if all of its weights are there to be read.

    Parameters
    ----------
    model : torch.nn.Module
        May be wrapped, see ``unwrap``.
    floating : bool
        Whether its weights must be numbers, not codes of a quantizer.

    Raises
    ------
    ArchitectureError
        If a parametrization, pruning or the like computes them.
    BackendError
        If weights are offloaded, empty or spread over processes.
    CheckpointError
        If they are codes.
    TypeError
        If it is not a Transformers model.
    """
    found = unwrap(model)
    weights = list(found.named_parameters(remove_duplicate=False))
    weights += list(found.named_buffers(remove_duplicate=False))
    absent = [name for name, tensor in weights if tensor.is_meta]
    if absent:
        raise BackendError(
            f"the model's weights must be in memory, got {len(absent)} of {len(weights)} without "
            f"data (device meta), the first is {absent[0]}: they are offloaded or were never "
            "loaded; give quantize the model's directory, which it reads part by part, or load "
            "the model without device_map and offloading"
        )
    spread = [name for name, tensor in weights if _is_spread(tensor)]
    if spread:
        raise BackendError(
            f"the model's weights must be whole in this process, got {len(spread)} that are "
            f"spread over several, the first is {spread[0]}; give quantize the model's directory, "
            "or gather the weights first"
        )
    if floating:
        check_untouched(found)
        _check_floating(found)
    return found


def check_plain(model: Any, names: Iterable[str], linear_classes: Collection[str] = ()) -> None:
    """Raise unless a model computes what its modules' classes say, and nothing else.

    Rounded layers take the places of others, and are calibrated on what those classes compute.
    Hooks on other modules are run.

    Parameters
    ----------
    model : torch.nn.Module
    names : iterable of str
        Paths of the layers that will be replaced.
    linear_classes : collection of str
        Classes of Transformers that compute what ``torch.nn.Linear`` does in another way.

    Raises
    ------
    ArchitectureError
        If a function stands in for a module's ``forward``, or a layer that will be replaced has
        hooks or a class of its own.
    """
    for name, module in model.named_modules():
        # Accelerate's own stand-in moves tensors between devices, and computes the same.
        own = module.__dict__.get("forward")
        if own is None or hasattr(module, "_hf_hook") or _is_compiled(module):
            continue
        if not is_own(own, module):
            raise ArchitectureError(
                f"{name or 'the model'} must run its class's forward, got a function in its place, "
                "which the quantized model would leave out; delete it for quantize"
            )
    replaced = dict(model.named_modules())
    for name in names:
        layer = replaced.get(name)
        if layer is None:
            continue
        if not hasattr(layer, "_hf_hook") and (layer._forward_hooks or layer._forward_pre_hooks):
            raise ArchitectureError(
                f"{name} must have no hooks, since a quantized layer takes its place and would "
                "leave them out; remove them for quantize"
            )
        kind = type(layer)
        known = kind.__module__.startswith("transformers.") and kind.__name__ in linear_classes
        if (
            isinstance(layer, torch.nn.Linear)
            and kind.forward is not torch.nn.Linear.forward
            and not known
        ):
            raise ArchitectureError(
                f"{name} must be a torch.nn.Linear, got {kind.__name__} with a forward of "
                "its own, which the quantized layer would leave out"
            )


def is_own(function: Any, module: Any, name: str = "forward") -> bool:
    """Return whether a function is a module's method, bound to it or compiled in some way."""
    method = getattr(type(module), name)
    function = getattr(function, "_torchdynamo_orig_callable", function)
    if function is method:
        return True
    if isinstance(function, functools.partial) and not function.keywords:
        return function.func is method and function.args == (module,)
    return getattr(function, "__func__", None) is method and function.__self__ is module


def _is_compiled(model: Any) -> bool:
    # The class itself lies in a package that takes a second to import.
    return isinstance(model, torch.nn.Module) and "_orig_mod" in model._modules


def _is_spread(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def _check_floating(model: Any) -> None:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__} is quantized already by corequant; give the float model "
            "instead"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{type(model).__name__} has a quantization_config, so it is quantized already; "
            "give the float model instead"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATS:
            kinds = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)
            raise CheckpointError(
                f"{name} of the model must be one of {kinds}, got "
                f"{str(parameter.dtype).removeprefix('torch.')}: weights that were quantized "
                "already are not read as numbers; give the float model instead"
            )


def replicate(
    model: Any, weight: Callable[[torch.Tensor], torch.Tensor] | None = None, *, plain: bool = False
) -> Any:
    """Return new modules around a model's tensors, in evaluation mode.

    They have the hooks of the given ones, and methods of their own where those have some. What a
    method that is exchanged for a function looks up by itself are the given modules.

    Parameters
    ----------
    model : torch.nn.Module
        Only read, in steps between which other threads may run it.
    weight : callable, optional
        Called with each parameter, gives the replica's; by default they are the same objects.
        Parameters that are tied stay so.
    plain : bool
        Leave out exchanged methods other than methods of a module, and copy buffers.
    """
    return _Replica(weight or (lambda parameter: parameter), plain).module(model)


class _Replica:
    """Replicas made so far, by the identity of their originals."""

    def __init__(self, weight: Callable[[torch.Tensor], torch.Tensor], plain: bool) -> None:
        self._weight, self._plain = weight, plain
        self._known: dict[int, Any] = {}
        # An identity is one for as long as its object lives.
        self._kept: list[Any] = []

    def _note(self, old: Any, new: Any) -> Any:
        self._kept.append(old)
        self._known[id(old)] = new
        return new

    def module(self, old: Any) -> Any:
        if id(old) in self._known:
            return self._known[id(old)]
        if _is_compiled(old):
            return self._note(old, self.module(old._orig_mod))
        if isinstance(old, torch.jit.ScriptModule):
            # Its state is not Python's.
            return self._note(old, old)
        new = self._note(old, object.__new__(type(old)))
        # One step in CPython, whatever another thread does.
        given = dict(old.__dict__)
        # Compiled calls lead to the module that they were compiled for.
        given.pop("_compiled_call_impl", None)
        decoding = given.pop(_DECODES_LATER, None)
        for name in [n for n in given if self._plain and _is_exchanged(given, n, type(old))]:
            del given[name]
        fields = new.__dict__
        for name, value in given.items():
            fields[name] = self.value(value)
        fields["training"] = False
        if isinstance(decoding, RemovableHandle):
            fields["_forward_pre_hooks"].pop(decoding.id, None)
            _decode(new)
        return new

    def value(self, old: Any) -> Any:
        if id(old) in self._known:
            return self._known[id(old)]
        if isinstance(old, torch.nn.Module):
            return self.module(old)
        if isinstance(old, torch.nn.Parameter):
            return self._note(old, self._weight(old))
        if isinstance(old, torch.Tensor):
            return self._note(old, old.detach().clone() if self._plain else old)
        if isinstance(old, _CONFIGS):
            return self._note(old, copy.deepcopy(old))
        if isinstance(old, types.MethodType) and isinstance(old.__self__, torch.nn.Module):
            return types.MethodType(old.__func__, self.module(old.__self__))
        if isinstance(old, functools.partial):
            return self._partial(old)
        if type(old) in _CONTAINERS:
            return self._container(old)
        return old

    def _partial(self, old: functools.partial[Any]) -> functools.partial[Any]:
        args = [self.value(a) for a in old.args]
        return functools.partial(self.value(old.func), *args, **self.value(dict(old.keywords)))

    def _container(self, old: Any) -> Any:
        kind = type(old)
        if kind is tuple:
            return tuple([self.value(v) for v in old])
        new = self._note(old, kind())
        # A copy is made in one step; going through it is not.
        if kind is list:
            new.extend([self.value(v) for v in list(old)])
        elif kind is set:
            new.update([self.value(v) for v in list(old)])
        else:
            new.update([(k, self.value(v)) for k, v in list(old.items())])
        return new


def _is_exchanged(fields: dict[str, Any], name: str, kind: type) -> bool:
    """Return whether a function replaces a method of a module's class."""
    value = fields[name]
    if isinstance(value, torch.nn.Module | types.MethodType) or not callable(value):
        return False
    return callable(getattr(kind, name, None))


def _decode(model: torch.nn.Module) -> None:
    """Decode the weights of a replica of a model that compressed-tensors has not decoded yet."""
    from compressed_tensors.compressors import decompress_module

    for module in list(model.modules()):
        decompress_module(module)


@contextmanager
def standing_in(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward pass by a function within the context.

    Parameters
    ----------
    module : torch.nn.Module
        Module of a replica or a skeleton, which no other thread runs.
    forward : callable
    """
    fields: Any = module.__dict__
    before = fields.get("forward")
    fields["forward"] = forward
    try:
        yield
    finally:
        # The instance's attribute hid the class's method.
        del fields["forward"]
        if before is not None:
            fields["forward"] = before
