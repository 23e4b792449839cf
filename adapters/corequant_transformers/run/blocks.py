"""A decoder block's step: transformed, compared with the float one, rounded, and kept.

Blocks of a second stack read what the first one gave, which differs from window to window and from
network to network: its states are kept with the hidden states, under names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.checkpoint.tensors import layer_tensors, part_tensors
from corequant_transformers.model.forward import (
    Crossing,
    HiddenStates,
    PerWindow,
    Windows,
    block_arguments,
    enter,
    run_block,
)
from corequant_transformers.model.parts import ENTRY, Parts, part_plan
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import (
    StreamedExperts,
    plan_of,
    rest_of,
)
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.rounding.block import round_block
from corequant_transformers.rounding.groups import groups_of
from corequant_transformers.rounding.layers import (
    round_nearest,
    round_unquantized,
    round_unquantized_experts,
)
from corequant_transformers.rounding.replay import Replay
from corequant_transformers.run.ledger import Ledger
from corequant_transformers.transforms.experts import transform_experts
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.verification import (
    KeepFloat64,
    check_block_error,
    stream_error,
    transform_checked,
)

__all__ = ["BlockStep", "Stacks", "opened_layer", "quantize_block"]

Tokens = npt.NDArray[np.int64]

_KEPT = "memory-"
_VERIFIED = ("reference", "transformed")
_ROUNDED = ("quantized", "float")


class Stacks:
    """The stacks of a model's blocks: one, or that of an encoder and that of a decoder.

    Parameters
    ----------
    parts : Parts
    tokens : numpy.ndarray (windows, length), int64
    verified : numpy.ndarray (length,), int64
        Tokens on which the model is compared in float64.
    """

    def __init__(self, parts: Parts, tokens: Tokens, verified: Tokens) -> None:
        self._parts, self._tokens, self._verified = parts, tokens, verified
        self._fixed: dict[torch.dtype, list[dict[str, Any]]] = {}

    def prepare(self) -> None:
        """Record the arguments of the blocks other than hidden states."""
        parts = self._parts
        self._fixed[torch.float32] = block_arguments(parts, self._tokens[0], torch.float32)
        with KeepFloat64():
            verified = block_arguments(parts, self._verified, torch.float64)
        self._fixed[torch.float64] = verified

    def arguments(
        self, dtype: torch.dtype, index: int, state: Mapping[str, Windows], name: str
    ) -> dict[str, Any]:
        """Return a block's arguments other than the hidden states kept under ``name``."""
        fixed, second = self._fixed[dtype][index], self._parts.plan.architecture.second
        memory = state.get(f"{_KEPT}{name}")
        if second is None or memory is None:
            return fixed
        return {**fixed, second.states: PerWindow(memory)}

    def rounded_arguments(
        self, index: int, state: Mapping[str, Windows]
    ) -> tuple[dict[str, Any], ...]:
        """Return a block's arguments in the quantized network and in the float one."""
        return tuple(self.arguments(torch.float32, index, state, name) for name in _ROUNDED)

    def rounded(
        self, state: Mapping[str, Windows], following: dict[str, Windows], ledger: Ledger
    ) -> HiddenStates | None:
        """Return the hidden states that rounding reads, with room in ``following`` for the next."""
        crossing = {}
        for name in _ROUNDED:
            if name in state:
                shape = tuple(state[name].shape)
                following[name] = ledger.windows(f"{name}-next", shape, torch.float32)
                crossing[name] = Crossing(state[name], following[name])
        if not crossing:
            return None
        return HiddenStates(crossing["quantized"], crossing.get("float"))

    def carried(self, state: Mapping[str, Windows]) -> dict[str, Windows]:
        """Return the states that later blocks read as well."""
        return {name: windows for name, windows in state.items() if name.startswith(_KEPT)}

    @torch.no_grad()
    def arrive(
        self, index: int, state: Mapping[str, Windows], ledger: Ledger
    ) -> dict[str, Windows]:
        """Return the hidden states that a block reads, which another stack may begin with."""
        second = self._parts.plan.architecture.second
        if second is None or index != second.first or not state:
            return dict(state)
        found = dict(state)
        with self._parts.open(ENTRY) as model:
            model.double()
            with KeepFloat64():
                for name in _VERIFIED:
                    found |= self._crossed(name, state, self._verified[None], ledger)
            model.float()
            found |= self._crossed("hidden", state, self._tokens, ledger)
            # What surrounds the blocks of the rounded network is rounded to its dtype.
            round_unquantized(model, self._parts.plan, ENTRY)
            for name in _ROUNDED:
                found |= self._crossed(name, state, self._tokens, ledger)
        return found

    def _crossed(
        self, name: str, state: Mapping[str, Windows], tokens: Tokens, ledger: Ledger
    ) -> dict[str, Windows]:
        second = self._parts.plan.architecture.second
        if second is None or name not in state:
            return {}
        given = state[name]
        shape, dtype = tuple(given.shape), given[0:1].dtype
        memory = ledger.windows(f"{_KEPT}{name}", shape, dtype)
        first = ledger.windows(f"first-{name}", shape, dtype)
        between = self._parts.model.get_submodule(second.norm)
        for k, window in enumerate(tokens):
            memory[k] = between(given[k : k + 1].to(self._parts.device))[0]
            first[k] = enter(self._parts, window, second.first)[0]
        return {f"{_KEPT}{name}": memory, name: first}


