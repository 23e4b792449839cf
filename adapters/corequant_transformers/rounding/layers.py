"""One part's life: transform it in float64, prove that it computes the same, round it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import corequant as cq
from corequant.rounding import RoundedTensor, round_to_nearest
from corequant_transformers.model.devices import to_host
from corequant_transformers.model.parts import Part, Parts, part_plan
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.planning.cost import HELD_BYTES
from corequant_transformers.planning.model_plan import MatrixPlan, ModelPlan
from corequant_transformers.rounding.block import HiddenStates, groups_of, round_block
from corequant_transformers.rounding.groups import shared_global_scales
from corequant_transformers.transforms.matrices import Choices, transform_model
from corequant_transformers.transforms.verification import check_changed, fingerprints

__all__ = ["Rounding", "round_nearest", "transform_part"]


def transform_part(parts: Parts, part: Part, plan: ModelPlan, choices: Choices) -> int:
    """Transform an open part in float64 and return how many of its matrices changed.

    Raises
    ------
    VerificationError
        If a matrix that should change doesn't, or a run-time rotation is missing.
    """
    rows = part_plan(plan, part)
    before = fingerprints(parts.model, rows)
    transform_model(parts.model, rows, choices)
    return check_changed(before, parts.model, rows, choices)


def round_nearest(
    model: Any, plan: ModelPlan, executor: Executor | None = None
) -> list[dict[str, Any]]:
    """Round a transformed part's matrices to nearest, in place, and return rows for the report.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the part open.
    plan : ModelPlan
        The part's.
    executor : concurrent.futures.Executor, optional
        Rounds its matrices at the same time.
    """
    weights = {m.name: _weight(model, m) for m in plan.quantized}
    spec = plan.recipe.weights
    shared = shared_global_scales(plan.quantized, weights, spec)
    tasks = {
        name: partial(round_to_nearest, W, spec, global_scale=shared.get(name))
        for name, W in weights.items()
    }
    if executor is None:
        found = {name: task() for name, task in tasks.items()}
    else:
        waiting = {name: executor.submit(task) for name, task in tasks.items()}
        found = {name: future.result() for name, future in waiting.items()}
    return [_place(model, m, plan, weights[m.name], found[m.name]) for m in plan.quantized]


def _weight(model: Any, matrix: MatrixPlan) -> Any:
    return to_host(model.get_submodule(matrix.name).weight).astype(np.float32)


def _place(
    model: Any, matrix: MatrixPlan, plan: ModelPlan, W: Any, rounded: RoundedTensor
) -> dict[str, Any]:
    module = model.get_submodule(matrix.name)
    bias = getattr(module, "bias", None)
    layer = QuantizedLinear(
        rounded,
        None if bias is None else bias.detach().float(),
        matrix.input.rotation if matrix.online else None,
        plan.recipe.activations,
        matrix.name,
    )
    model.set_submodule(matrix.name, layer.to(module.weight.device))
    error = _relative_squared_error(W, cq.dequantize(rounded))
    return {"name": matrix.name, "relative_squared_error": error}


def _relative_squared_error(W: Any, rounded: Any) -> float:
    error = total = 0.0
    # In float64, where squares of float32 are finite, and few rows at a time.
    for first in range(0, len(W), 256):
        rows = slice(first, first + 256)
        wide = W[rows].astype(np.float64)
        error += float(np.square(wide - rounded[rows]).sum())
        total += float(np.square(wide).sum())
    return error / max(total, 1e-30)


@dataclass
class Rounding:
    """How the decoder blocks of a model are rounded, one after the other.

    Attributes
    ----------
    plan : ModelPlan
    arguments : sequence of mapping
        Of each block, besides its hidden states.
    executor : concurrent.futures.Executor, optional
    held_bytes : int
        What forward passes may hold while they wait.
    progress : callable
        Told how many groups of how many are done, where blocks are rounded for what they read.
    """

    plan: ModelPlan
    arguments: Sequence[Mapping[str, Any]]
    executor: Executor | None = None
    held_bytes: int = HELD_BYTES
    progress: Callable[[int, int], None] = lambda done, total: None

    def round_outside(self, parts: Parts, part: Part) -> list[dict[str, Any]]:
        """Round the matrices of a transformed part that is no block, to nearest."""
        return round_nearest(parts.model, part_plan(self.plan, part), self.executor)

    def round(self, parts: Parts, index: int, hidden: HiddenStates | None) -> list[dict[str, Any]]:
        """Round a transformed block in place; hidden states go through it on the way.

        Parameters
        ----------
        parts : Parts
            With the block open.
        index : int
        hidden : HiddenStates, optional
            What the block reads, where blocks are rounded for that.

        Returns
        -------
        list of dict
            Rows for the report.
        """
        rows = part_plan(self.plan, index)
        if hidden is None:
            return round_nearest(parts.model, rows, self.executor)
        parts.model.float()
        recipe = self.plan.recipe
        groups = [len(groups_of(part_plan(self.plan, i).quantized)) for i in parts.blocks]
        done = iter(range(sum(groups[:index]) + 1, sum(groups) + 1))
        with torch.no_grad():
            rounded = round_block(
                parts.block(index),
                self.plan.architecture.block.format(index),
                rows.quantized,
                hidden,
                self.arguments[index],
                recipe.weights,
                recipe.activations,
                recipe.rounding_options(),
                executor=self.executor,
                held_bytes=self.held_bytes,
                progress=lambda: self.progress(next(done), sum(groups)),
            )
        for name, layer in rounded.layers.items():
            parts.model.set_submodule(name, layer)
        return rounded.rows
