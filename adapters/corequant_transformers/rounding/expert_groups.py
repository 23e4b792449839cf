"""Rounding that sees the data, for experts that are read few at a time.

What they read doesn't depend on one another: all windows are taken to them once, in both networks,
and each expert is rounded for its tokens while it is open. What the rounded ones give is added up,
for the passes that go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from corequant_transformers.model.expert_calls import (
    ExpertCalls,
    Room,
    given_outputs,
    record_calls,
    sum_so_far,
)
from corequant_transformers.model.forward import Windows
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import StreamedExperts, streamed_experts
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.block_passes import BlockPasses
from corequant_transformers.rounding.groups import GroupRounding, groups_of
from corequant_transformers.rounding.int8_products import RoundedInputs
from corequant_transformers.rounding.networks import Networks, rounded_inputs

__all__ = ["ExpertOutputs", "Keep", "round_experts"]

Keep = Callable[[range, Mapping[str, QuantizedLinear]], None]
"""Called with the indices of open experts and their rounded layers by the rows' names."""


class _Side:
    """One network's experts, the calls of them, and what those so far have given.

    Parameters
    ----------
    experts : StreamedExperts
    calls : ExpertCalls
    outputs : Windows (windows, tokens, hidden)
    passes : BlockPasses
        Of the block; ``finish`` of them wants what the experts give.
    """

    def __init__(
        self, experts: StreamedExperts, calls: ExpertCalls, outputs: Windows, passes: BlockPasses
    ) -> None:
        self.experts, self.calls, self.outputs, self.passes = experts, calls, outputs, passes
        self.running = range(0)
        self._adds = False

    def window(self) -> int:
        """Return the window that goes through the block."""
        return self.passes.window

    def forward(self, window: int) -> torch.Tensor:
        """Take a window through the experts that are running."""
        x, chosen, shares = self.calls.of(window, self.experts.device)
        before = self.running if self._adds else range(0)
        total = sum_so_far(self.outputs, window, x, before)
        self.experts.add(total, x, chosen, shares, self.running)
        return total

    def add(self, passes: BlockPasses, indices: range) -> None:
        """Add what a group of experts gives to what those before have given."""
        self.running, self._adds = indices, True
        for window in range(len(self.calls)):
            self.outputs[window] = passes.finish(window)
        self._adds = False


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """What a block's experts give in each network that runs on."""

    sides: Sequence[_Side]

    def give(self, stack: ExitStack) -> None:
        """Have the experts give it until the stack ends."""
        for side in self.sides:
            stack.enter_context(given_outputs(side.experts, side.outputs, side.window))


def round_experts(
    rounding: GroupRounding,
    networks: Networks,
    experts: StreamedExperts,
    rows: Sequence[MatrixPlan],
    windows: Room,
    keep: Keep,
    *,
    runs_on: bool,
) -> ExpertOutputs:
    """Round a block's experts, a few at a time.

    Parameters
    ----------
    rounding : GroupRounding
    networks : Networks
        Of the block, with the layers before the experts rounded.
    experts : StreamedExperts
        In the float block.
    rows : sequence of MatrixPlan
        Of the experts' quantized layers.
    windows, keep : callable
        As for ``round_block``.
    runs_on : bool
        Whether the float network is needed beyond the experts.
    """
    copies = streamed_experts(networks.quantized)
    assert copies is not None, "the quantized block is a copy of the float one"
    quantized = _side(copies, networks.rounded, networks, windows, "quantized")
    sides = [quantized]
    if networks.reference is not None:
        side = _side(experts, networks.reference, networks, windows, "float")
        # Tokens visit the experts that they visit in the quantized network.
        routes = quantized.calls
        side.calls = ExpertCalls(side.calls.inputs, routes.chosen, routes.shares)
        sides.append(side)
    for indices in experts.groups():
        groups = groups_of([row for row in rows if row.expert in indices])
        with experts.opened(indices), copies.opened(indices, like=experts):
            keep(indices, _round_few(rounding, networks, sides, groups, indices, runs_on))
    return ExpertOutputs(sides if runs_on else sides[:1])


def _side(
    experts: StreamedExperts, passes: BlockPasses, networks: Networks, room: Room, name: str
) -> _Side:
    calls = record_calls(experts, passes.finish, networks.shape[0], room, name)
    shape, dtype = tuple(calls.inputs.shape), calls.inputs[0:1].dtype
    return _Side(experts, calls, room(f"{name}-outputs", shape, dtype), passes)


def _round_few(
    rounding: GroupRounding,
    networks: Networks,
    sides: Sequence[_Side],
    groups: Sequence[Sequence[MatrixPlan]],
    indices: range,
    runs_on: bool,
) -> dict[str, QuantizedLinear]:
    """Round experts that are open, and add what they give in each network."""
    path, quantized = rounding.path, sides[0]
    local = [[row.name.removeprefix(f"{path}.") for row in group] for group in groups]
    layers: dict[str, QuantizedLinear] = {}
    with ExitStack() as stack:
        inputs = rounded_inputs(path, groups, quantized.experts.device)
        blocks = (networks.quantized, rounding.block)
        prepared = (inputs, RoundedInputs(path, {}))
        passes = [
            stack.enter_context(BlockPasses(block, local, side.forward, prepare))
            for block, side, prepare in zip(blocks, sides, prepared, strict=False)
        ]
        reference = passes[1] if len(passes) > 1 else None
        lists = [side.experts for side in sides]
        few = Networks(
            groups, networks.quantized, passes[0], reference, inputs, networks.shape, lists
        )
        shared = rounding.global_scales([row for group in groups for row in group])
        for index, group in enumerate(groups):
            for side in sides:
                expert = group[0].expert or 0
                side.running = range(expert, expert + 1)
            layers |= rounding.run(few, (index,), shared)
        for side, each in zip(sides, passes, strict=True):
            if side is quantized or runs_on:
                side.add(each, indices)
    return layers
