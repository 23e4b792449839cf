"""What isn't quantized, rounded to the dtype that it is stored in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from corequant.errors import RecipeError, VerificationError
from corequant.storage.arrays import to_arrays
from corequant_transformers.model.parts import Part, part_of
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["as_stored", "check_tied", "round_unquantized"]


def round_unquantized(
    model: Any, plan: ModelPlan, part: Part, only: Collection[str] | None = None
) -> None:
    """Round what isn't quantized of an open part to the plan's dtype, in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the part open, transformed and verified. Its tensors keep their dtype, so that it
        computes as before, with numbers that the plan's dtype has.
    plan : ModelPlan
        The whole model's.
    part : Part
    only : collection of str, optional
        Names of the tensors that are rounded; by default all that aren't quantized.

    Raises
    ------
    RecipeError
        If a number is beyond the dtype's range.
    """
    wanted = getattr(torch, plan.recipe.dtype)
    if wanted == torch.float32:
        return
    codes = {f"{m.name}.weight" for m in plan.quantized}
    for name, tensor in model.state_dict().items():
        if name in codes or part_of(name, plan) != part or not tensor.is_floating_point():
            continue
        if only is not None and name not in only:
            continue
        rounded = tensor.float().to(wanted)
        if not bool(rounded.isfinite().all()):
            raise RecipeError(
                f"dtype must have the numbers of {name}, got {plan.recipe.dtype}, whose largest is "
                f"{torch.finfo(wanted).max:.6g}; take bfloat16"
            )
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._buffers:
            module._buffers[key] = rounded.to(tensor.dtype)
        else:
            value = rounded.to(tensor.dtype)
            module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)


def check_tied(model: Any, plan: ModelPlan, entry: Mapping[str, torch.Tensor]) -> None:
    """Raise VerificationError unless a head that stays tied became what the embedding became.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the exit open, transformed and rounded.
    plan : ModelPlan
    entry : mapping of str to torch.Tensor
        What is kept of the entry.
    """
    if not plan.tied:
        return
    a = plan.architecture
    head = model.get_submodule(a.head)
    found = {f"{a.embedding}.weight": head.weight}
    if isinstance(head, QuantizedLinear):
        arrays = to_arrays(a.embedding, head.quantized)
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if not all(torch.equal(entry[name].to(t.device, t.dtype), t) for name, t in found.items()):
        raise VerificationError(
            f"the transformed {a.head} must be {a.embedding} to stay tied, got another matrix; "
            "nothing was written. Please report it with the model's config and the recipe"
        )


def as_stored(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a float32 tensor in the dtype that it is stored in, if that has its numbers.

    Parameters
    ----------
    tensor : torch.Tensor
    dtype : str
        The plan's. Numbers that were changed since the model was quantized stay as they are.

    Examples
    --------
    >>> import torch
    >>> from corequant_transformers.rounding.unquantized import as_stored
    >>> [as_stored(torch.tensor([x]), "bfloat16").dtype for x in (1.5, 1 / 3)]
    [torch.bfloat16, torch.float32]
    """
    rounded = tensor.to(getattr(torch, dtype))
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor
