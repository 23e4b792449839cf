"""Carry out a plan's rows by ``corequant.merging``: fold norms, permute and rotate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError
from corequant.merging import (
    fold_norm,
    fold_norm_bias,
    merge_centering,
    merge_factors,
    merge_permutation,
    merge_rotation,
)
from corequant.permutation import invert_permutation, repeat_permutation
from corequant.rotation import block_hadamard
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import RESIDUAL, MatrixPlan, Side
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "Choices",
    "FoldedNorm",
    "OnlineRotation",
    "folded_norm",
    "hook_rotation",
    "restore",
    "restructure",
    "settle_norms",
    "transform_matrix",
    "transform_model",
    "transform_module",
    "transform_side",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Choices:
    """Permutations and factors that were chosen or drawn, by the names that a plan's sides give.

    Attributes
    ----------
    permutations : mapping of str to numpy.ndarray (channels,), int64
    factors : mapping of str to numpy.ndarray (channels,), float64
    unmoved : frozenset of str
        The permutations that are the identity because nothing better was found.
    """

    permutations: Mapping[str, npt.NDArray[np.int64]]
    factors: Mapping[str, npt.NDArray[np.float64]]
    unmoved: frozenset[str] = frozenset()


class OnlineRotation:
    """A forward pre-hook that rotates a layer's input by blocks at run time."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Rotate the first argument."""
        return (block_hadamard(args[0], self.block_size), *args[1:])


def transform_matrix(
    W: Array, bias: Array | None, matrix: MatrixPlan, norm: FoldedNorm | None, choices: Choices
) -> tuple[Array, Array | None]:
    """Return a matrix and its bias, transformed as the row says.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
    bias : numpy.ndarray (out_features,), optional
    matrix : MatrixPlan
    norm : FoldedNorm, optional
        The norm that the row folds; with a shift it gives the layer a bias.
    choices : Choices
    """
    if norm is not None and matrix.role == "embedding":
        W = norm.of_rows(W).astype(W.dtype)
    elif norm is not None:
        if norm.shift is not None:
            bias = fold_norm_bias(W, bias, norm.shift.astype(W.dtype))
        if norm.gain is not None:
            W = fold_norm(W, norm.gain.astype(W.dtype))
    W = transform_side(W, matrix.input, "input", choices)
    W = _transform_outputs(W, matrix, choices)
    if bias is not None:
        bias = _transform_outputs(bias, matrix, choices)
    return W, bias


def _transform_outputs(W: Array, matrix: MatrixPlan, choices: Choices) -> Array:
    if len(matrix.row_slices) == 1:
        return transform_side(W, matrix.row_slices[0].output, "output", choices)
    result = np.empty_like(W)
    for part, rows in zip(matrix.row_slices, matrix.sliced_rows(), strict=True):
        result[rows] = transform_side(W[rows], part.output, "output", choices)
    return result


def transform_side(W: Array, side: Side, name: str, choices: Choices) -> Array:
    """Transform the channels on one side of a matrix, or of a bias on its output side."""
    if side.centered:
        W = merge_centering(W, side=name)
    if side.permutation is not None:
        p = repeat_permutation(choices.permutations[side.permutation], side.heads, side.repeat)
        W = merge_permutation(W, p, side=name)
    if side.factors is not None:
        W = merge_factors(W, choices.factors[side.factors], side=name)
    if side.rotation is not None:
        W = merge_rotation(W, side.rotation, side=name)
    return W


def restore(x: torch.Tensor, side: Side, choices: Choices) -> torch.Tensor:
    """Undo on an activation (..., channels) what happened to its channels."""
    if side.rotation is not None:
        x = block_hadamard(x, side.rotation, inverse=True)
    if side.factors is not None:
        x = x / torch.from_numpy(choices.factors[side.factors]).to(x.device)
    if side.permutation is not None:
        order = invert_permutation(choices.permutations[side.permutation])
        x = x[..., torch.from_numpy(order).to(x.device)]
    return x


