"""One float forward pass that collects the statistics a plan needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant_transformers.choosing import Calibration, needs_second_order, needs_tokens
from corequant_transformers.planning import ModelPlan
from corequant_transformers.rows import Region
from corequant_transformers.texts import check_tokens

__all__ = ["collect_statistics"]

_RESERVOIR = 1024
"""Tokens kept of each layer: 6 MiB at 1536 channels."""

_ENERGY_TOKENS = 4096
"""Tokens after which the permutations made from energies gain nothing measurable."""


@torch.no_grad()
def collect_statistics(
    model: Any,
    plan: ModelPlan,
    tokens: npt.NDArray[np.int64],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Run the float model over token windows and gather what each MLP's ``down`` reads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The untransformed model.
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64
    progress : callable
        Told how many windows of how many are done.

    Returns
    -------
    Calibration
        With statistics by the name of the region. Where choices are judged by tokens, the last
        window is held out. Some thousand tokens are enough for the second-order statistic.

    Raises
    ------
    NonFiniteError
        If an activation holds NaN or infinity; names the layer and the window.
    """
    recipe = plan.recipe
    kept = _RESERVOIR if needs_tokens(recipe) else 0
    statistics = {
        r.name: cq.ActivationStats(
            r.width,
            energy_gram=needs_second_order(recipe),
            energy_stride=_energy_stride(plan, tokens),
            reservoir=kept,
            seed=recipe.seed,
        )
        for r in plan.regions
    }
    held_out = {
        r.name: cq.ActivationStats(r.width, reservoir=kept, seed=recipe.seed)
        for r in plan.regions
        if kept
    }
    windows = check_tokens(tokens)
    # A single window has to serve for both.
    judging = len(windows) - 1 if kept and len(windows) > 1 else len(windows)
    position = 0

    def watch(region: Region, reader: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            try:
                if position < judging:
                    statistics[region.name].update(_tokens(args[0], region))
                if kept and (position >= judging or len(windows) == 1):
                    held_out[region.name].update(_tokens(args[0], region))
            except cq.NonFiniteError as error:
                name = f"the input of {reader} in calibration window {position}"
                raise cq.NonFiniteError(name, error.count, error.index, error.value) from None

        return hook

    trunk = model.get_submodule(plan.architecture.embedding.rpartition(".")[0])
    with ExitStack() as hooks:
        for region in plan.regions:
            for reader in region.readers:
                hook = watch(region, reader)
                handle = model.get_submodule(reader).register_forward_pre_hook(hook)
                hooks.callback(handle.remove)
        for position, window in enumerate(windows):
            trunk(input_ids=torch.from_numpy(window)[None], use_cache=False)
            progress(position + 1, len(windows))
    return Calibration(windows, statistics, held_out)


def _tokens(x: torch.Tensor, region: Region) -> torch.Tensor:
    """Return an activation with a row for each of the heads that share the region's channels."""
    repeat = region.side.repeat
    if repeat == 1:
        return x
    heads = x.reshape(*x.shape[:-1], region.side.heads, repeat, -1)
    return heads.transpose(-3, -2).reshape(*x.shape[:-1], repeat, region.width)


def _energy_stride(plan: ModelPlan, tokens: npt.NDArray[np.int64]) -> int:
    """Return which tokens enter the energy statistic: 4096 in all, and no fewer than an eighth."""
    if plan.dimensions.experts:
        # An expert sees few tokens anyway.
        return 1
    return min(8, max(2, np.size(tokens) // _ENERGY_TOKENS))
