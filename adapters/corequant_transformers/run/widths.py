"""The steps that choose layers' widths within a budget, before anything is rounded.

The transformed but unrounded model runs over a few thousand calibration tokens, block by block
(``measure``). The cost of a width is the error of the layer's outputs relative to the outputs. With
sensitivity ``kl`` it is the effect on the predicted probabilities, found from gradients that are
traced back through the blocks, from the last one to the first (``gradient``). Then all widths are
chosen together (``allocate``) and become rules of the recipe.

For ``kl``, labels are drawn from the model's own predictions. The second moments of the gradients
of their log-probabilities are then the Hessian of the KL divergence from the float model. For the
gradient of a weight in a window, summed over its tokens, each squared entry is twice what a squared
error of that entry adds: rounding errors of different entries are nearly independent, but the error
of one entry is the same for all tokens, which attention combines. The result is an estimate for
each layer alone and for small errors.

Source: Martens, "New insights and perspectives on the natural gradient method", Journal of Machine
Learning Research 21 (2020), arXiv 1412.1193, section 9.2, about sampled labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.model.forward import Windows, enter, follow_block, run_block
from corequant_transformers.model.parts import ENTRY, EXIT, Parts, part_plan
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.planning.widths import Shares
from corequant_transformers.rounding.sensitivity import Watch, gradient_of_logits, layer_losses
from corequant_transformers.run.blocks import Stacks
from corequant_transformers.run.ledger import ALLOCATE, Ledger, width_steps
from corequant_transformers.transforms.matrices import (
    Choices,
    restore,
    transform_model,
    transform_side,
)

__all__ = ["Widths"]

_WINDOWS, _LENGTH = 8, 512
"""Number of windows to measure, evenly spaced, and number of their first tokens."""

_INPUT = "input"


class Widths:
    """The measurements from which a run chooses widths, and the choice.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64
        All calibration windows.
    ledger : Ledger
    progress : callable
        Called as ``progress(phase, done, total)``.

    Attributes
    ----------
    steps : list of str
        Names of the steps; empty for a recipe without a budget.
    """

    def __init__(
        self,
        parts: Parts,
        plan: ModelPlan,
        tokens: npt.NDArray[np.int64],
        ledger: Ledger,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.steps = width_steps(plan)
        taken = np.linspace(0, len(tokens) - 1, min(_WINDOWS, len(tokens))).round().astype(int)
        self._tokens = np.ascontiguousarray(tokens[taken, :_LENGTH])
        self._parts, self._ledger, self._progress = parts, ledger, progress
        self._stacks = Stacks(parts, self._tokens, self._tokens[0])
        self._shape = (*self._tokens.shape, parts.plan.dimensions.hidden)

    def prepare(self) -> None:
        """Record the arguments of the blocks other than hidden states."""
        if self.steps:
            self._stacks.prepare()

    def carry_out(self, step: str, plan: ModelPlan, choices: Choices) -> None:
        """Carry out a step and commit it."""
        kind, _, index = step.partition("-")
        if step == ALLOCATE:
            self._allocate(step, plan)
        elif kind == "measure":
            self._measure(step, int(index), plan, choices)
        else:
            self._gradient(step, int(index) if index else None, plan, choices)

    # ---- forward

    @torch.no_grad()
    def _measure(self, step: str, index: int, plan: ModelPlan, choices: Choices) -> None:
        """Run an unrounded block, and measure its layers unless gradients are needed."""
        state = self._first(plan, choices) if index == 0 else self._ledger.state()
        state = self._stacks.arrive(index, state, self._ledger)
        following = self._ledger.windows("hidden-next", self._shape, torch.float32)
        backwards = plan.recipe.sensitivity == "kl"
        arguments = self._stacks.arguments(torch.float32, index, state, "hidden")
        losses: dict[str, list[float]] = {}
        with self._transformed(index, plan, choices) as model:
            rows = self._rows(index, plan)
            with Watch(model, () if backwards else rows) as watch:
                for k in range(len(self._tokens)):
                    block = self._parts.block(index)
                    following[k] = run_block(block, state["hidden"][k : k + 1], arguments, k)[0]
            if not backwards:
                losses = layer_losses(model, plan.recipe, rows, watch, self._tokens.size)
        inputs = {_INPUT: state["hidden"][0 : len(self._tokens)]} if backwards else {}
        self._note(index, 2 if backwards else 1)
        carried = self._stacks.carried(state)
        self._ledger.commit(step, {"losses": losses}, inputs, {"hidden": following, **carried})

    def _first(self, plan: ModelPlan, choices: Choices) -> dict[str, Windows]:
        """Return the input of the first block of the transformed model."""
        hidden = self._ledger.windows("hidden", self._shape, torch.float32)
        with self._parts.open(ENTRY):
            for k, window in enumerate(self._tokens):
                x = enter(self._parts, window).double().cpu().numpy()[0]
                hidden[k] = torch.from_numpy(transform_side(x, plan.written, "input", choices))
        return {"hidden": hidden}

    @contextmanager
    def _transformed(self, index: int, plan: ModelPlan, choices: Choices) -> Iterator[Any]:
        """Open a block, transformed as it will be before it is rounded."""
        with self._parts.open(index) as model:
            model.double()
            transform_model(model, part_plan(plan, index), choices)
            model.float()
            yield model

    @staticmethod
    def _rows(index: int, plan: ModelPlan) -> list[MatrixPlan]:
        """Return the layers of a block whose widths are to be chosen."""
        units = Shares.of(plan.recipe, plan.architecture, plan.matrices).units
        return [row for unit in units for row in unit if row.block == index]

    def _note(self, done: int, passes: int) -> None:
        self._progress("widths", done + 1, passes * len(self._parts.blocks))

    # ---- backward

    def _gradient(self, step: str, index: int | None, plan: ModelPlan, choices: Choices) -> None:
        """Trace gradients back to a block's input, and measure its layers on the way."""
        state = self._ledger.state()
        before = self._ledger.windows("gradient-next", self._shape, torch.float32)
        losses: dict[str, list[float]] = {}
        if index is None:
            self._start(state["hidden"], before, plan, choices)
        else:
            losses = self._return(index, state["gradient"], before, plan, choices)
            self._note(2 * len(self._parts.blocks) - 1 - index, 2)
        self._ledger.commit(step, {"losses": losses}, {}, {"gradient": before})

    def _start(self, hidden: Windows, before: Windows, plan: ModelPlan, choices: Choices) -> None:
        generator = torch.Generator().manual_seed(plan.recipe.seed)
        with self._parts.open(EXIT):
            for k, ids in enumerate(self._tokens):
                before[k] = gradient_of_logits(
                    self._parts,
                    hidden[k : k + 1],
                    ids,
                    lambda x: restore(x, plan.written, choices).to(x.dtype),
                    generator,
                )

    def _return(
        self,
        index: int,
        gradient: Windows,
        before: Windows,
        plan: ModelPlan,
        choices: Choices,
    ) -> dict[str, list[float]]:
        inputs = self._ledger.tensors(f"measure-{index:05d}")[_INPUT]
        arguments = self._stacks.arguments(torch.float32, index, {}, "hidden")
        with self._transformed(index, plan, choices) as model:
            rows = self._rows(index, plan)
            with Watch(model, rows, gradients=True) as watch:
                for k in range(len(inputs)):
                    x = inputs[k : k + 1].to(self._parts.device).requires_grad_()
                    with torch.enable_grad():
                        y = follow_block(self._parts.block(index), x, arguments, k)
                    before[k] = watch.trace_back(x, y, gradient[k : k + 1])
            return layer_losses(model, plan.recipe, rows, watch, self._tokens.size)

    # ---- the choice

    def _allocate(self, step: str, plan: ModelPlan) -> None:
        """Choose the widths from the measurements of the earlier steps."""
        losses: Mapping[str, list[float]] = {
            name: values
            for each in self.steps[:-1]
            for name, values in self._ledger.report(each)["losses"].items()
        }
        shares = Shares.of(plan.recipe, plan.architecture, plan.matrices)
        found = shares.allocate(lambda row, k: losses[row.name][k])
        settled = shares.settled(found.choices)
        given = len(plan.recipe.layers)
        report = {
            "bits": shares.bits(found.size),
            "asked": plan.recipe.bits,
            "sensitivity": plan.recipe.sensitivity,
            "loss": found.loss,
            "gap": found.gap,
            "tokens": int(self._tokens.size),
            "candidates": [str(spec) for spec in shares.candidates],
            "layers": [
                {
                    "name": row.name,
                    "weights": str(shares.candidates[choice]),
                    "losses": losses[row.name],
                }
                for unit, choice in zip(shares.units, found.choices.tolist(), strict=True)
                for row in unit
            ],
        }
        rules = [rule.to_dict() for rule in settled.layers[given:]]
        self._ledger.commit(step, {"widths": report, "rules": rules}, {}, {})
