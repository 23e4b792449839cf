"""Norms whose gains and biases are folded into the layers that read them, and their substitutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import RESIDUAL, MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["FoldedNorm", "folded_norm", "restructure", "settle_norms"]

Array = npt.NDArray[Any]


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
