"""Carry out a plan's rows: fold, permute and rotate, by the functions of ``corequant.merging``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant.recipe import Recipe
from corequant_transformers.planning import MatrixPlan, ModelPlan, Side

__all__ = ["OnlineRotation", "choose_permutation", "transform_matrix", "transform_model", "untie"]

Array = npt.NDArray[Any]
Permutations = Mapping[str, npt.NDArray[np.int64]]
Signs = Mapping[str, npt.NDArray[np.int8]]


class OnlineRotation:
    """A forward pre-hook that rotates a layer's input by blocks at run time."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Rotate the first argument."""
        return (cq.block_hadamard(args[0], self.block_size), *args[1:])


def choose_permutation(
    recipe: Recipe, statistics: cq.ActivationStats, block_size: int, index: int
) -> npt.NDArray[np.int64]:
    """Return the permutation that the recipe asks for, of region ``index``."""
    match recipe.permutation:
        case "massdiff":
            return cq.massdiff(statistics.mean_abs, block_size)
        case "zigzag":
            return cq.zigzag(statistics.absmax, block_size)
        case "absmax":
            return cq.absmax(statistics.absmax, block_size)
        case "random":
            generator = np.random.default_rng([recipe.seed, index])
            return cq.random_permutation(statistics.d, generator)
    return cq.identity_permutation(statistics.d)


def transform_matrix(
    W: Array,
    bias: Array | None,
    matrix: MatrixPlan,
    gain: Array | None,
    permutations: Permutations,
    signs: Signs,
) -> tuple[Array, Array | None]:
    """Return a matrix and its bias after everything that the row says.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
    bias : numpy.ndarray (out_features,), optional
    matrix : MatrixPlan
    gain : numpy.ndarray (in_features,), optional
        Of the norm that the row folds.
    permutations : mapping of str to numpy.ndarray
        By region.
    signs : mapping of str to numpy.ndarray
        By name.
    """
    if gain is not None:
        W = cq.fold_norm(W, gain)
    W = _transform_side(W, matrix.input, "input", permutations, signs)
    W = _transform_side(W, matrix.output, "output", permutations, signs)
    if bias is not None:
        bias = _transform_side(bias, matrix.output, "output", permutations, signs)
    return W, bias


def _transform_side(
    W: Array, side: Side, name: str, permutations: Permutations, signs: Signs
) -> Array:
    if side.permutation is not None:
        W = cq.merge_permutation(W, permutations[side.permutation], side=name)
    if side.rotation is not None:
        drawn = None if side.signs is None else signs[side.signs]
        W = cq.merge_rotation(W, side.rotation, side=name, signs=drawn)
    return W


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
    permutations: Permutations,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Transform every matrix of a torch model in place, in its own precision, and hook rotations.

    Embedding and head must not be tied any more.
    """
    signs = plan.draw_signs()
    for done, matrix in enumerate(plan.matrices):
        module = model.get_submodule(matrix.name)
        norm = model.get_submodule(matrix.norm) if matrix.norm is not None else None
        bias = getattr(module, "bias", None)
        W, b = transform_matrix(
            module.weight.detach().numpy(),
            None if bias is None else bias.detach().numpy(),
            matrix,
            None if norm is None else norm.weight.detach().numpy(),
            permutations,
            signs,
        )
        module.weight = torch.nn.Parameter(torch.from_numpy(W), requires_grad=False)
        if b is not None:
            module.bias = torch.nn.Parameter(torch.from_numpy(b), requires_grad=False)
        if matrix.online and matrix.input.rotation is not None:
            module.register_forward_pre_hook(OnlineRotation(matrix.input.rotation))
        progress(done + 1, len(plan.matrices))
    for name in plan.norms:
        torch.nn.init.ones_(model.get_submodule(name).weight)
