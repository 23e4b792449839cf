"""Passes through a block without repeated work, using recorded inputs of layers.

A pass for a later group starts at the block's input and repeats the work of the pass before it. If
the input of a group was recorded, the layers before it, and the attention between them, need not
run, unless something else reads their outputs. Whether it does isn't known in advance, so it is
tested on the first window, with NaN instead of their outputs, once for all blocks of one structure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from corequant.errors import OutputError
from corequant_transformers.model.forward import Windows

__all__ = ["Records", "Replay", "Room", "left_out", "structure_of", "worth_recording"]

Room = Callable[[str, tuple[int, ...]], Windows | None]
"""Called as ``room(name, shape)``; returns storage for float32 windows, or None."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What the blocks of a model share to do less work again.

    Attributes
    ----------
    room : callable
        Called as ``room(name, shape)``; returns storage for float32 windows, or None.
    proven : dict
        By structure: by target, the groups that a pass is proven not to need.
    """

    room: Room
    proven: dict[Hashable, dict[int, frozenset[int]]] = field(default_factory=dict)


_PRODUCTS = 64
"""Products for which recording a number, and reading it again, takes as long, roughly."""


def worth_recording(groups: Sequence[tuple[int, int, bool]]) -> list[int]:
    """Return the groups whose input is quicker to read than to compute again.

    Parameters
    ----------
    groups : sequence of (int, int, bool)
        Width of the input, total width of the outputs, and whether a group's input has all tokens
        of a window, unlike an expert's.

    Examples
    --------
    The groups are query, key and value; output; gate and up; and down:

    >>> from corequant_transformers.rounding.replay import worth_recording
    >>> worth_recording([(64, 96, True), (64, 64, True), (64, 256, True), (128, 64, True)])
    [1, 2, 3]
    """
    recorded, products = [], 0
    for index, (width, outputs, whole) in enumerate(groups):
        if not whole:
            continue
        if products >= _PRODUCTS * width:
            recorded.append(index)
            products = 0
        products += width * outputs
    return recorded


class Records:
    """Recorded inputs of groups, window by window.

    Parameters
    ----------
    wanted : collection of int
        Groups whose inputs are recorded.
    windows : int
    room : callable
        Called as ``room(name, shape)``; returns storage for float32 windows, or None.
    proven : dict, optional
        By target, the groups that a pass through a block of this structure is proven not to need.
    """

    def __init__(
        self,
        wanted: Collection[int],
        windows: int,
        room: Room,
        proven: dict[int, frozenset[int]] | None = None,
    ) -> None:
        self.proven = {} if proven is None else proven
        self._wanted, self._windows, self._room = set(wanted), windows, room
        self._kept: dict[int, tuple[Windows, torch.Size, torch.device]] = {}
        self._recorded: dict[int, int] = {}

    @property
    def groups(self) -> list[int]:
        """Groups of which every window is recorded, in ascending order."""
        return sorted(g for g in self._kept if self._recorded[g] == self._windows)

    def keep(self, group: int, window: int, x: torch.Tensor) -> None:
        """Record a group's input, unless it isn't wanted or its shape differs from the others."""
        if group not in self._wanted:
            return
        if group not in self._kept and window == 0 and x.dtype == torch.float32:
            room = self._room(f"input-{group}", (self._windows, x.numel()))
            if room is not None:
                self._kept[group] = (room, x.shape, x.device)
                self._recorded[group] = 0
        if group not in self._kept:
            return
        place, shape, _ = self._kept[group]
        try:
            if x.shape != shape or x.dtype != torch.float32:
                del self._kept[group]
            else:
                place[window] = x.reshape(-1)
                self._recorded[group] += window == self._recorded[group]
        except OutputError:
            # With a full disk, only the time that the record would have saved is lost.
            del self._kept[group]

    def read(self, group: int, window: int) -> torch.Tensor:
        """Return a group's recorded input."""
        place, shape, device = self._kept[group]
        return place[window : window + 1].reshape(shape).to(device)

    def omitted(self, target: int, experts: Collection[int]) -> frozenset[int] | None:
        """Return the groups that a pass is proven not to need; None if that isn't known yet.

        Parameters
        ----------
        target, experts
            As for ``candidates``.
        """
        found = self.proven.get(target)
        known = not found or found in self.candidates(target, experts)
        return found if known else None

    def candidates(self, target: int, experts: Collection[int]) -> list[frozenset[int]]:
        """Return sets of groups that a pass to ``target`` may skip, the largest sets first.

        Parameters
        ----------
        target : int
            The group that the pass is for, or an index beyond all groups for a complete pass.
        experts : collection of int
            Groups of experts, whose outputs are summed after the last of them.
        """
        known = [group for group in self.groups if group < target]
        sets = []
        if target in experts:
            earlier = frozenset(range(target)) - set(known)
            sets += [earlier, earlier - {target - 1}]
        for group in reversed(known):
            earlier = frozenset(range(group))
            # A residual stream reads the output of a layer before it.
            sets += [earlier, *(earlier - {k} for k in known if k < group), earlier - set(known)]
        return [found for found in dict.fromkeys(sets) if found]


def structure_of(block: torch.nn.Module, arguments: Mapping[str, Any]) -> Hashable:
    """Return what decides how a block computes, without the numbers that it computes with.

    Parameters
    ----------
    block : torch.nn.Module
    arguments : mapping
        Arguments of its forward by name.

    Returns
    -------
    hashable
        Names and types of the modules, with their hooks and their plain attributes but the index of
        the layer, and the types of the arguments.
    """
    modules = [
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if key != "layer_idx" and isinstance(value, bool | int | float | str | None)
            ),
            tuple(type(hook) for hook in module._forward_pre_hooks.values()),
            tuple(type(hook) for hook in module._forward_hooks.values()),
        )
        for name, module in block.named_modules()
    ]
    return (*modules, *((name, type(value)) for name, value in sorted(arguments.items())))


@contextmanager
def left_out(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let linear layers, and attention with NaN queries, return NaN without computing anything."""
    before = [vars(layer).get("forward") for layer in layers]
    with _Idle():
        for layer in layers:
            layer.forward = partial(_nothing, layer.out_features)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def _nothing(width: Any, x: torch.Tensor) -> Any:
    return _unknown(x, (*x.shape[:-1], width))


def _unknown(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Any:
    """Return NaN everywhere, in one number of memory."""
    return like.new_full((), torch.nan, dtype=dtype).expand(shape)


def _is_unknown(x: Any) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.numel() > 1
        and x.is_floating_point()
        and all(step == 0 for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)
        and bool(x[(0,) * x.ndim].isnan())
    )


_OF_ONE = {"neg", "silu", "gelu", "relu", "sigmoid", "tanh", "contiguous"}
_OF_TWO = {"add", "sub", "mul", "div"}
"""Names of functions whose elements are NaN where those of their arguments are."""


class _Idle(TorchFunctionMode):
    """Return NaN without computing it: for attention with NaN queries, and what surrounds it.

    What is NaN because it depends on an output that was left out, such as the rotary embedding of
    queries or a gated activation, takes the memory of one number.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention and len(args) >= 3:
            query, value = args[0], args[2]
            if query.numel() and bool(query[(0,) * query.ndim].isnan()):
                return _unknown(query, (*query.shape[:-1], value.shape[-1]))
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _OF_ONE and args and not kwargs.get("inplace") and _is_unknown(args[0]):
            return args[0]
        if name in _OF_TWO and not kwargs and any(map(_is_unknown, args)):
            shapes = [x.shape if isinstance(x, torch.Tensor) else () for x in args]
            shape, dtype = np.broadcast_shapes(*shapes), torch.result_type(*args)
            return _unknown(next(x for x in args if _is_unknown(x)), shape, dtype)
        if name == "cat" and "out" not in kwargs and args and all(map(_is_unknown, args[0])):
            shape = function([x.to("meta") for x in args[0]], *args[1:], **kwargs).shape
            return _unknown(args[0][0], shape)
        return function(*args, **kwargs)