@dataclass(frozen=True, eq=False)
class BlockStep:
    """What a block's step works on: the model and its plan, what was chosen, and where it is kept.

    Attributes
    ----------
    parts : Parts
    plan : ModelPlan
        The whole model's.
    choices : Choices
    ledger : Ledger
    stacks : Stacks
    replay : Replay
    name : str
        Of the step.
    index : int
        Of the block.
    """

    parts: Parts
    plan: ModelPlan
    choices: Choices
    ledger: Ledger
    stacks: Stacks
    replay: Replay
    name: str
    index: int

    @property
    def rows(self) -> ModelPlan:
        """The block's part of the plan."""
        return part_plan(self.plan, self.index)

    @property
    def experts(self) -> StreamedExperts | None:
        """The open block's experts, if they are read few at a time."""
        return self.parts.experts(self.index)

    def arguments(
        self, dtype: torch.dtype, state: Mapping[str, Windows], name: str
    ) -> dict[str, Any]:
        """Return what the block gets besides hidden states of one network."""
        return self.stacks.arguments(dtype, self.index, state, name)

    def keep(self, indices: range, layers: Mapping[str, QuantizedLinear]) -> None:
        """Keep what is stored of some experts, which are open, with their rounded layers."""
        for name, layer in layers.items():
            self.parts.model.set_submodule(name, layer)
        few = plan_of(self.rows, indices)
        self.ledger.keep(self.name, layer_tensors(self.parts.model, few))


@torch.no_grad()
def quantize_block(
    step: BlockStep, executor: Executor | None, progress: Callable[[str, int, int], None]
) -> None:
    """Carry out a block's step.

    Parameters
    ----------
    step : BlockStep
    executor : concurrent.futures.Executor, optional
    progress : callable
        Called as ``progress(phase, done, total)`` with the groups of layers that are rounded.
    """
    plan, index, ledger = step.plan, step.index, step.ledger
    state = step.stacks.arrive(index, ledger.state(), ledger)
    shape = tuple(state["reference"].shape)
    following = {
        name: ledger.windows(f"{name}-next", shape, torch.float64)
        for name in ("reference", "transformed")
    }
    with step.parts.open(index) as model:
        model.double()
        before = _run_verified(step, state, "reference")
        changed = _transform(step)
        after = _run_verified(step, state, "transformed")
        error = stream_error(before, after, plan, step.choices)
        check_block_error(index, error)
        following["reference"][0], following["transformed"][0] = before, after
        round_unquantized(model, plan, index)
        if step.experts is not None:
            round_unquantized_experts(step.experts, step.rows)
        hidden = step.stacks.rounded(state, following, ledger)
        if hidden is None:
            rows = _round_nearest(step, executor)
        else:
            rows = _round(step, hidden, state, executor, progress)
        model.float()
        tensors = part_tensors(model, plan, index, whole=step.experts is None)
    report = {"changed": changed, "error": error, "matrices": rows}
    ledger.commit(step.name, report, tensors, following | step.stacks.carried(state))


def _run_verified(step: BlockStep, state: Mapping[str, Windows], name: str) -> torch.Tensor:
    arguments = step.arguments(torch.float64, state, name)
    with KeepFloat64():
        return run_block(step.parts.block(step.index), state[name][0:1], arguments)


def _transform(step: BlockStep) -> int:
    """Transform an open block, experts whenever they are read; return how many matrices change."""
    model, experts = step.parts.model, step.experts
    later = 0 if experts is None else transform_experts(model, experts, step.rows, step.choices)
    rows = step.rows if experts is None else rest_of(step.rows)
    return later + transform_checked(model, rows, step.choices)


def _round_nearest(step: BlockStep, executor: Executor | None) -> list[dict[str, Any]]:
    """Round a transformed block to nearest in place and return rows for the report."""
    model, experts, rows = step.parts.model, step.experts, step.rows
    if experts is None:
        return round_nearest(model, rows, executor)
    found = round_nearest(model, rest_of(rows), executor)
    model.float()
    for indices in experts.groups():
        with experts.opened(indices):
            found += round_nearest(model, plan_of(rows, indices), executor)
            step.keep(indices, {})
    order = {m.name: k for k, m in enumerate(rows.matrices)}
    return sorted(found, key=lambda row: order[row["name"]])


def _round(
    step: BlockStep,
    hidden: HiddenStates,
    state: Mapping[str, Windows],
    executor: Executor | None,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Round a transformed block on what it reads, in place, and return rows for the report."""
    model, recipe = step.parts.model, step.plan.recipe
    model.float()
    counts = [len(groups_of(part_plan(step.plan, i).quantized)) for i in step.parts.blocks]
    before, total = sum(counts[: step.index]), sum(counts)
    rounded = round_block(
        step.parts.block(step.index),
        step.plan.architecture.block_path(step.index),
        step.rows.quantized,
        hidden,
        *step.stacks.rounded_arguments(step.index, state),
        executor=executor,
        progress=lambda done: progress("round", before + done, total),
        rare=(recipe.expert_tokens, recipe.rare_experts),
        replay=step.replay,
        windows=step.ledger.windows,
        keep=step.keep,
    )
    for name, layer in rounded.layers.items():
        model.set_submodule(name, layer)
    return rounded.rows


@contextmanager
def opened_layer(parts: Parts, name: str) -> Iterator[Any]:
    """Yield a layer of an open block, an expert's with its numbers."""
    index = parts.plan.architecture.block_index(name)
    experts = None if index is None else parts.experts(index)
    matrix = next(m for m in parts.plan.matrices if m.name == name)
    if experts is None or matrix.expert is None:
        yield parts.model.get_submodule(name)
        return
    with experts.opened((matrix.expert,)):
        yield parts.model.get_submodule(name)
