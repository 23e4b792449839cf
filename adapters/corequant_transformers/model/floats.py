"""Numbers of a quantized model that are no codes: float32, whatever they were cast to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from corequant.errors import CheckpointError, OutputError
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["array_of", "as_float32", "check_writable"]


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers in float32, the one dtype of what isn't quantized.

    Raises
    ------
    TypeError
        If they are none, or float32 doesn't have them.
    """
    if tensor.dtype == torch.float32:
        return tensor
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point():
        raise TypeError(f"must be of float32, got {kind}")
    wide = tensor.to(torch.float32)
    same = wide.to(tensor.dtype)
    if not bool(((same == tensor) | (tensor != tensor)).all()):
        raise TypeError(f"must be of float32, got {kind} with numbers that float32 doesn't have")
    return wide


def check_writable(tensors: dict[str, torch.Tensor], plan: ModelPlan) -> None:
    """Raise OutputError for tensors of a quantized model that would not load.

    Parameters
    ----------
    tensors : dict of str to torch.Tensor
        By the names that they are stored under.
    plan : ModelPlan
    """
    shapes = {f"{m.name}.weight": m.shape for m in plan.matrices}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise OutputError(f"{name} must be in memory to be written, got one without data")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OutputError(
                f"{name} holds NaN or infinity, as after a cast to float16 that can't hold it; "
                "nothing was written. Save the model as quantize returned it"
            )
        wanted = shapes.get(name, tuple(tensor.shape))
        if tuple(tensor.shape) != wanted:
            raise OutputError(
                f"{name} must have the shape {wanted} that was quantized, got {tuple(tensor.shape)}"
            )


def array_of(name: str, tensor: torch.Tensor, where: Path | str) -> Any:
    """Return a tensor of codes or scales as an array.

    Raises
    ------
    CheckpointError
        If NumPy has no such dtype; ``where`` says where it is from.
    """
    try:
        return tensor.numpy()
    except TypeError:
        # Such as bfloat16: none of those is one of codes or scales.
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} of {where} can't be of {kind}") from None
