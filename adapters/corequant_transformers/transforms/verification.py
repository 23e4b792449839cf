"""Verify that a transformed model computes the float model's function, and that it was transformed.

Everything is compared in float64. What Transformers computes in float32 whatever the model's
precision, such as norms, is lifted to float64 for the comparison; otherwise it would hide a small
error behind its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from corequant.errors import VerificationError
from corequant_transformers.model.forward import check_ids, check_positions, check_tokens
from corequant_transformers.model.replicas import check_given, replicate
from corequant_transformers.model.surroundings import device_of, to_host, undisturbed
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import (
    Choices,
    OnlineRotation,
    restore,
    transform_matrix,
    transform_model,
)

__all__ = [
    "KeepFloat64",
    "Trace",
    "Verification",
    "acts",
    "check_any_changed",
    "check_block_error",
    "check_changed",
    "check_choices",
    "check_logits_error",
    "check_moved",
    "check_online",
    "fingerprint",
    "fingerprints",
    "is_identity",
    "relative_error",
    "stays",
    "stream_error",
    "trace",
    "transform_checked",
    "verify",
]

TOLERANCE = 1e-9

_ADVICE = (
    "; nothing was written. Compare the description of the architecture "
    "(corequant_transformers.register) with the code that this model runs: a module of another "
    "class, or something between its layers that the description leaves out, would explain it. "
    "Otherwise please report it with the model's config and the recipe"
)


@dataclass(frozen=True, eq=False)
class Trace:
    """Output of a float model on some tokens, and the weights that give it.

    Attributes
    ----------
    tokens : numpy.ndarray (windows, length), int64
    logits : torch.Tensor (windows, length, vocabulary), float64
    blocks : list of torch.Tensor (windows, length, hidden), float64
        Output of each decoder block.
    fingerprints : dict of str to float
        A weighted sum of each matrix that the plan changes.
    """

    tokens: npt.NDArray[np.int64]
    logits: torch.Tensor
    blocks: list[torch.Tensor]
    fingerprints: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``; errors are relative to the largest magnitude of the float model's.

    Attributes
    ----------
    logits_error : float
        Largest difference of logits.
    block_errors : tuple of float
        Largest difference of each decoder block's output, rotated and permuted back.
    matrices_changed, rotations_online, permutations : int
        Matrices that changed, layers with a run-time rotation, permutations that move a channel.
    """

    logits_error: float
    block_errors: tuple[float, ...]
    matrices_changed: int
    rotations_online: int
    permutations: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@undisturbed()
def trace(model: Any, plan: ModelPlan, tokens: npt.NDArray[np.int64]) -> Trace:
    """Record a float64 model's logits, block outputs and weight fingerprints.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In float64 (``model.double()``). It is only read.
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64

    Returns
    -------
    Trace

    Raises
    ------
    BackendError
        If weights of the model are not in memory.
    CalibrationError
        If token windows have a wrong shape or ids that the model has no row for.
    """
    model = check_given(model)
    _check_dtype(model)
    windows = check_tokens(tokens)
    check_positions(plan.architecture, plan.dimensions, windows)
    check_ids(windows, plan.dimensions.vocabulary)
    logits, blocks = _run(model, plan, windows)
    return Trace(windows, logits, blocks, fingerprints(model, plan))


@undisturbed()
def verify(
    reference: Trace,
    model: Any,
    plan: ModelPlan,
    choices: Choices,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare a transformed float64 model with the trace of the model that it came from.

    Parameters
    ----------
    reference : Trace
        Trace of the model before it was transformed.
    model : transformers.PreTrainedModel
        The transformed model, in float64, not quantized yet.
    plan : ModelPlan
        Plan of the transforms.
    choices : Choices
        The permutations and factors that were applied.
    tolerance : float
        Largest relative error allowed.

    Returns
    -------
    Verification

    Raises
    ------
    VerificationError
        If outputs differ (the message names the first block where they do), or if a matrix didn't
        change, a run-time rotation is missing, or every permutation is the identity although it
        wasn't chosen. A matrix that its transform gives back, such as one of zeros, is right.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> result = cqhf.quantize(
    ...     cqhf.tiny_model("qwen2"), Recipe(block_size=16), np.arange(64).reshape(2, 32))
    >>> result.verification.logits_error < 1e-9
    True
    """
    model = check_given(model)
    _check_dtype(model)
    acted = _check_acted(reference, model, plan, choices)
    logits, blocks = _run(model, plan, reference.tokens)
    errors = []
    for before, after in zip(reference.blocks, blocks, strict=True):
        errors.append(stream_error(before, after, plan, choices))
    logits_error = relative_error(reference.logits, logits)
    for index, error in enumerate(errors):
        check_block_error(index, error, tolerance)
    check_logits_error(logits_error, tolerance)
    return Verification(logits_error, tuple(errors), *acted)


def stream_error(
    before: torch.Tensor, after: torch.Tensor, plan: ModelPlan, choices: Choices
) -> float:
    """Return the relative error of a transformed model's residual stream against the float one's.

    Parameters
    ----------
    before, after : torch.Tensor (windows, length, hidden), float64
    plan : ModelPlan
    choices : Choices
    """
    stream = plan.written
    if stream.centered:
        # Its readers never see the mean, and the writers no longer write it.
        before = before - before.mean(-1, keepdim=True)
    return relative_error(before, restore(after, stream, choices))


def check_block_error(index: int, error: float, tolerance: float = TOLERANCE) -> None:
    """Raise VerificationError if a decoder block's output is not the float model's."""
    if not error <= tolerance:
        raise VerificationError(
            f"the transformed model differs from the float model from decoder block {index} on: "
            f"relative error {error:.2e}, allowed {tolerance:.0e}{_ADVICE}"
        )


def check_logits_error(error: float, tolerance: float = TOLERANCE) -> None:
    """Raise VerificationError if logits are not the float model's."""
    if not error <= tolerance:
        raise VerificationError(
            "the transformed model's blocks agree with the float model's but its logits don't: "
            f"relative error {error:.2e}, allowed {tolerance:.0e}{_ADVICE}"
        )


