"""A quantized model as stored tensors (codes, scales and floats), and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from corequant.errors import CheckpointError, OutputError
from corequant.quantization import QuantizedTensor
from corequant.specs import ScaleFormat
from corequant.storage.arrays import from_arrays
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import (
    Part,
    codes_of_embedding,
    part_of,
    part_plan,
    tie,
)
from corequant_transformers.model.quantized_embedding import QuantizedEmbedding
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.source_files import read_generation
from corequant_transformers.model.sources import Source
from corequant_transformers.model.streamed_experts import rest_of
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.rounding.layers import as_stored
from corequant_transformers.transforms.matrices import restructure

__all__ = [
    "assemble",
    "check_writable",
    "layer_tensors",
    "model_tensors",
    "part_tensors",
    "place_tensors",
]


def assemble(model: Any, plan: ModelPlan, tensors: dict[str, torch.Tensor], origin: Any) -> Any:
    """Return a quantized model made of a skeleton.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Skeleton in Transformers' layout, changed in place.
    plan : ModelPlan
    tensors : dict of str to torch.Tensor
        Tensors of all parts; emptied on the way.
    origin : Source or transformers.PreTrainedModel
        Float model, whose generation config the result gets.
    """
    standardize(model, plan)
    restructure(model, plan)
    model = place_tensors(model, plan, tensors, "the result")
    if isinstance(origin, Source):
        found = None if origin.is_gguf else read_generation(origin.path)
    else:
        found = copy.deepcopy(getattr(origin, "generation_config", None))
    if found is not None:
        model.generation_config = found
    return model


def place_tensors(
    model: Any, plan: ModelPlan, tensors: dict[str, torch.Tensor], where: Path | str
) -> Any:
    """Set a model's codes, scales and float matrices in place.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Standardized and restructured; its own parameters may be on the meta device.
    plan : ModelPlan
    tensors : dict of str to torch.Tensor
        Tensors of all parts; emptied on the way.
    where : Path or str
        Origin of the tensors, for error messages.

    Raises
    ------
    CheckpointError
        If they are not what the plan leads to expect.
    """
    expected = {k: v for k, v in model.state_dict().items() if not _belongs(k, plan)}
    if plan.tied:
        expected.pop(f"{plan.architecture.head}.weight", None)
    shared = _shared(model, plan)
    for name in shared:
        expected.pop(name, None)
    for matrix in plan.kept:
        prefix = f"{matrix.name}.weight_"
        stored = {k: t for k, t in tensors.items() if k.startswith(prefix)}
        own = {k: array_of(k, t, where, matrix) for k, t in stored.items()}
        quantized = from_arrays(matrix.name, own, matrix.weights, matrix.shape)
        _place(model, matrix, quantized, tensors, where)
        for key in own:
            del tensors[key]
    head = plan.matrices[-1]
    if plan.tied and head.quantized:
        _place(model, head, codes_of_embedding(model, plan), tensors, where)
    _check_same(where, expected, tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    if plan.tied:
        tie(model, plan)
    if shared:
        model.tie_weights()
    model.save_pretrained = refuse_to_save
    return model.eval().requires_grad_(False)


def _place(
    model: Any,
    matrix: MatrixPlan,
    quantized: QuantizedTensor,
    tensors: dict[str, torch.Tensor],
    where: Path | str,
) -> None:
    """Put a quantized layer or embedding in its place, with its bias, which is taken out."""
    module = model.get_submodule(matrix.name)
    if matrix.role == "embedding":
        model.set_submodule(matrix.name, QuantizedEmbedding(quantized, module, matrix.name))
        return
    bias = tensors.pop(f"{matrix.name}.bias", None)
    layer = QuantizedLinear.of(matrix, quantized, bias)
    had_bias = module.bias is not None
    if had_bias != (bias is not None):
        rule, got = ("must hold", "without it") if had_bias else ("must not hold", "with it")
        raise CheckpointError(f"{where} {rule} {matrix.name}.bias as its config says, got {got}")
    if bias is not None:
        found = {"bias": bias}
        _check_same(f"{matrix.name} in {where}", {"bias": layer.weight[:, 0]}, found)
        layer.bias = found["bias"]
    model.set_submodule(matrix.name, layer)


def refuse_to_save(*given: Any, **options: Any) -> None:
    """Stand in for ``save_pretrained``, which would write the layers that it knows, and no other.

    Raises
    ------
    OutputError
        Always.
    """
    raise OutputError(
        "save_pretrained would lose the quantized layers; write what quantize returned with its "
        "method save, or export the directory with corequant_transformers.export"
    )


def _belongs(key: str, plan: ModelPlan) -> bool:
    return any(key.startswith(f"{m.name}.") for m in plan.quantized)


def part_tensors(
    model: Any, plan: ModelPlan, part: Part, *, whole: bool = True
) -> dict[str, torch.Tensor]:
    """Return what is stored of an open part of a quantized model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : ModelPlan
        The whole model's.
    part : Part
    whole : bool
        Whether its experts are open; otherwise they are left out.
    """
    rows = part_plan(plan, part)
    tensors = model_tensors(model, rows if whole else rest_of(rows))
    found = {k: v for k, v in tensors.items() if part_of(k, plan) == part}
    return found if whole else {k: v for k, v in found.items() if not v.is_meta}


def layer_tensors(model: Any, plan: ModelPlan) -> dict[str, torch.Tensor]:
    """Return what is stored of the layers of a plan alone."""
    _check_layers(model, plan)
    state: dict[str, torch.Tensor] = {}
    for matrix in plan.matrices:
        state |= model.get_submodule(matrix.name).state_dict(prefix=f"{matrix.name}.")
    return _all_stored(state, plan)


def model_tensors(model: Any, plan: ModelPlan) -> dict[str, torch.Tensor]:
    """Return what is stored of a quantized model."""
    _check_layers(model, plan)
    state = model.state_dict()
    if plan.tied:
        shared = f"{plan.architecture.head}.weight"
        state = {k: v for k, v in state.items() if not k.startswith(shared)}
    for name in _shared(model, plan):
        state.pop(name, None)
    return _all_stored(state, plan)


def _check_layers(model: Any, plan: ModelPlan) -> None:
    for matrix in plan.quantized:
        layer = model.get_submodule(matrix.name)
        wanted = QuantizedEmbedding if matrix.role == "embedding" else QuantizedLinear
        if not isinstance(layer, wanted):
            got, kind = type(layer).__name__, wanted.__name__
            raise OutputError(f"{matrix.name} must still be a {kind}, got {got}")


def _all_stored(state: dict[str, torch.Tensor], plan: ModelPlan) -> dict[str, torch.Tensor]:
    codes = tuple(f"{m.name}.weight_" for m in plan.quantized)
    narrow = {f"{m.name}.weight_scale" for m in plan.quantized if _has_bfloat16_scales(m)}
    state = state | {k: _narrowed(k, state[k]) for k in narrow & set(state)}
    dtype = plan.recipe.dtype
    return {k: v if k.startswith(codes) else _stored(k, v, dtype) for k, v in state.items()}


def _shared(model: Any, plan: ModelPlan) -> list[str]:
    """Return the parameters outside of an enclosed model's blocks that another one's matrix is."""
    if not plan.architecture.enclosed:
        return []
    return list(getattr(model, "all_tied_weights_keys", None) or {})


def _has_bfloat16_scales(matrix: MatrixPlan) -> bool:
    return matrix.weights.scale_format is ScaleFormat.BFLOAT16


def _narrowed(name: str, scales: torch.Tensor) -> torch.Tensor:
    """Return scales, which NumPy holds in float32, in bfloat16."""
    stored = scales.to(torch.bfloat16)
    if not scales.is_meta and not torch.equal(stored.float(), scales.float()):
        raise OutputError(f"{name} must hold bfloat16 values; nothing was written")
    return stored


def _stored(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    # Parts of a skeleton that are not open have no numbers.
    there = tensor.detach().contiguous()
    if there.is_meta:
        return there
    try:
        # A model may have been cast after it was quantized.
        return as_stored(as_float32(there.cpu()), dtype)
    except TypeError as error:
        raise OutputError(
            f"{name} {error}; nothing was written. Save the model as quantize returned it"
        ) from None


def _check_same(
    where: Path | str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    for name in sorted(set(expected) ^ set(found)):
        what = "lacks the tensor" if name in expected else "has an unexpected tensor"
        raise CheckpointError(f"{where} {what} {name}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} of {where} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(found[name].shape)}"
            )
        try:
            found[name] = as_float32(found[name])
        except TypeError as error:
            raise CheckpointError(f"{name} of {where} {error}") from None
        if not bool(found[name].isfinite().all()):
            raise CheckpointError(f"{name} of {where} holds NaN or infinity")


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers in float32, in which models compute what isn't quantized.

    Raises
    ------
    TypeError
        If they are not floating-point, or not representable in float32.
    """
    if tensor.dtype == torch.float32:
        return tensor
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point():
        raise TypeError(f"must be float32, got {kind}")
    wide = tensor.to(torch.float32)
    same = wide.to(tensor.dtype)
    if not bool(((same == tensor) | (tensor != tensor)).all()):
        raise TypeError(f"must be float32, got {kind} with numbers that float32 can't represent")
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


def array_of(name: str, tensor: torch.Tensor, where: Path | str, matrix: MatrixPlan) -> Any:
    """Return a tensor of a matrix's codes or scales as an array, scales in bfloat16 as float32.

    Raises
    ------
    CheckpointError
        If NumPy has no such dtype; ``where`` says where it is from.
    """
    if tensor.dtype == torch.bfloat16 and _has_bfloat16_scales(matrix):
        return tensor.float().numpy()
    try:
        return tensor.numpy()
    except TypeError:
        # Such as bfloat16, which codes never have.
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} of {where} must have a dtype that NumPy has, got {kind}"
        ) from None
