"""Choose the residual stream's signs: of several draws, the one whose rounded model loses least.

The draws differ little in the error of any one layer and a lot in what the whole model loses, so
nothing short of running the rounded model tells them apart. A few hundred tokens find the bad ones:
of three draws on SmolLM2-135M, the losses on 512 calibration tokens and on 8192 test tokens had one
order. They don't order draws that come close.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.evaluation.perplexity import perplexity
from corequant_transformers.model.forward import Windows, block_arguments, enter, leaving, run_block
from corequant_transformers.model.parts import ENTRY, EXIT, Part, Parts, part_plan
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.rounding.layers import round_nearest, round_unquantized
from corequant_transformers.transforms.matrices import Choices, transform_model

__all__ = ["SignTrials"]

_JUDGED_TOKENS = 512


class SignTrials:
    """All draws of signs side by side: each open part is transformed and rounded for each of them.

    Losses are those of a model with weights rounded to nearest and rotations over the full width.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
        Its recipe says how many draws are tried.
    tokens : numpy.ndarray (windows, length), int64
        The first 512 tokens of the last window judge.
    """

    def __init__(self, parts: Parts, plan: ModelPlan, tokens: npt.NDArray[np.int64]) -> None:
        # What is chosen later, block by block, has no part in this choice.
        recipe = replace(plan.recipe, block_size=None, permutation="identity", factors="none")
        rules = tuple(
            rule if rule.permutation is None else replace(rule, permutation="identity")
            for rule in plan.recipe.layers
        )
        recipe = replace(recipe, layers=rules)
        self.parts = parts
        self.plan = plan_model(parts.model.config, recipe, plan.architecture)
        self.window = tokens[-1, :_JUDGED_TOKENS]
        self.arguments = block_arguments(parts, self.window, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the hidden states: draws, length, hidden."""
        return self.plan.recipe.sign_trials, len(self.window), self.plan.dimensions.hidden

    def enter(self, states: Windows) -> None:
        """Write what the first block reads under each draw; the entry must be open."""
        for draw in range(len(states)):
            with self._transformed(ENTRY, draw):
                states[draw] = enter(self.parts, self.window)

    def advance(self, index: int, states: Windows) -> None:
        """Replace what a block reads by what it gives; the block must be open."""
        for draw in range(len(states)):
            with self._transformed(index, draw):
                block = self.parts.block(index)
                states[draw] = run_block(block, states[draw : draw + 1], self.arguments[index])

    def losses(self, states: Windows) -> list[float]:
        """Return each draw's mean loss in nats per token; the exit must be open.

        Raises
        ------
        NonFiniteError
            If activations hold NaN or infinity.
        """
        found = []
        for draw in range(len(states)):
            with (
                self._transformed(EXIT, draw),
                leaving(self.parts, states[draw : draw + 1]) as model,
            ):
                found.append(math.log(perplexity(model, self.window[None])))
        return found

    @contextmanager
    def _transformed(self, part: Part, draw: int) -> Iterator[None]:
        """Replace an open part by a transformed copy within the context."""
        model: Any = self.parts.model
        originals = {path: model.get_submodule(path) for path in self.parts.modules(part)}
        try:
            for path, module in originals.items():
                model.set_submodule(path, copy.deepcopy(module))
            transform_model(
                model, part_plan(self.plan, part), Choices({}, self.plan.draw_signs(draw))
            )
            round_unquantized(model, self.plan, part)
            round_nearest(model, part_plan(self.plan, part))
            yield
        finally:
            for path, module in originals.items():
                model.set_submodule(path, module)
