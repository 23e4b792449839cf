"""Rounding that sees the data: one decoder block after the other, two networks side by side.

Hidden states of all windows go through the quantized network, block by block, and through the float
one: in one stream of its own, or anew from what each block reads in the quantized network. Within a
block, the layers that read the same input are a group, and groups are rounded in the order in which
they run, each for what the network quantized so far really gives it, activations rounded as at run
time. Only one block's weights are needed at a time, besides the hidden states.

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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant.errors import CalibrationError
from corequant.rounding import InputMoments, RoundedTensor, RoundingOptions, round_together
from corequant.specs import ScaleSearch
from corequant_transformers.model.devices import device_of, to_host
from corequant_transformers.model.forward import run_block
from corequant_transformers.model.layouts import ExpertList
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.planning.cost import HELD_BYTES, peak_rss_mib
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.block_passes import BlockPasses
from corequant_transformers.rounding.groups import shared_global_scales
from corequant_transformers.rounding.int8_products import (
    RoundedInputs,
    linear_on_codes,
    multiplies_codes,
)
from corequant_transformers.run.ledger import Windows

__all__ = [
    "HiddenStates",
    "RoundedBlock",
    "groups_of",
    "round_block",
]


_SEARCHED_AT_HOME = (ScaleSearch.EXACT, ScaleSearch.HQO)
"""Searches for scales that no device has: weights are rounded on the CPU then."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a decoder block reads, in both networks.

    Attributes
    ----------
    quantized : Windows (windows, length, hidden), float32
        In the network whose earlier blocks are quantized.
    float_states : Windows (windows, length, hidden), float32, optional
        In the float network, in the same rotated basis. None where the method compares nothing, or
        with what the float block makes of ``quantized``.
    """

    quantized: Windows
    float_states: Windows | None


@dataclass(frozen=True, eq=False)
class RoundedBlock:
    """What ``round_block`` made of a block.

    Attributes
    ----------
    layers : mapping of str to QuantizedLinear
        By the names of the plan's rows.
    rows : list of dict
        Plain values for the report, one for each layer.
    hidden : HiddenStates
        What the next block reads.
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
    weights: cq.QuantSpec,
    activations: cq.QuantSpec | None,
    options: RoundingOptions,
    *,
    executor: Executor | None = None,
    held_bytes: int = HELD_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> RoundedBlock:
    """Round the layers of one decoder block.

    Parameters
    ----------
    block : torch.nn.Module
        Transformed, with the hooks of its run-time rotations, in float32; left as it is.
    path : str
        Where the block is in the model; the rows' names start with it.
    rows : sequence of MatrixPlan
        Of the block's quantized layers, in the order in which they run.
    hidden : HiddenStates
        What the block reads; overwritten by what it gives.
    arguments : mapping
        Its further arguments by name.
    weights, activations : QuantSpec
        Activations may be None.
    options : RoundingOptions
    executor : concurrent.futures.Executor, optional
        Rounds the layers of a group at the same time, to the same codes.
    held_bytes : int
        What forward passes may hold while a group is rounded, before they are started again for
        each group instead.
    progress : callable
        Called after each group.

    Returns
    -------
    RoundedBlock

    Raises
    ------
    ArchitectureError
        If layers don't run in the order of the rows, or those of a group read different inputs.
    CalibrationError
        If no token reaches a layer that is not an expert's. An expert that no token visits is
        rounded to nearest, and its rows say so.
    HessianError, NonFiniteError
        If the inputs' moments can't be used; names the layer and the window.
    """
    groups = groups_of(rows)
    local = [[row.name.removeprefix(f"{path}.") for row in group] for group in groups]
    quantized = copy.deepcopy(block)
    count = len(hidden.quantized)
    streams = 2 if options.needs_float else 1
    keep = streams * _held(hidden.quantized, rows) <= held_bytes

    def passes(module: torch.nn.Module, states: Windows, prepare: Any) -> BlockPasses:
        def forward(window: int) -> torch.Tensor:
            return run_block(module, states[window : window + 1], arguments)

        return BlockPasses(module, local, forward, count, prepare, keep)

    shared = shared_global_scales(rows, _weights(block, path, rows), weights)
    layers: dict[str, QuantizedLinear] = {}
    table: list[dict[str, Any]] = []
    with ExitStack() as stack:
        on_codes = multiplies_codes(weights, activations, device_of(block))
        inputs = RoundedInputs(path, activations, on_codes)
        rounded_network = stack.enter_context(passes(quantized, hidden.quantized, inputs))
        products: dict[str, Any] = {}
        if on_codes:
            # From the beginning: a waiting pass has taken its layer's function along already.
            for name in (name for names in local for name in names):
                quantized.get_submodule(name).forward = lambda x, name=name: products[name](
                    inputs.codes[rounded_network.window]
                )
        float_network, routed = None, False

        def end_float(window: int) -> None:
            # Nothing that is still to be rounded concerns the float network.
            if float_network is None:
                return
            if hidden.float_states is None or routed:
                float_network.leave(window)
            else:
                hidden.float_states[window] = float_network.finish(window)[0]

        if options.needs_float:
            same = RoundedInputs(path, None)
            states = hidden.quantized if hidden.float_states is None else hidden.float_states
            float_network = stack.enter_context(passes(block, states, same))
            routed = _share_routes(stack, quantized, rounded_network, block, float_network)
        for index, group in enumerate(groups):
            started = time.monotonic()
            last = index == len(groups) - 1
            moments = _collect(
                group,
                index,
                rounded_network,
                float_network,
                hidden.quantized.shape[:2],
                end_float if last else None,
            )
            given = _weights(block, path, group)
            divisor = shared.get(group[0].name)
            if moments.count:
                found = _round(given, moments, weights, divisor, options, executor)
            else:
                found = _round_idle(given, weights, divisor, options)
            seconds = time.monotonic() - started
            for row in group:
                name = row.name.removeprefix(f"{path}.")
                layer = _layer(block.get_submodule(name), row, found[row.name], activations)
                # The same numbers that the layer will multiply by.
                module: Any = quantized.get_submodule(name)
                module.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
                if on_codes:
                    products[name] = linear_on_codes(layer)
                layers[row.name] = layer
                table.append(_report(row, found[row.name], moments.count, seconds / len(group)))
            del moments
            progress()
        for window in range(count):
            hidden.quantized[window] = rounded_network.finish(window)[0]
    if routed and hidden.float_states is not None:
        # The float model goes its own ways.
        for window in range(count):
            state = hidden.float_states[window : window + 1]
            hidden.float_states[window] = run_block(block, state, arguments)[0]
    return RoundedBlock(layers, table, hidden)


