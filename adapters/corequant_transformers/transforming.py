"""Carry out a plan's rows: fold, permute and rotate, by the functions of ``corequant.merging``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant_transformers.planning import ModelPlan
from corequant_transformers.rows import RESIDUAL, MatrixPlan, Side

__all__ = ["Choices", "OnlineRotation", "restore", "transform_matrix", "transform_model", "untie"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Choices:
    """What calibration chose and chance drew, by the names that a plan's sides give.

    Attributes
    ----------
    permutations : mapping of str to numpy.ndarray (channels,), int64
    factors : mapping of str to numpy.ndarray (channels,), float64
    """

    permutations: Mapping[str, npt.NDArray[np.int64]]
    factors: Mapping[str, npt.NDArray[np.float64]]


class OnlineRotation:
    """A forward pre-hook that rotates a layer's input by blocks at run time."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Rotate the first argument."""
        return (cq.block_hadamard(args[0], self.block_size), *args[1:])


def transform_matrix(
    W: Array,
    bias: Array | None,
    matrix: MatrixPlan,
    gain: Array | None,
    choices: Choices,
) -> tuple[Array, Array | None]:
    """Return a matrix and its bias after everything that the row says.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
    bias : numpy.ndarray (out_features,), optional
    matrix : MatrixPlan
    gain : numpy.ndarray (in_features,), optional
        Of the norm that the row folds.
    choices : Choices
    """
    if gain is not None:
        W = cq.fold_norm(W, gain)
    W = _transform_side(W, matrix.input, "input", choices)
    W = _transform_side(W, matrix.output, "output", choices)
    if bias is not None:
        bias = _transform_side(bias, matrix.output, "output", choices)
    return W, bias


def _transform_side(W: Array, side: Side, name: str, choices: Choices) -> Array:
    if side.permutation is not None:
        p = cq.repeat_permutation(choices.permutations[side.permutation], side.heads, side.repeat)
        W = cq.merge_permutation(W, p, side=name)
    if side.factors is not None:
        W = cq.merge_factors(W, choices.factors[side.factors], side=name)
    if side.rotation is not None:
        W = cq.merge_rotation(W, side.rotation, side=name)
    return W


def restore(x: torch.Tensor, side: Side, choices: Choices) -> torch.Tensor:
    """Undo on an activation (..., channels) what happened to its channels."""
    if side.rotation is not None:
        x = cq.block_hadamard(x, side.rotation, inverse=True)
    if side.factors is not None:
        x = x / torch.from_numpy(choices.factors[side.factors])
    if side.permutation is not None:
        x = x[..., torch.from_numpy(cq.invert_permutation(choices.permutations[side.permutation]))]
    return x


def untie(model: Any, plan: ModelPlan) -> None:
    """Give the head a matrix of its own if it shares the embedding's."""
    embedding = model.get_submodule(plan.architecture.embedding)
    head = model.get_submodule(plan.architecture.head)
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def transform_model(
    model: Any,
    plan: ModelPlan,
    choices: Choices,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Transform every matrix of a torch model in place, in its own precision, and hook rotations.

    Embedding and head must not be tied any more.
    """
    for done, matrix in enumerate(plan.matrices):
        module = model.get_submodule(matrix.name)
        folds = plan.folds and matrix.norm is not None
        norm = model.get_submodule(matrix.norm) if folds else None
        bias = getattr(module, "bias", None)
        W, b = transform_matrix(
            module.weight.detach().numpy(),
            None if bias is None else bias.detach().numpy(),
            matrix,
            None if norm is None else norm.weight.detach().numpy(),
            choices,
        )
        module.weight = torch.nn.Parameter(torch.from_numpy(W), requires_grad=False)
        if b is not None:
            module.bias = torch.nn.Parameter(torch.from_numpy(b), requires_grad=False)
        if matrix.online and matrix.input.rotation is not None:
            module.register_forward_pre_hook(OnlineRotation(matrix.input.rotation))
        progress(done + 1, len(plan.matrices))
    for name in plan.norms:
        norm = model.get_submodule(name)
        if plan.folds:
            torch.nn.init.ones_(norm.weight)
        elif RESIDUAL in choices.permutations:
            order = torch.from_numpy(choices.permutations[RESIDUAL])
            for parameter in norm.parameters(recurse=False):
                parameter.data = parameter.data[order]
