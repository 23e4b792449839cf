"""What layers read in the quantized network and in the float one, window after window."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from corequant.errors import CalibrationError, NonFiniteError
from corequant.rounding import InputMoments
from corequant.specs import QuantSpec
from corequant_transformers.model.expert_list import ExpertList
from corequant_transformers.model.forward import HiddenStates, Windows, run_block
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import StreamedExperts
from corequant_transformers.model.surroundings import device_of
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.block_passes import BlockPasses
from corequant_transformers.rounding.int8_products import (
    RoundedInputs,
    linear_on_codes,
    multiplies_codes,
)
from corequant_transformers.rounding.replay import Records, Replay, structure_of, worth_recording

__all__ = ["Networks", "both_networks", "rounded_inputs"]


class Networks:
    """Layers in the quantized network and, where a method compares, in the float one.

    Parameters
    ----------
    groups : sequence of sequences of MatrixPlan
        Rows of layers that read the same input, in the order in which they run.
    quantized : torch.nn.Module
        The decoder block in the quantized network.
    rounded : BlockPasses
        Passes through its groups.
    reference : BlockPasses, optional
        Passes of the float network.
    inputs : RoundedInputs
        Rounded inputs of the quantized network's layers.
    shape : tuple of int
        Windows, and their length.
    experts : sequence of ExpertList
        Those of both networks.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[MatrixPlan]],
        quantized: torch.nn.Module,
        rounded: BlockPasses,
        reference: BlockPasses | None,
        inputs: RoundedInputs,
        shape: tuple[int, int],
        experts: Sequence[ExpertList],
    ) -> None:
        self.groups, self.rounded, self.reference = groups, rounded, reference
        self.quantized, self.inputs, self.shape = quantized, inputs, shape
        self.experts = experts

    def moments(self, index: int) -> InputMoments:
        """Return the moments of what a group reads, with all groups before it rounded."""
        row = self.groups[index][0]
        count, length = self.shape
        moments = InputMoments(row.shape[1], cross=self.reference is not None)
        for window in range(count):
            q = self.rounded.reach(window, index)
            x = None
            if self.reference is not None:
                x = self.reference.reach(window, index)
                _check_same_tokens(row, window, length, q, x)
            try:
                if q is not None:
                    moments.update(q, x)
            except NonFiniteError as error:
                what = f"{error.name} of {row.name} in calibration window {window}"
                raise NonFiniteError(what, error.count, error.index, error.value) from None
        if moments.count == 0 and row.expert is None:
            raise CalibrationError(
                f"at least one token must reach {row.name}, after the layers described before it, "
                f"got none in {count} calibration windows"
            )
        return moments

    def rare_moments(self, index: int, how: str) -> InputMoments:
        """Return what a group of an expert with few tokens is rounded for: all tokens, or none."""
        row = self.groups[index][0]
        if how == "nearest" or row.expert is None:
            return InputMoments(row.shape[1], cross=self.reference is not None)
        for experts in self.experts:
            experts.shared.add(row.expert)
        try:
            return self.moments(index)
        finally:
            for experts in self.experts:
                experts.shared.discard(row.expert)

    def place(self, name: str, layer: QuantizedLinear) -> None:
        """Use a rounded layer in the quantized network."""
        module: Any = self.quantized.get_submodule(name)
        # The same numbers that the layer will multiply by.
        module.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
        if name in self.inputs.on_codes:
            multiply, inputs = linear_on_codes(layer), self.inputs
            module.forward = lambda x: multiply(inputs.codes)


