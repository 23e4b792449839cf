"""A torch device in name only: its tensors lie in the host's memory and can't be reached from it.

What forgets to move numbers between the CPU and a GPU fails here as it would there: arrays can't be
made of such tensors, and operations that mix them with CPU tensors are refused, but for scalars,
copies and indices. Operations run on the CPU, so results are its to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

__all__ = ["NAME", "Elsewhere", "register"]

NAME = "elsewhere"

_MIXED = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}
_CPU = torch.device("cpu")
_libraries: list[torch.library.Library] = []


class Elsewhere(torch.Tensor):
    """A tensor of the device, around one of the host."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Elsewhere:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
        )
        tensor.host = host
        return tensor

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def register() -> None:
    """Make the device known to this process, for good; its tensors get the device's kernels."""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _libraries.append(library)
    # Made otherwise by filling a tensor that has no entries yet, whose shape must not change here.
    made = torch.library.Library("aten", "IMPL")
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
        operator, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, operator), overload or "default")
        made.impl(name, functools.partial(_made, function), "PrivateUse1")
    _libraries.append(made)
    # Subclasses of torch's tensor go to operators, since something might trace them.
    from corequant_torch import backend

    plain = backend.is_plain_call
    backend.is_plain_call = lambda x: isinstance(x, Elsewhere) or plain(x)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves, shape = pytree.tree_flatten((args, kwargs))
    there = [t for t in leaves if isinstance(t, Elsewhere)]
    if there and func._schema.name not in _MIXED:
        for t in leaves:
            if isinstance(t, torch.Tensor) and not isinstance(t, Elsewhere) and t.ndim:
                raise RuntimeError(f"Expected all tensors to be on the same device, got {func}")
    hosts = [t.host if isinstance(t, Elsewhere) else _CPU if _is_there(t) else t for t in leaves]
    own_args, own_kwargs = pytree.tree_unflatten(hosts, shape)
    result = func(*own_args, **own_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    device = kwargs.get("device")
    stays = bool(there) if device is None else _is_there(device)
    wrapped = {id(t.host): t for t in there}

    def wrap(value: Any) -> Any:
        if not stays or not isinstance(value, torch.Tensor):
            return value
        return wrapped[id(value)] if id(value) in wrapped else Elsewhere(value)

    return pytree.tree_map(wrap, result)


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(func, args, kwargs)


def _is_there(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == NAME
