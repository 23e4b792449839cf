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

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from corequant_transformers.model.expert_calls import Room, StreamedPass
from corequant_transformers.model.forward import HiddenStates, run_block
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import streamed_experts
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.expert_groups import Keep, round_experts
from corequant_transformers.rounding.groups import GroupRounding, groups_of
from corequant_transformers.rounding.networks import both_networks
from corequant_transformers.rounding.replay import Replay

__all__ = ["RoundedBlock", "round_block"]


def _in_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


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
    replay: Replay | None = None,
    windows: Room = _in_memory,
    keep: Keep = lambda indices, layers: None,
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
    replay : Replay, optional
        Room for recorded inputs. With it, passes for later groups don't compute again what is
        recorded. Blocks that share it also share what the first of a structure has shown.
    windows : callable
        Gives room for what experts that are read few at a time are called with and give.
    keep : callable
        Called with the indices of such experts, open in ``block``, and their rounded layers by the
        rows' names, which are not kept otherwise.

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
    experts = streamed_experts(block)
    # Those of experts that are read few at a time come between those before and after them.
    dense = [g for g in groups if experts is None or g[0].expert is None]
    later = next(
        (k for k, g in enumerate(groups) if experts is not None and g[0].expert is not None),
        len(dense),
    )
    rounding = GroupRounding(block, path, executor, progress, rare)
    shared = rounding.global_scales([row for group in dense for row in group])
    with ExitStack() as stack:
        compares = any(row.options.needs_float for row in rows)
        given = (arguments, compared)
        networks = both_networks(stack, block, path, dense, hidden, given, compares, replay)
        layers = rounding.run(networks, range(later), shared)
        if experts is not None:
            few = [row for row in rows if row.expert is not None]
            runs_on = later < len(dense)
            outputs = round_experts(
                rounding, networks, experts, few, windows, keep, runs_on=runs_on
            )
            outputs.give(stack)
        layers |= rounding.run(networks, range(later, len(dense)), shared)
        for window in range(len(hidden.quantized)):
            hidden.quantized[window] = networks.rounded.finish(window)[0]
        # Experts choose their tokens themselves where nothing is compared any more.
        reference = None if networks.experts else networks.reference
        if hidden.float_states is not None and reference is not None:
            for window in range(len(hidden.float_states)):
                hidden.float_states[window] = reference.finish(window)[0]
    if hidden.float_states is not None and experts is not None:
        StreamedPass(block, experts, hidden.float_states, compared, windows, "own").run()
    elif hidden.float_states is not None and reference is None:
        for window in range(len(hidden.float_states)):
            state = hidden.float_states[window : window + 1]
            hidden.float_states[window] = run_block(block, state, compared, window)[0]
    return RoundedBlock(layers, rounding.table, hidden)