def both_networks(
    stack: ExitStack,
    block: torch.nn.Module,
    path: str,
    groups: Sequence[Sequence[MatrixPlan]],
    hidden: HiddenStates,
    arguments: tuple[Mapping[str, Any], Mapping[str, Any]],
    compares: bool,
    replay: Replay | None,
) -> Networks:
    """Return a decoder block in both networks; the quantized one's is a copy.

    Parameters
    ----------
    stack : ExitStack
        Its end removes all hooks.
    block, path, hidden
        As for ``round_block``.
    groups : sequence of sequences of MatrixPlan
    arguments : tuple of mappings
        The block's further arguments in the quantized and in the float network.
    compares : bool
        Whether the float network is needed.
    replay : Replay, optional
        As for ``round_block``.
    """
    local = [[row.name.removeprefix(f"{path}.") for row in group] for group in groups]
    inputs, quantized = rounded_inputs(path, groups, device_of(block)), copy.deepcopy(block)

    def passes(
        module: torch.nn.Module,
        states: Windows,
        inputs: RoundedInputs,
        given: Mapping[str, Any],
        network: str,
    ) -> BlockPasses:
        def forward(window: int) -> torch.Tensor:
            return run_block(module, states[window : window + 1], given, window)

        records = None
        if replay is not None:
            records = Records(
                recorded,
                len(states),
                lambda name, shape: replay.room(f"{network}-{name}", shape),
                replay.proven.setdefault((network, structure_of(module, given), repr(local)), {}),
            )
        made = BlockPasses(module, local, forward, inputs, records, of_experts)
        return stack.enter_context(made)

    of_experts = {i for i, group in enumerate(groups) if group[0].expert is not None}
    recorded = worth_recording(
        [
            (group[0].shape[1], sum(row.shape[0] for row in group), i not in of_experts)
            for i, group in enumerate(groups)
        ]
    )
    rounded = passes(quantized, hidden.quantized, inputs, arguments[0], "quantized")
    reference: BlockPasses | None = None
    networks = (quantized, block) if compares else (quantized,)
    experts = [m for n in networks for m in n.modules() if isinstance(m, ExpertList)]
    if compares:
        states = hidden.quantized if hidden.float_states is None else hidden.float_states
        reference = passes(block, states, RoundedInputs(path, {}), arguments[1], "float")
        _share_routes(stack, quantized, rounded, block, reference)
    windows, length = hidden.quantized.shape[:2]
    return Networks(groups, quantized, rounded, reference, inputs, (windows, length), experts)


def rounded_inputs(
    path: str, groups: Sequence[Sequence[MatrixPlan]], device: torch.device
) -> RoundedInputs:
    """Return what a block's layers read; codes where all layers of a group multiply them."""
    specs: dict[str, QuantSpec | None] = {}
    on_codes: set[str] = set()
    for group in groups:
        names = [row.name.removeprefix(f"{path}.") for row in group]
        specs |= {name: row.activations for name, row in zip(names, group, strict=True)}
        if all(multiplies_codes(row.weights, row.activations, device) for row in group):
            on_codes.update(names)
    return RoundedInputs(path, specs, on_codes)


def _share_routes(
    stack: ExitStack,
    quantized: torch.nn.Module,
    rounded: BlockPasses,
    block: torch.nn.Module,
    reference: BlockPasses,
) -> None:
    """Let tokens of the float block visit the experts that they visit in the quantized one."""
    routes: dict[tuple[str, int], tuple[Any, ...]] = {}
    lists = [
        name
        for name, module in block.named_modules()
        if isinstance(module, ExpertList) and not isinstance(module, StreamedExperts)
    ]

    def keep(name: str, route: tuple[Any, ...]) -> None:
        rounded.check_observed(route)
        routes[name, rounded.window] = route

    def note(name: str, module: torch.nn.Module, args: Any) -> None:
        keep(name, args[1:])

    def follow(name: str, module: torch.nn.Module, args: Any) -> tuple[Any, ...]:
        return (args[0], *routes[name, reference.window])

    def note_output(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        keep(name, output if isinstance(output, tuple) else (output,))

    def follow_output(name: str, module: torch.nn.Module, args: Any, output: Any) -> Any:
        route = routes[name, reference.window]
        return route if isinstance(output, tuple) else route[0]

    for name in lists:
        description: Any = block.get_submodule(name).description
        if description.scaled_inputs:
            # Shares have gone into what the experts read.
            for network, after in ((quantized, note_output), (block, follow_output)):
                router = network.get_submodule(description.router)
                stack.callback(router.register_forward_hook(partial(after, name)).remove)
            continue
        for network, hook in ((quantized, note), (block, follow)):
            experts = network.get_submodule(name)
            handle = experts.register_forward_pre_hook(partial(hook, name))
            stack.callback(handle.remove)


def _check_same_tokens(
    row: MatrixPlan, window: int, length: int, q: torch.Tensor | None, x: torch.Tensor | None
) -> None:
    # Which tokens come may differ between the networks as soon as some don't, but for experts.
    counts = [0 if t is None else t.numel() // t.shape[-1] for t in (q, x)]
    shared = row.expert is not None and counts[0] == counts[1]
    if not shared and counts not in ([0, 0], [length, length]):
        raise CalibrationError(
            f"all {length} tokens of a window must reach {row.name} to compare it with the float "
            f"network's, got {counts[0]} and {counts[1]} of calibration window {window}; gptq "
            "without a correction compares nothing"
        )
