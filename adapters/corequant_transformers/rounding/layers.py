"""A part of a model, rounded: layers to nearest or for what they read, the rest to its dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import RecipeError, VerificationError
from corequant.quantization import QuantizedTensor, choose_global_scale, dequantize, quantize
from corequant.rounding import (
    InputMoments,
    RoundedTensor,
    RoundingOptions,
    round_together,
)
from corequant.specs import Granularity, QuantSpec, ScaleSearch
from corequant.storage.arrays import to_arrays
from corequant_transformers.model.parts import Part, part_of
from corequant_transformers.model.quantized_embedding import QuantizedEmbedding
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.streamed_experts import Layers, StreamedExperts
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "as_stored",
    "check_tied",
    "quantized_layer",
    "round_nearest",
    "round_on_inputs",
    "round_unquantized",
    "round_unquantized_experts",
    "shared_global_scales",
]

_CPU_SEARCHES = (ScaleSearch.EXACT, ScaleSearch.HQO)
"""Searches for scales that only the CPU has."""


def shared_global_scales(
    rows: Iterable[MatrixPlan], weights: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return layers' global scales by their names, of those whose spec has one.

    Kernels multiply by query, key and value, or by gate and up, as by one matrix, and take one
    global scale for all of it: vLLM the largest that a file holds. Layers that read the same input
    therefore share the smallest that one of them needs.

    Parameters
    ----------
    rows : iterable of MatrixPlan
    weights : mapping of str to numpy.ndarray (out_features, in_features)
        By the rows' names.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant.recipe import LayerSettings
    >>> from corequant_transformers.planning.matrix_plan import MatrixPlan
    >>> from corequant_transformers.rounding.layers import shared_global_scales
    >>> nvfp4 = {"reads": "input", "settings": LayerSettings(cq.QuantSpec.parse("nvfp4"))}
    >>> rows = [MatrixPlan(name, (1, 16), **nvfp4) for name in ("query", "key")]
    >>> weights = {n: np.full((1, 16), v, np.float32) for n, v in (("query", 6.0), ("key", 3.0))}
    >>> shared_global_scales(rows, weights)["key"]
    array([448.], dtype=float32)
    """
    rows = [row for row in rows if row.weights.granularity is Granularity.TENSOR_GROUP]
    least: dict[str, npt.NDArray[np.float32]] = {}
    for row in rows:
        own, key = choose_global_scale(weights[row.name], row.weights), row.reads or row.name
        least[key] = np.minimum(own, least.get(key, own))
    return {row.name: least[row.reads or row.name] for row in rows}


def round_nearest(
    model: Any, plan: ModelPlan, executor: Executor | None = None
) -> list[dict[str, Any]]:
    """Round a transformed part's matrices to nearest, in place, and return rows for the report.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the part open.
    plan : ModelPlan
        The part's.
    executor : concurrent.futures.Executor, optional
        Rounds its matrices at the same time.
    """
    grouped = [m for m in plan.quantized if m.weights.granularity is Granularity.TENSOR_GROUP]
    shared = shared_global_scales(grouped, {m.name: _weight(model, m) for m in grouped})
    if executor is None:
        # One after the other: each rounded matrix takes the place of its float one at once.
        return [_round_alone(model, m, shared.get(m.name)) for m in plan.quantized]
    weights = {m.name: _weight(model, m) for m in plan.quantized}
    tasks = {
        m.name: partial(quantize, weights[m.name], m.weights, global_scale=shared.get(m.name))
        for m in plan.quantized
    }
    waiting = {name: executor.submit(task) for name, task in tasks.items()}
    found = {name: future.result() for name, future in waiting.items()}
    return [_place(model, m, weights[m.name], found[m.name]) for m in plan.quantized]


