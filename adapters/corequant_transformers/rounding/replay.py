"""Passes through a block without repeated work, using recorded inputs of layers.

A pass for a later group starts at the block's input and repeats the work of the pass before it. If
the input of a group was recorded, the layers before it, and the attention between them, need not
run, unless something else reads their outputs. Whether it does isn't known in advance, so it is
tested on the first window, with NaN instead of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from corequant.errors import OutputError
from corequant_transformers.model.forward import Windows

__all__ = ["Records", "left_out", "worth_recording"]

Room = Callable[[str, tuple[int, ...]], Windows | None]
"""Called as ``room(name, shape)``; returns storage for float32 windows, or None."""


def worth_recording(groups: Sequence[tuple[int, int, bool]]) -> list[int]:
    """Return the groups whose input is narrower than the outputs that a record of it saves.

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
    [1, 3]
    """
    recorded, spared = [], 0
    for index, (width, outputs, whole) in enumerate(groups):
        if not whole:
            continue
        if index and width < spared:
            recorded.append(index)
            spared -= width
        else:
            spared += outputs
    return recorded


class Records:
    """Recorded inputs of groups, window by window.

    Parameters
    ----------
    wanted : collection of int
        Groups whose inputs are recorded.
    windows : int
    room : callable
    """

    def __init__(self, wanted: Collection[int], windows: int, room: Room) -> None:
        self._wanted, self._windows, self._room = set(wanted), windows, room
        self._kept: dict[int, tuple[Windows, torch.Size, torch.device]] = {}

    @property
    def groups(self) -> list[int]:
        """Groups with a record, in ascending order."""
        return sorted(self._kept)

    def keep(self, group: int, window: int, x: torch.Tensor) -> None:
        """Record a group's input, unless it isn't wanted or its shape differs from the others."""
        if group not in self._wanted:
            return
        if group not in self._kept and window == 0 and x.dtype == torch.float32:
            room = self._room(f"input-{group}", (self._windows, x.numel()))
            if room is not None:
                self._kept[group] = (room, x.shape, x.device)
        if group not in self._kept:
            return
        place, shape, _ = self._kept[group]
        try:
            if x.shape != shape or x.dtype != torch.float32:
                del self._kept[group]
            else:
                place[window] = x.reshape(-1)
        except OutputError:
            # With a full disk, only the time that the record would have saved is lost.
            del self._kept[group]

    def read(self, group: int, window: int) -> torch.Tensor:
        """Return a group's recorded input."""
        place, shape, device = self._kept[group]
        return place[window : window + 1].reshape(shape).to(device)

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
        sets += [frozenset(range(known[i])) - set(known) for i in reversed(range(len(known)))]
        return [found for found in dict.fromkeys(sets) if found]


@contextmanager
def left_out(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let linear layers, and attention with NaN queries, return NaN without computing anything."""
    before = [vars(layer).get("forward") for layer in layers]
    with _IdleAttention():
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


def _nothing(width: Any, x: torch.Tensor) -> torch.Tensor:
    return x.new_full((*x.shape[:-1], width), torch.nan)


class _IdleAttention(TorchFunctionMode):
    """Return NaN for attention whose queries begin with NaN."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention and len(args) >= 3:
            query, value = args[0], args[2]
            if query.numel() and bool(query[(0,) * query.ndim].isnan()):
                return query.new_full((*query.shape[:-1], value.shape[-1]), torch.nan)
        return function(*args, **(kwargs or {}))
