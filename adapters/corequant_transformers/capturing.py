"""One float forward pass that collects the statistics a plan needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant_transformers.planning import MatrixPlan, ModelPlan
from corequant_transformers.texts import check_tokens

__all__ = ["collect_statistics"]


@torch.no_grad()
def collect_statistics(
    model: Any,
    plan: ModelPlan,
    tokens: npt.NDArray[np.int64],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, cq.ActivationStats]:
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
    dict of str to ActivationStats
        By the name of the matrix that reads the activation.

    Raises
    ------
    NonFiniteError
        If an activation holds NaN or infinity; names the layer and the window.
    """
    statistics = {m.name: cq.ActivationStats(m.shape[1]) for m in plan.online}
    position = 0

    def watch(matrix: MatrixPlan) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            try:
                statistics[matrix.name].update(args[0])
            except cq.NonFiniteError as error:
                name = f"the input of {matrix.name} in calibration window {position}"
                raise cq.NonFiniteError(name, error.count, error.index, error.value) from None

        return hook

    trunk = model.get_submodule(plan.architecture.embedding.rpartition(".")[0])
    windows = check_tokens(tokens)
    with ExitStack() as hooks:
        for matrix in plan.online:
            handle = model.get_submodule(matrix.name).register_forward_pre_hook(watch(matrix))
            hooks.callback(handle.remove)
        for position, window in enumerate(windows):
            trunk(input_ids=torch.from_numpy(window)[None], use_cache=False)
            progress(position + 1, len(windows))
    return statistics