def _share_routes(
    stack: ExitStack,
    quantized: torch.nn.Module,
    rounded: BlockPasses,
    block: torch.nn.Module,
    reference: BlockPasses,
) -> bool:
    """Let tokens of the float block visit the experts that they visit in the quantized one.

    Returns whether there are experts at all.
    """
    routes: dict[tuple[str, int], tuple[Any, ...]] = {}
    lists = [name for name, module in block.named_modules() if isinstance(module, ExpertList)]
    for name in lists:

        def note(module: torch.nn.Module, args: Any, name: str = name) -> None:
            routes[name, rounded.window] = args[1:]

        def follow(module: torch.nn.Module, args: Any, name: str = name) -> tuple[Any, ...]:
            return (args[0], *routes[name, reference.window])

        for network, hook in ((quantized, note), (block, follow)):
            handle = network.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
    return bool(lists)


def _held(states: Windows, rows: Sequence[MatrixPlan]) -> int:
    # A waiting pass holds the residual, a norm's output, and the widest input: as it came, rotated
    # and rounded, or less, as codes.
    widest = max(row.shape[1] for row in rows)
    windows, length, hidden = states.shape
    held: int = windows * length * (2 * hidden + 3 * widest) * states.element_size()
    return held


def _collect(
    group: Sequence[MatrixPlan],
    index: int,
    rounded: BlockPasses,
    reference: BlockPasses | None,
    shape: tuple[int, int],
    done: Callable[[int], None] | None,
) -> InputMoments:
    name, (count, length) = group[0].name, shape
    moments = InputMoments(group[0].shape[1], cross=reference is not None)
    for window in range(count):
        q = rounded.reach(window, index)
        x = None if reference is None else reference.reach(window, index)
        if reference is not None:
            _check_same_tokens(group[0], window, length, q, x)
        try:
            if q is not None:
                moments.update(q, x)
        except cq.NonFiniteError as error:
            what = f"{error.name} of {name} in calibration window {window}"
            raise cq.NonFiniteError(what, error.count, error.index, error.value) from None
        if done is not None:
            del x
            done(window)
    if moments.count == 0 and group[0].expert is None:
        raise CalibrationError(
            f"at least one token must reach {name}, after the layers described before it, got none "
            f"in {count} calibration windows"
        )
    return moments


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