def _round_alone(
    model: Any, matrix: MatrixPlan, global_scale: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    W = _weight(model, matrix)
    rounded = quantize(W, matrix.weights, global_scale=global_scale)
    return _place(model, matrix, W, rounded)


def _weight(model: Any, matrix: MatrixPlan) -> Any:
    return to_host(model.get_submodule(matrix.name).weight).astype(np.float32)


def _place(model: Any, matrix: MatrixPlan, W: Any, rounded: QuantizedTensor) -> dict[str, Any]:
    module = model.get_submodule(matrix.name)
    model.set_submodule(matrix.name, quantized_layer(module, matrix, rounded))
    error = _relative_squared_error(W, dequantize(rounded))
    return {"name": matrix.name, "relative_squared_error": error}


def _relative_squared_error(W: Any, rounded: Any) -> float:
    error = total = 0.0
    # In float64, where squares of float32 are finite, and few rows at a time.
    for first in range(0, len(W), 256):
        rows = slice(first, first + 256)
        wide = W[rows].astype(np.float64)
        error += float(np.square(wide - rounded[rows]).sum())
        total += float(np.square(wide).sum())
    return error / max(total, 1e-30)


def quantized_layer(module: Any, matrix: MatrixPlan, rounded: QuantizedTensor) -> Any:
    """Return the quantized replacement of a layer or an embedding, on its device."""
    if matrix.role == "embedding":
        table: Any = QuantizedEmbedding(rounded, module, matrix.name)
        return table.to(module.weight.device)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float()
    layer = QuantizedLinear.of(matrix, rounded, bias)
    return layer.to(module.weight.device)


def round_on_inputs(
    rows: Sequence[MatrixPlan],
    weights: Mapping[str, npt.NDArray[Any]],
    moments: InputMoments,
    divisors: Mapping[str, npt.NDArray[np.float32]],
    executor: Executor | None,
) -> dict[str, RoundedTensor]:
    """Round layers that read the same input for what they read.

    Parameters
    ----------
    rows : sequence of MatrixPlan
    weights : mapping of str to numpy.ndarray (out_features, in_features)
        By the rows' names.
    moments : InputMoments
        Without any token, as for an unused expert, layers are rounded to nearest.
    divisors : mapping of str to numpy.ndarray (1,), float32
        Global scales of the rows that have one.
    executor : concurrent.futures.Executor, optional
        Rounds the layers at the same time, to the same codes.
    """
    # One by one in any case: products of all rows together would be summed in another order, and
    # the codes would depend on the executor. What they could share is little against the work on
    # the widest layer of a block, which shares with none.
    tasks: dict[str, Callable[[], dict[str, RoundedTensor]]] = {}
    found: dict[str, RoundedTensor] = {}
    on_host: list[Any] = []
    for row in rows:
        given = ({row.name: weights[row.name]}, row.weights)
        divisor = divisors.get(row.name)
        if not moments.count:
            found |= _round_idle(*given, divisor, row.options)
            continue
        if not moments.H.is_cpu and row.weights.scale_search not in _CPU_SEARCHES:
            found |= _round_on_device(*given, divisor, row.options, moments)
            continue
        if not on_host:
            on_host += [to_host(moments.H), None if moments.G is None else to_host(moments.G)]
        H, G = on_host
        tasks[row.name] = partial(
            round_together,
            *given,
            row.options,
            H,
            G if row.options.needs_float else None,
            global_scale=divisor,
            tokens=moments.count,
        )
    if executor is None:
        results = [task() for task in tasks.values()]
    else:
        waiting = [executor.submit(task) for task in tasks.values()]
        results = [future.result() for future in waiting]
    for result in results:
        found |= result
    return {row.name: found[row.name] for row in rows}


def _round_idle(
    weights: Mapping[str, npt.NDArray[Any]],
    spec: QuantSpec,
    divisor: npt.NDArray[np.float32] | None,
    options: RoundingOptions,
) -> dict[str, RoundedTensor]:
    """Round an expert that no token visits: to nearest, as far as an accumulator's bounds let it.

    With inputs that have nothing to do with each other, that is what GPTQ does.
    """
    if options.accumulator is None:
        return round_together(weights, spec, RoundingOptions(), global_scale=divisor)
    bounded = RoundingOptions("gptq", accumulator=options.accumulator)
    width = next(iter(weights.values())).shape[1]
    H = np.eye(width, dtype=np.float32)
    return round_together(weights, spec, bounded, H, global_scale=divisor)


def _round_on_device(
    weights: Mapping[str, npt.NDArray[Any]],
    spec: QuantSpec,
    divisor: npt.NDArray[np.float32] | None,
    options: RoundingOptions,
    moments: InputMoments,
) -> dict[str, RoundedTensor]:
    """Round where the moments are; codes and scales come back to the CPU."""
    H, G = moments.H, moments.G if options.needs_float else None
    there = None if divisor is None else torch.from_numpy(divisor).to(H.device)
    result = {}
    for name, W in weights.items():
        given = {name: torch.from_numpy(W).to(H.device)}
        shared: dict[str, Any] = {"global_scale": there, "tokens": moments.count}
        found = round_together(given, spec, options, H, G, **shared)[name]
        arrays = (found.codes, found.scales, found.zero_points, found.global_scale)
        codes, scales, zeros, own = (None if t is None else to_host(t) for t in arrays)
        quantized = QuantizedTensor(codes, scales, zeros, found.spec, own)
        result[name] = RoundedTensor.of(quantized, found.report)
    return result


# ---- what stays in float


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
        # Experts that are read later are rounded then.
        if tensor.is_meta or (only is not None and name not in only):
            continue
        path, _, key = name.rpartition(".")
        module, value = model.get_submodule(path), _rounded(name, tensor, plan.recipe.dtype)
        if key in module._buffers:
            module._buffers[key] = value
        else:
            module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the nearest numbers that a dtype has, in the tensor's own."""
    wanted = getattr(torch, dtype)
    rounded = tensor.detach().float().to(wanted)
    if not bool(rounded.isfinite().all()):
        raise RecipeError(
            f"dtype must hold the values of {name}, got {dtype}, whose largest is "
            f"{torch.finfo(wanted).max:.6g}; use bfloat16"
        )
    return rounded.to(tensor.dtype)


def round_unquantized_experts(experts: StreamedExperts, plan: ModelPlan) -> None:
    """Have what isn't quantized of experts rounded whenever they are opened, as the rest is.

    Parameters
    ----------
    experts : StreamedExperts
        Transformed.
    plan : ModelPlan
        The block's.
    """
    dtype = plan.recipe.dtype
    if dtype == "float32":
        return
    codes = {m.name for m in plan.quantized}

    def round_layers(index: int, layers: Layers) -> None:
        for name, layer in layers.items():
            path = f"{experts.path}.{index}.{name}"
            if path not in codes:
                value = _rounded(f"{path}.weight", layer.weight, dtype)
                layer.weight = torch.nn.Parameter(value, requires_grad=False)
            if layer.bias is not None:
                value = _rounded(f"{path}.bias", layer.bias, dtype)
                layer.bias = torch.nn.Parameter(value, requires_grad=False)

    experts.change(round_layers)


def check_tied(model: Any, plan: ModelPlan, entry: Mapping[str, torch.Tensor]) -> None:
    """Raise VerificationError unless a tied head equals the transformed embedding.

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
    """Return a float32 tensor in its stored dtype, if that represents it exactly.

    Parameters
    ----------
    tensor : torch.Tensor
    dtype : str
        The plan's. Numbers that were changed since the model was quantized stay as they are.

    Examples
    --------
    >>> import torch
    >>> from corequant_transformers.rounding.layers import as_stored
    >>> [as_stored(torch.tensor([x]), "bfloat16").dtype for x in (1.5, 1 / 3)]
    [torch.bfloat16, torch.float32]
    """
    rounded = tensor.to(getattr(torch, dtype))
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor
