"""A decoder block's step: transformed, compared with the float one, rounded, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from corequant_transformers.checkpoint.tensors import layer_tensors, part_tensors
from corequant_transformers.model.forward import HiddenStates, Windows, run_block
from corequant_transformers.model.parts import Parts, part_plan
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import (
    StreamedExperts,
    plan_of,
    rest_of,
)
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.rounding.block import round_block
from corequant_transformers.rounding.layers import (
    round_nearest,
    round_unquantized,
    round_unquantized_experts,
)
from corequant_transformers.run.ledger import Ledger
from corequant_transformers.run.stacks import Stacks
from corequant_transformers.transforms.changes import transform_checked
from corequant_transformers.transforms.experts import transform_experts
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.verification import (
    KeepFloat64,
    check_block_error,
    stream_error,
)

__all__ = ["BlockStep", "opened_layer", "quantize_block"]


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
    step: BlockStep, executor: Executor | None, progress: Callable[[int], None]
) -> None:
    """Carry out a block's step.

    Parameters
    ----------
    step : BlockStep
    executor : concurrent.futures.Executor, optional
    progress : callable
        Called with the number of groups of layers that are rounded.
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
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Round a transformed block on what it reads, in place, and return rows for the report."""
    model, recipe = step.parts.model, step.plan.recipe
    model.float()
    rounded = round_block(
        step.parts.block(step.index),
        step.plan.architecture.block_path(step.index),
        step.rows.quantized,
        hidden,
        *step.stacks.rounded_arguments(step.index, state),
        executor=executor,
        progress=progress,
        rare=(recipe.expert_tokens, recipe.rare_experts),
        room=step.ledger.spare,
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
