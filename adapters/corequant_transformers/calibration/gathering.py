"""One float pass over the calibration windows, block by block, that collects statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant_transformers.calibration.choices import Calibration
from corequant_transformers.calibration.collector import Collector
from corequant_transformers.model.forward import block_arguments, enter, run_block
from corequant_transformers.model.hidden_states import Windows
from corequant_transformers.model.parts import ENTRY, EXIT, Parts, part_of
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.run.sign_trials import SignTrials

__all__ = ["collect_block", "gather"]

Tokens = npt.NDArray[np.int64]


@torch.no_grad()
def gather(
    parts: Parts,
    plan: ModelPlan,
    tokens: Tokens,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Calibration:
    """Run the float model over the calibration windows and keep the statistics of all regions.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64
    progress : callable
        Called as ``progress(phase, done, total)``.

    Raises
    ------
    NonFiniteError
        If weights or activations hold NaN or infinity.
    """
    collector = Collector(plan, (tokens.shape[0], tokens.shape[1]))
    trials = None
    if plan.recipe.sign_trials > 1 and plan.draw_signs():
        trials = SignTrials(parts, plan, tokens)
    arguments = block_arguments(parts, tokens[0], torch.float32)
    states = (*tokens.shape, plan.dimensions.hidden)
    hidden = torch.empty(states, dtype=torch.float32)
    draws = torch.empty(trials.shape if trials is not None else 0, dtype=torch.float32)
    with parts.open(ENTRY):
        for k, window in enumerate(tokens):
            hidden[k] = enter(parts, window)
        if trials is not None:
            trials.enter(draws)
    for i in parts.blocks:
        with parts.open(i):
            collect_block(parts, plan, i, collector, hidden, arguments[i], progress)
            if trials is not None:
                trials.advance(i, draws)
    found = Calibration(tokens, collector.statistics, collector.held_out)
    if trials is None:
        return found
    with parts.open(EXIT):
        losses = trials.losses(draws)
    return replace(found, draw=int(np.argmin(losses)), draw_losses=tuple(losses))


@torch.no_grad()
def collect_block(
    parts: Parts,
    plan: ModelPlan,
    index: int,
    collector: Collector,
    hidden: Windows,
    arguments: dict[str, Any],
    progress: Callable[[str, int, int], None],
) -> None:
    """Run an open float block over all windows and collect what its layers read.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    index : int
    collector : Collector
    hidden : Windows
        What the block reads; overwritten by what it gives.
    arguments : dict
        Of the block, besides its hidden states.
    progress : callable
        Called as ``progress("calibrate", done, total)``, counting windows through all blocks.
    """
    readers = [
        (region, reader)
        for region in plan.regions
        for reader in region.readers
        if part_of(f"{reader}.", plan) == index
    ]
    with collector.watching(parts.model, readers):
        for k in range(len(hidden)):
            collector.position = k
            hidden[k] = run_block(parts.block(index), hidden[k : k + 1], arguments)
            progress("calibrate", index * len(hidden) + k + 1, len(parts.blocks) * len(hidden))