def _check_dtype(model: Any) -> None:
    if model.dtype != torch.float64:
        raise TypeError(f"model must be in float64 to be verified, got {model.dtype}")


def check_choices(plan: ModelPlan, choices: Choices) -> int:
    """Return how many permutations move a channel; it is an error if they should and none does."""
    permuted = [r.name for r in plan.regions if r.permuted]
    missing = [name for name in permuted if name not in choices.permutations]
    if missing:
        raise VerificationError(
            f"no permutation was chosen for {missing[0]}; take permutations from a calibration of "
            "this model with this recipe"
        )
    moving = sum(not is_identity(p) for p in choices.permutations.values())
    if permuted and not moving and not choices.unmoved.issuperset(permuted):
        raise VerificationError(
            f"all {len(permuted)} permutations are the identity, although the recipe asks for "
            f"{plan.recipe.permutation!r}; take permutations from a calibration of this model "
            "with this recipe, or set permutation='identity'"
        )
    return moving


def is_identity(permutation: npt.NDArray[np.int64]) -> bool:
    """Return whether a permutation moves no channel."""
    return bool((permutation == np.arange(len(permutation))).all())


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
            f"change, the first is {stayed[0]}{_ADVICE}"
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


def check_any_changed(changed: int) -> None:
    """Raise VerificationError if no matrix had to change at all."""
    if not changed:
        raise VerificationError(
            "no matrix had to be transformed: the recipe does nothing; give it a rotation, a "
            "permutation or factors, or round weights alone with corequant.round_to_nearest"
        )


def _check_acted(
    reference: Trace,
    model: Any,
    plan: ModelPlan,
    choices: Choices,
) -> tuple[int, int, int]:
    changed = check_changed(reference.fingerprints, model, plan, choices)
    check_any_changed(changed)
    return changed, len(plan.online), check_choices(plan, choices)


def _run(
    model: Any, plan: ModelPlan, tokens: npt.NDArray[np.int64]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model, blocks = replicate(model), list[torch.Tensor]()
    model.config.return_dict = True

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        blocks.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        stack.enter_context(KeepFloat64())
        for i in range(plan.dimensions.blocks):
            block = model.get_submodule(plan.architecture.block_path(i))
            stack.callback(block.register_forward_hook(record).remove)
        ids = torch.from_numpy(tokens).to(device_of(model))
        output = model(input_ids=ids, use_cache=False)
    # A model without a head gives its last hidden states.
    return getattr(output, "logits", output[0]), blocks


class KeepFloat64(TorchFunctionMode):
    """While entered, tensors in float64 stay so when they are asked to become float32.

    Integers become float64 where they are asked to become float32: positions are multiplied by
    rotary frequencies, which are float64 here.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else kwargs.get("input")
        if func is torch.Tensor.float and not tensor.is_floating_point():
            return tensor.double()
        if func in _CASTS and tensor.dtype == torch.float64:
            if func is torch.Tensor.float:
                return tensor
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_CASTS = {
    torch.Tensor.float,
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.softmax,
    torch.softmax,
    torch.nn.functional.softmax,
}


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest magnitude of the reference.

    The error relative to zeros is 0 for zeros and infinite for anything else.
    """
    difference, largest = float((reference - other).abs().max()), float(reference.abs().max())
    if largest == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / largest
