"""Routed experts that are read when they are used and dropped afterwards, few at a time.

In models of many experts these are most of a decoder block. A block that is open holds the rest of
its weights, and layers without numbers in the places of its experts. Whoever needs an expert opens
it for a while; what was done to the block's matrices meanwhile is done to it again each time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from corequant_transformers.architectures.experts import Experts
from corequant_transformers.model.expert_list import ExpertList, matrices_of
from corequant_transformers.model.surroundings import check_finite
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "Layers",
    "StreamedExperts",
    "experts_of",
    "plan_of",
    "reads_experts",
    "rest_of",
    "streamed_experts",
]

Layers = Mapping[str, torch.nn.Linear]
"""The layers of one expert, by their names in it."""

Change = Callable[[int, Layers], None]
"""Called with an expert's index and its layers, gives these other weights and biases."""

_CHECKED = 2
"""Experts that are compared with what Transformers computes."""


class StreamedExperts(ExpertList):
    """Experts whose layers are without numbers until they are opened.

    Parameters
    ----------
    fused : torch.nn.Module
        Transformers' own, on the meta device.
    description : Experts
    path : str
        Of the module in the model, for error messages.
    read : callable
        ``read(parameter, index)`` returns an expert's part of one of the fused parameters, in
        float32.
    at_once : int
        Experts of a group: so many are open at the same time.
    """

    def __init__(
        self,
        fused: Any,
        description: Experts,
        path: str,
        read: Callable[[str, int], torch.Tensor],
        at_once: int,
    ) -> None:
        super().__init__(fused, description)
        self.path, self.at_once = path, at_once
        self._read = read
        self._changes: list[tuple[torch.dtype, Change]] = []
        self._dtype, self._device = torch.float32, torch.device("cpu")
        self._opened: set[int] = set()

    @property
    def device(self) -> torch.device:
        """Where experts are computed."""
        return self._device

    def groups(self) -> list[range]:
        """Return the experts' indices, as many at a time as may be open together."""
        step = self.at_once
        return [range(k, min(k + step, self.count)) for k in range(0, self.count, step)]

    def layers(self, index: int) -> dict[str, torch.nn.Linear]:
        """Return the layers of an expert."""
        expert: Any = self.get_submodule(str(index))
        return dict(expert.items())

    def change(self, change: Change) -> None:
        """Have a change done to each expert that is opened, after those before, in today's dtype.

        Parameters
        ----------
        change : callable
            A function, which copies of this module share.
        """
        self._changes.append((self._dtype, change))

    @contextmanager
    def opened(self, indices: Iterable[int], like: StreamedExperts | None = None) -> Iterator[None]:
        """Have experts' numbers in memory within the context.

        Parameters
        ----------
        indices : iterable of int
            Those that are open already stay so afterwards.
        like : StreamedExperts, optional
            Where these are open and have the same numbers, which are shared.

        Raises
        ------
        CheckpointError
            If one can't be read.
        NonFiniteError
            If one holds NaN or infinity.
        """
        closed: dict[int, list[tuple[str, Any, Any, Any]]] = {}
        try:
            for index in indices:
                if index in self._opened:
                    continue
                layers = self.layers(index)
                closed[index] = [(n, each, each.weight, each.bias) for n, each in layers.items()]
                self._opened.add(index)
                if like is None:
                    self._fill(index, layers)
                else:
                    for name, other in like.layers(index).items():
                        _set(layers[name], other.weight, other.bias)
            yield
        finally:
            for index, before in closed.items():
                expert: Any = self.get_submodule(str(index))
                for name, layer, weight, bias in before:
                    layer.weight, layer.bias = weight, bias
                    # Whatever took the layer's place, or its forward pass's, goes with the numbers.
                    layer.__dict__.pop("forward", None)
                    expert[name] = layer
                self._opened.discard(index)

    def _fill(self, index: int, layers: Layers) -> None:
        matrices = matrices_of(self.description, lambda name: self._read(name, index))
        for name, (W, bias) in matrices.items():
            for what, tensor in (("weight", W), ("bias", bias)):
                if tensor is not None:
                    check_finite(f"{self.path}.{index}.{name}.{what}", tensor)
            _set(layers[name], W.to(self._device), None if bias is None else bias.to(self._device))
        for dtype, change in self._changes:
            _cast(layers, dtype)
            change(index, layers)
        _cast(layers, self._dtype)

    def few(self) -> tuple[Any, ExpertList]:
        """Return the first experts, as Transformers has them and as a list, to be compared."""
        names = ("fused_gate_up", "fused_down", "fused_gate_up_bias", "fused_down_bias")
        count = min(_CHECKED, self.count)
        fused = copy.copy(self._rest)
        fused.__dict__["_parameters"] = {
            name: torch.nn.Parameter(
                torch.stack([self._read(name, k) for k in range(count)]).to(self._device),
                requires_grad=False,
            )
            for name in (getattr(self.description, n) for n in names)
            if name is not None
        }
        if getattr(fused, "num_experts", None) == self.count:
            fused.num_experts = count
        return fused, ExpertList(fused, self.description)

    def _expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        with self.opened((index,)):
            return super()._expert(index, x)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast or a move is done to experts when they are opened.
        after = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        self._dtype, self._device = after.dtype, after.device
        for name, module in self.named_children():
            if not name.isdigit():
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _set(layer: torch.nn.Linear, W: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight = torch.nn.Parameter(W.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)


def _cast(layers: Layers, dtype: torch.dtype) -> None:
    for layer in layers.values():
        if layer.weight.dtype != dtype:
            bias = layer.bias
            _set(layer, layer.weight.to(dtype), None if bias is None else bias.to(dtype))


def streamed_experts(block: torch.nn.Module) -> StreamedExperts | None:
    """Return a block's experts if they are read few at a time; None otherwise."""
    return next((m for m in block.modules() if isinstance(m, StreamedExperts)), None)


def rest_of(plan: ModelPlan) -> ModelPlan:
    """Return a block's plan without the rows of experts."""
    return replace(plan, matrices=tuple(m for m in plan.matrices if m.expert is None))


def plan_of(plan: ModelPlan, indices: range) -> ModelPlan:
    """Return the rows of some experts of a block's plan, and nothing else."""
    return replace(
        plan, matrices=tuple(m for m in plan.matrices if m.expert in indices), norms=(), writers=()
    )


def reads_experts(weights: Any, plan: ModelPlan, keys: Iterable[str]) -> bool:
    """Return whether experts can be read one at a time.

    Parameters
    ----------
    weights : Weights
        Of files: what is in memory needs no reading.
    plan : ModelPlan
    keys : iterable of str
        Names of a skeleton's parameters, those of experts among them.
    """
    has: Any = getattr(weights, "has_experts", None)
    fused = [key for key in keys if experts_of(key, plan) is not None]
    return has is not None and all(has(key) for key in fused)


def experts_of(key: str, plan: ModelPlan) -> str | None:
    """Return the path of the experts that a parameter belongs to; None if it is no experts'."""
    e, path = plan.architecture.experts, key.rpartition(".")[0]
    block = plan.architecture.block_index(key)
    if e is None or block is None:
        return None
    return path if path == f"{plan.architecture.block_path(block)}.{e.path}" else None
