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
from corequant_transformers.planning import MatrixPlan, ModelPlan
from corequant_transformers.texts import check_tokens

__all__ = ["collect_statistics"]

_RESERVOIR = 1024
"""Tokens kept of each layer: 6 MiB at 1536 channels."""


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
        With statistics by the name of the matrix that reads the activation. Where choices are
        judged by tokens, the last window is held out, and every second token is enough for the
        statistics.

    Raises
    ------
    NonFiniteError
        If an activation holds NaN or infinity; names the layer and the window.
    """
    recipe = plan.recipe
    kept = _RESERVOIR if needs_tokens(recipe) else 0
    statistics = {
        m.name: cq.ActivationStats(
            m.shape[1], energy_gram=needs_second_order(recipe), reservoir=kept, seed=recipe.seed
        )
        for m in plan.online
    }
    held_out = {
        m.name: cq.ActivationStats(m.shape[1], reservoir=kept, seed=recipe.seed)
        for m in plan.online
        if kept
    }
    windows = check_tokens(tokens)
    # A single window has to serve for both.
    judging = len(windows) - 1 if kept and len(windows) > 1 else len(windows)
    stride = 2 if needs_second_order(recipe) else 1
    position = 0

    def watch(matrix: MatrixPlan) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            try:
                if position < judging:
                    statistics[matrix.name].update(args[0][..., ::stride, :])
                if kept and (position >= judging or len(windows) == 1):
                    held_out[matrix.name].update(args[0])
            except cq.NonFiniteError as error:
                name = f"the input of {matrix.name} in calibration window {position}"
                raise cq.NonFiniteError(name, error.count, error.index, error.value) from None

        return hook

    trunk = model.get_submodule(plan.architecture.embedding.rpartition(".")[0])
    with ExitStack() as hooks:
        for matrix in plan.online:
            handle = model.get_submodule(matrix.name).register_forward_pre_hook(watch(matrix))
            hooks.callback(handle.remove)
        for position, window in enumerate(windows):
            trunk(input_ids=torch.from_numpy(window)[None], use_cache=False)
            progress(position + 1, len(windows))
    return Calibration(windows, statistics, held_out)