def _round(
    weights: Mapping[str, npt.NDArray[Any]],
    moments: InputMoments,
    spec: cq.QuantSpec,
    divisor: npt.NDArray[np.float32] | None,
    options: RoundingOptions,
    executor: Executor | None,
) -> dict[str, RoundedTensor]:
    H, G = moments.H, moments.G
    if not H.is_cpu and spec.scale_search not in _SEARCHED_AT_HOME:
        return _round_on_device(weights, moments, spec, divisor, options)
    H, G = to_host(H), None if G is None else to_host(G)
    # One by one in any case: products of all rows together would be summed in another order, and
    # the codes would depend on the executor. What they could share is little beside the work on
    # the widest layer of a block, which shares with none.
    shared: dict[str, Any] = {"global_scale": divisor, "tokens": moments.count}
    if executor is None:
        found = [
            round_together({name: W}, spec, options, H, G, **shared) for name, W in weights.items()
        ]
    else:
        waiting = [
            executor.submit(round_together, {name: W}, spec, options, H, G, **shared)
            for name, W in weights.items()
        ]
        found = [future.result() for future in waiting]
    return {name: one for each in found for name, one in each.items()}


def _round_idle(
    weights: Mapping[str, npt.NDArray[Any]],
    spec: cq.QuantSpec,
    divisor: npt.NDArray[np.float32] | None,
    options: RoundingOptions,
) -> dict[str, RoundedTensor]:
    """Round an expert that no token visits: to nearest, as far as an accumulator's bounds let it.

    With inputs that have nothing to do with each other, that is what GPTQ does.
    """
    if options.accumulator is None:
        return round_together(weights, spec, RoundingOptions(), global_scale=divisor)
    bounded = RoundingOptions("gptq", accumulator=options.accumulator)
    width = next(iter(weights.values())).shape[1]
    H = np.eye(width, dtype=np.float32)
    return round_together(weights, spec, bounded, H, global_scale=divisor)


def _round_on_device(
    weights: Mapping[str, npt.NDArray[Any]],
    moments: InputMoments,
    spec: cq.QuantSpec,
    divisor: npt.NDArray[np.float32] | None,
    options: RoundingOptions,
) -> dict[str, RoundedTensor]:
    """Round where the moments are; codes and scales come home."""
    H, G = moments.H, moments.G
    there = None if divisor is None else torch.from_numpy(divisor).to(H.device)
    result = {}
    for name, W in weights.items():
        given = {name: torch.from_numpy(W).to(H.device)}
        shared: dict[str, Any] = {"global_scale": there, "tokens": moments.count}
        found = round_together(given, spec, options, H, G, **shared)[name]
        arrays = (found.codes, found.scales, found.zero_points, found.global_scale)
        codes, scales, zeros, own = (None if t is None else to_host(t) for t in arrays)
        quantized = cq.QuantizedTensor(codes, scales, zeros, found.spec, own)
        result[name] = RoundedTensor.of(quantized, found.report)
    return result


def _layer(
    module: Any, row: MatrixPlan, rounded: RoundedTensor, activations: cq.QuantSpec | None
) -> QuantizedLinear:
    rotation = row.input.rotation if row.online else None
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float()
    layer = QuantizedLinear(rounded, bias, rotation, activations, row.name)
    return layer.to(module.weight.device)


def _report(row: MatrixPlan, rounded: RoundedTensor, tokens: int, seconds: float) -> dict[str, Any]:
    report = rounded.report
    damping = report.damping
    return {
        "name": row.name,
        **({} if tokens else {"unrouted": True}),
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