def transform_model(
    model: Any,
    plan: ModelPlan,
    choices: Choices,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Transform every matrix of a torch model in place, in its own precision, and hook rotations.

    Embedding and head must not be tied any more, and the model must be in the layout of
    ``layouts.standardize``.
    """
    for done, matrix in enumerate(plan.matrices):
        module = model.get_submodule(matrix.name)
        transform_module(module, matrix, folded_norm(model, matrix, plan), choices)
        hook_rotation(module, matrix)
        progress(done + 1, len(plan.matrices))
    settle_norms(model, plan, choices.permutations)


def transform_module(
    module: Any, matrix: MatrixPlan, norm: FoldedNorm | None, choices: Choices
) -> None:
    """Transform a layer's weight and bias in place; arguments are those of ``transform_matrix``."""
    W, b = transform_matrix(to_host(module.weight), _numpy(module, "bias"), matrix, norm, choices)
    device = module.weight.device
    module.weight = torch.nn.Parameter(torch.from_numpy(W).to(device), requires_grad=False)
    if b is not None:
        module.bias = torch.nn.Parameter(torch.from_numpy(b).to(device), requires_grad=False)


def hook_rotation(module: torch.nn.Module, matrix: MatrixPlan) -> None:
    """Have a layer rotate its input if its row says that it does so at run time."""
    if matrix.online and matrix.input.rotation is not None:
        module.register_forward_pre_hook(OnlineRotation(matrix.input.rotation))


def _numpy(module: torch.nn.Module, name: str) -> Array | None:
    tensor = getattr(module, name, None)
    return None if tensor is None else to_host(tensor)


# ---- norms whose gains and biases are folded into the layers that read them


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """Gain and shift of a norm.

    Attributes
    ----------
    gain, shift : numpy.ndarray (channels,), optional
    eps : float
        Added to the mean square.
    subtracts_mean : bool
        This and ``eps`` are known of a norm of the embedding only.
    """

    gain: Array | None
    shift: Array | None
    eps: float = 0.0
    subtracts_mean: bool = False

    def of_rows(self, W: Array) -> Array:
        """Apply the norm to each row, in float64 or in the dtype of W."""
        if self.subtracts_mean:
            W = W - W.mean(-1, keepdims=True)
        W = W / np.sqrt(np.square(W).mean(-1, keepdims=True) + self.eps)
        W = W if self.gain is None else W * self.gain
        return W if self.shift is None else W + self.shift


def folded_norm(model: Any, matrix: MatrixPlan, plan: ModelPlan) -> FoldedNorm | None:
    """Return the norm that a row folds, in float64; None if it folds none.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not transformed yet there.
    matrix : MatrixPlan
    plan : ModelPlan
    """
    if matrix.norm is None or not plan.folds_norm(matrix):
        return None
    norm, a = model.get_submodule(matrix.norm), plan.architecture
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    gain = None if weight is None else to_host(weight).astype(np.float64)
    if gain is not None and a.gain_offset:
        gain = gain + a.gain_offset
    shift = None if bias is None else to_host(bias).astype(np.float64)
    if matrix.role != "embedding":
        return FoldedNorm(gain, shift)
    return FoldedNorm(gain, shift, _eps(norm, matrix.norm, plan), a.subtracts_mean)


def _eps(norm: Any, name: str, plan: ModelPlan) -> float:
    a = plan.architecture
    found = getattr(norm, "eps", getattr(norm, "variance_epsilon", a.norm_eps))
    if not isinstance(found, float):
        raise ArchitectureError(
            f"{name} must have its epsilon as eps or variance_epsilon, got "
            f"{type(norm).__name__} with neither; give norm_eps in the description of "
            f"{a.model_type!r}"
        )
    return found


def settle_norms(model: Any, plan: ModelPlan, permutations: Any) -> None:
    """Make norms neutral whose gains are folded, or let them follow the stream, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : ModelPlan
    permutations : mapping of str to numpy.ndarray (channels,), int64
    """
    restructure(model, plan)
    neutral = 1.0 - plan.architecture.gain_offset
    own = [m.norm for m in plan.matrices if m.norm and m.own_norm and m.role != "embedding"]
    for name in (*own, *(plan.norms if plan.folds else ())):
        norm = model.get_submodule(name)
        if getattr(norm, "weight", None) is not None:
            # The memory may be that of the model that was given.
            ones = 1.0 if isinstance(norm, torch.nn.RMSNorm) else neutral
            gain = torch.full_like(norm.weight, ones)
            norm.weight = torch.nn.Parameter(gain, requires_grad=False)
    if not plan.folds and RESIDUAL in permutations:
        order = torch.from_numpy(permutations[RESIDUAL])
        for name in plan.norms:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.data = parameter.data[order.to(parameter.device)]


def restructure(model: Any, plan: ModelPlan) -> None:
    """Add the modules that transformed weights need to a standardized model, in place.

    Where LayerNorms are folded, RMSNorms take their place, and the layers that read them get a
    bias if they have one. A norm of the embedding is computed in its rows. Weights and biases that
    are there stay as they are.
    """
    for matrix in plan.matrices:
        if matrix.role == "embedding" and matrix.norm is not None:
            model.set_submodule(matrix.norm, torch.nn.Identity())
    if not plan.folds or not plan.architecture.subtracts_mean:
        return
    biased = set()
    for name in plan.norms:
        norm = model.get_submodule(name)
        if isinstance(norm, torch.nn.RMSNorm):
            continue
        if getattr(norm, "bias", None) is not None:
            biased.add(name)
        model.set_submodule(name, _rms_norm(norm, name, plan))
    for matrix in plan.matrices:
        module = model.get_submodule(matrix.name)
        if matrix.norm in biased and module.bias is None:
            zeros = module.weight.new_zeros(matrix.shape[0])
            module.bias = torch.nn.Parameter(zeros, requires_grad=False)


def _rms_norm(norm: Any, name: str, plan: ModelPlan) -> torch.nn.RMSNorm:
    weight, width, eps = (
        getattr(norm, "weight", None),
        plan.dimensions.hidden,
        _eps(norm, name, plan),
    )
    if weight is None:
        return torch.nn.RMSNorm(width, eps, elementwise_affine=False)
    made = torch.nn.RMSNorm(width, eps, dtype=weight.dtype, device=weight.device)
    return made.requires_grad_(False)
