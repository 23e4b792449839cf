"""Whether the matrices of a plan changed as they should have when it was carried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from corequant.errors import VerificationError
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import (
    Choices,
    OnlineRotation,
    transform_matrix,
    transform_model,
)

__all__ = [
    "ADVICE",
    "acts",
    "check_changed",
    "check_moved",
    "check_online",
    "fingerprint",
    "fingerprints",
    "stays",
    "transform_checked",
]

ADVICE = (
    "; nothing was written. Compare the description of the architecture "
    "(corequant_transformers.register) with the code that this model runs: a module of another "
    "class, or something between its layers that the description leaves out, would explain it. "
    "Otherwise please report it with the model's config and the recipe"
)


def check_changed(before: dict[str, float], model: Any, plan: ModelPlan, choices: Choices) -> int:
    """Return how many of a plan's matrices were to be transformed; one that wasn't is an error.

    Parameters
    ----------
    before : dict of str to float
        Fingerprints of the matrices before they were transformed.
    model : transformers.PreTrainedModel
    plan : ModelPlan
    choices : Choices
    """
    planned = [m for m in plan.matrices if acts(m, plan, choices)]
    weights = {m.name: model.get_submodule(m.name).weight for m in planned}
    stayed = [m.name for m in planned if stays(weights[m.name], before[m.name], m, choices)]
    check_moved(stayed, len(planned))
    for matrix in plan.online:
        check_online(model.get_submodule(matrix.name), matrix)
    return len(planned)


def check_moved(stayed: Sequence[str], count: int) -> None:
    """Raise VerificationError for matrices, of so many, that should have changed and didn't."""
    if stayed:
        raise VerificationError(
            f"{len(stayed)} of {count} matrices that should have been transformed did not "
            f"change, the first is {stayed[0]}{ADVICE}"
        )


def check_online(module: torch.nn.Module, matrix: MatrixPlan) -> None:
    """Raise VerificationError unless a layer rotates its input at run time as its row says."""
    hooks = module._forward_pre_hooks.values()
    sizes = [h.block_size for h in hooks if isinstance(h, OnlineRotation)]
    if sizes != [matrix.input.rotation]:
        raise VerificationError(
            f"{matrix.name} must rotate its input by blocks of {matrix.input.rotation} once, "
            f"got rotations {sizes}: hooks that rotate must be added by transforming the model "
            "alone, once; transform a fresh copy of the float model"
        )


def transform_checked(model: Any, plan: ModelPlan, choices: Choices) -> int:
    """Transform the matrices of a plan in place and return how many changed.

    Raises
    ------
    VerificationError
        If a matrix that should change doesn't, or a run-time rotation is missing.
    """
    before = fingerprints(model, plan)
    transform_model(model, plan, choices)
    return check_changed(before, model, plan, choices)


def acts(matrix: MatrixPlan, plan: ModelPlan, choices: Choices) -> bool:
    """Return whether carrying out a row has to change its matrix."""
    if plan.folds_norm(matrix):
        return True
    for side in (matrix.input, *(rows.output for rows in matrix.row_slices)):
        order = choices.permutations.get(side.permutation or "")
        factors = choices.factors.get(side.factors or "")
        moved = order is not None and bool((order != np.arange(len(order))).any())
        scaled = factors is not None and bool((factors != 1).any())
        if side.centered or side.rotation is not None or moved or scaled:
            return True
    return False


def stays(weight: torch.Tensor, before: float, matrix: MatrixPlan, choices: Choices) -> bool:
    """Return whether a matrix is as it was, although its transform isn't one that gives it back.

    Parameters
    ----------
    weight : torch.Tensor
        After its transform.
    before : float
        Fingerprint before it.
    matrix : MatrixPlan
    choices : Choices
    """
    if fingerprint(weight) != before:
        return False
    W = to_host(weight)
    # A matrix of zeros, for one, is right.
    return not np.array_equal(transform_matrix(W, None, matrix, None, choices)[0], W)


def fingerprints(model: Any, plan: ModelPlan) -> dict[str, float]:
    """Return a weighted sum of each matrix of a plan."""
    return {m.name: fingerprint(model.get_submodule(m.name).weight) for m in plan.matrices}


def fingerprint(weight: torch.Tensor) -> float:
    """Return a weighted sum of a matrix."""
    # Weights 1..1009 in row order, so that moving entries about shows, not only changing them.
    weights = torch.arange(1.0, 1010.0, dtype=torch.float64).repeat(64)
    flat, total = weight.detach().reshape(-1), 0.0
    for start in range(0, flat.numel(), len(weights)):
        part = flat[start : start + len(weights)].double()
        total += float(part @ weights[: len(part)].to(part.device))
    return total
