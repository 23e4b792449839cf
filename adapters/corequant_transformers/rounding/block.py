"""Rounding that sees the data: one decoder block after the other, in two networks.

Hidden states of all windows go through the quantized network, block by block, and through the float
one: from its own earlier blocks, or from what each block reads in the quantized network. Within a
block, layers that read the same input are a group, and groups are rounded in the order in which
they run, each for what the network quantized so far really gives it, activations rounded as at run
time. Only one block's weights are needed at a time, in addition to the hidden states.

Which experts a token visits is decided in the quantized network, and the float block that is
compared with it sends the token to the same ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from corequant.errors import CalibrationError, NonFiniteError
from corequant.rounding import InputMoments, RoundedTensor
from corequant.specs import QuantSpec
from corequant_transformers.model.expert_list import ExpertList
from corequant_transformers.model.forward import HiddenStates, Windows, run_block
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.surroundings import device_of, peak_rss_mib, to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.block_passes import BlockPasses
from corequant_transformers.rounding.int8_products import (
    RoundedInputs,
    linear_on_codes,
    multiplies_codes,
)
from corequant_transformers.rounding.layers import (
    quantized_layer,
    round_on_inputs,
    shared_global_scales,
)
from corequant_transformers.rounding.replay import Records, Room, worth_recording

__all__ = ["RoundedBlock", "groups_of", "round_block"]


@dataclass(frozen=True, eq=False)
class RoundedBlock:
    """A block's rounded layers.

    Attributes
    ----------
    layers : mapping of str to QuantizedLinear
        By the names of the plan's rows.
    rows : list of dict
        Plain values for the report, one for each layer.
    hidden : HiddenStates
        Input of the next block.
    """

    layers: Mapping[str, QuantizedLinear]
    rows: list[dict[str, Any]]
    hidden: HiddenStates


def groups_of(rows: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
    """Return a block's quantized rows by the input that they read, in their order.

    Layers next to each other in the same module that read the same norm share an input: query, key
    and value, gate and up, but not those of different experts.
    """
    groups: list[list[MatrixPlan]] = []
    for row in rows:
        parent = row.name.rpartition(".")[0]
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and row.norm is not None
            and row.norm == last.norm
            and parent == last.name.rpartition(".")[0]
        ):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@torch.no_grad()
def round_block(
    block: torch.nn.Module,
    path: str,
    rows: Sequence[MatrixPlan],
    hidden: HiddenStates,
    arguments: Mapping[str, Any],
    float_arguments: Mapping[str, Any] | None = None,
    *,
    executor: Executor | None = None,
    progress: Callable[[int], None] = lambda done: None,
    rare: tuple[int, str] = (1, "nearest"),
    room: Room | None = None,
) -> RoundedBlock:
    """Round the layers of one decoder block.

    Parameters
    ----------
    block : torch.nn.Module
        Transformed, with the hooks of its run-time rotations, in float32; left as it is.
    path : str
        Path of the block in the model, with which the rows' names start.
    rows : sequence of MatrixPlan
        Plans of the block's quantized layers, in the order in which they run. Those that read the
        same input must have one quantizer of it.
    hidden : HiddenStates
        Input of the block; overwritten by its output.
    arguments : mapping
        Its further arguments by name.
    float_arguments : mapping, optional
        Those in the float network, where it has states of its own; by default they are the same.
    executor : concurrent.futures.Executor, optional
        Rounds the layers of a group at the same time, to the same codes.
    progress : callable
        Called after each group with the number of groups that are done.
    rare : tuple of (int, str)
        Tokens below which an expert is rare, and how it is rounded then: ``shared``, for all tokens
        of its layer, or ``nearest``, to nearest.
    room : callable, optional
        Called as ``room(name, shape)``: a place for float32 numbers of all windows, or None if
        there is none. With one, passes for later groups don't compute again what is there.

    Returns
    -------
    RoundedBlock

    Raises
    ------
    ArchitectureError
        If layers don't run in the order of the rows, or those of a group read different inputs.
    CalibrationError
        If no token reaches a layer that is not an expert's.
    HessianError, NonFiniteError
        If the inputs' moments can't be used; names the layer and the window.
    """
    groups = groups_of(rows)
    own = hidden.float_states is not None and float_arguments is not None
    compared = float_arguments if own and float_arguments is not None else arguments
    shared = shared_global_scales(rows, _weights(block, path, rows))
    layers: dict[str, QuantizedLinear] = {}
    table: list[dict[str, Any]] = []
    with ExitStack() as stack:
        inputs = _rounded_inputs(path, groups, device_of(block))
        compares = any(row.options.needs_float for row in rows)
        both = (arguments, compared)
        networks = _Networks(stack, block, path, groups, hidden, both, inputs, compares, room)
        for index, group in enumerate(groups):
            started = time.monotonic()
            moments = networks.moments(index)
            tokens, how = moments.count, None
            if group[0].expert is not None and tokens < rare[0]:
                how = rare[1]
                moments = networks.rare_moments(index, how)
            weights = _weights(block, path, group)
            found = round_on_inputs(group, weights, moments, shared, executor)
            seconds = time.monotonic() - started
            for row in group:
                name = row.name.removeprefix(f"{path}.")
                layer = quantized_layer(block.get_submodule(name), row, found[row.name])
                networks.place(name, layer)
                layers[row.name] = layer
                table.append(_report(row, found[row.name], tokens, how, seconds / len(group)))
            del moments
            progress(index + 1)
        networks.finish()
        # Experts choose their tokens themselves where nothing is compared any more.
        continued = networks.compares and not networks.experts and hidden.float_states is not None
        if continued:
            networks.finish_float()
    if hidden.float_states is not None and not continued:
        for window in range(len(hidden.float_states)):
            state = hidden.float_states[window : window + 1]
            hidden.float_states[window] = run_block(block, state, compared, window)[0]
    return RoundedBlock(layers, table, hidden)


def _rounded_inputs(
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


class _Networks:
    """A block in the quantized network and, where a method compares, in the float one.

    Parameters
    ----------
    stack : ExitStack
        Its end removes all hooks.
    block, path, hidden, arguments
        As for ``round_block``.
    groups : sequence of sequences of MatrixPlan
    inputs : RoundedInputs
        Rounded inputs of the quantized network's layers.
    compares : bool
    room : callable, optional

    Attributes
    ----------
    experts : list of ExpertList
    compares : bool
    """

    def __init__(
        self,
        stack: ExitStack,
        block: torch.nn.Module,
        path: str,
        groups: Sequence[Sequence[MatrixPlan]],
        hidden: HiddenStates,
        arguments: tuple[Mapping[str, Any], Mapping[str, Any]],
        inputs: RoundedInputs,
        compares: bool,
        room: Room | None,
    ) -> None:
        local = [[row.name.removeprefix(f"{path}.") for row in group] for group in groups]

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
            if room is not None:
                records = Records(
                    recorded, len(states), lambda name, shape: room(f"{network}-{name}", shape)
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

        self._groups, self._hidden, self._inputs = groups, hidden, inputs
        self._quantized = copy.deepcopy(block)
        self._rounded = passes(self._quantized, hidden.quantized, inputs, arguments[0], "quantized")
        self._reference: BlockPasses | None = None
        networks = (self._quantized, block) if compares else (self._quantized,)
        self.experts = [m for n in networks for m in n.modules() if isinstance(m, ExpertList)]
        self.compares = compares
        if compares:
            states = hidden.quantized if hidden.float_states is None else hidden.float_states
            self._reference = passes(block, states, RoundedInputs(path, {}), arguments[1], "float")
            _share_routes(stack, self._quantized, self._rounded, block, self._reference)

    def moments(self, index: int) -> InputMoments:
        """Return the moments of what a group reads, with all groups before it rounded."""
        row = self._groups[index][0]
        count, length = self._hidden.quantized.shape[:2]
        moments = InputMoments(row.shape[1], cross=self._reference is not None)
        for window in range(count):
            q = self._rounded.reach(window, index)
            x = None
            if self._reference is not None:
                x = self._reference.reach(window, index)
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
        row = self._groups[index][0]
        if how == "nearest" or row.expert is None:
            return InputMoments(row.shape[1], cross=self._reference is not None)
        for experts in self.experts:
            experts.shared.add(row.expert)
        try:
            return self.moments(index)
        finally:
            for experts in self.experts:
                experts.shared.discard(row.expert)

    def place(self, name: str, layer: QuantizedLinear) -> None:
        """Use a rounded layer in the quantized network."""
        module: Any = self._quantized.get_submodule(name)
        # The same numbers that the layer will multiply by.
        module.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
        if name in self._inputs.on_codes:
            multiply, inputs = linear_on_codes(layer), self._inputs
            module.forward = lambda x: multiply(inputs.codes)

    def finish(self) -> None:
        """Replace what the quantized block reads by what it gives."""
        for window in range(len(self._hidden.quantized)):
            self._hidden.quantized[window] = self._rounded.finish(window)[0]

    def finish_float(self) -> None:
        """Replace what the float block reads by what it gives, where it has states of its own."""
        assert self._hidden.float_states is not None
        assert self._reference is not None
        for window in range(len(self._hidden.float_states)):
            self._hidden.float_states[window] = self._reference.finish(window)[0]


def _share_routes(
    stack: ExitStack,
    quantized: torch.nn.Module,
    rounded: BlockPasses,
    block: torch.nn.Module,
    reference: BlockPasses,
) -> None:
    """Let tokens of the float block visit the experts that they visit in the quantized one."""
    routes: dict[tuple[str, int], tuple[Any, ...]] = {}
    lists = [name for name, module in block.named_modules() if isinstance(module, ExpertList)]

    def note(name: str, module: torch.nn.Module, args: Any) -> None:
        routes[name, rounded.window] = args[1:]

    def follow(name: str, module: torch.nn.Module, args: Any) -> tuple[Any, ...]:
        return (args[0], *routes[name, reference.window])

    def note_output(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        routes[name, rounded.window] = output

    def follow_output(name: str, module: torch.nn.Module, args: Any, output: Any) -> Any:
        return routes[name, reference.window]

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


def _weights(
    block: torch.nn.Module, path: str, rows: Sequence[MatrixPlan]
) -> dict[str, npt.NDArray[Any]]:
    weights: dict[str, npt.NDArray[Any]] = {}
    for row in rows:
        module: Any = block.get_submodule(row.name.removeprefix(f"{path}."))
        weights[row.name] = to_host(module.weight)
    return weights


def _report(
    row: MatrixPlan, rounded: RoundedTensor, tokens: int, rare: str | None, seconds: float
) -> dict[str, Any]:
    report = rounded.report
    damping = report.damping
    return {
        "name": row.name,
        **({} if tokens else {"unrouted": True}),
        **({"rare": rare} if rare else {}),
        "method": report.method,
        "loss_nearest": report.nearest_loss,
        "loss": report.loss,
        "damping": None if damping is None else damping.value,
        "relative_damping": None if damping is None else damping.relative,
        "damping_tries": None if damping is None else damping.tries,
        "dead_columns": len(report.dead_columns),
        "bounded_share": report.bounded_share,
        "shrinkage": report.shrinkage,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "peak_rss_mib": round(peak_rss_mib()),
    }
