"""Writers of the residual stream outside of a decoder, transformed as the embedding is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError, VerificationError
from corequant_transformers.architectures.writer import Writer
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import Choices, transform_side
from corequant_transformers.transforms.verification import TOLERANCE, stream_error

__all__ = ["check_writers", "transform_writers"]

Array = npt.NDArray[Any]

_INPUTS = 8
"""Random inputs on which what a writer writes is compared."""


def transform_writers(model: Any, plan: ModelPlan, choices: Choices) -> tuple[list[str], float]:
    """Transform a plan's writers in place, in float64, and compare their outputs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its parameters keep their dtype.
    plan : ModelPlan
    choices : Choices

    Returns
    -------
    changed : list of str
        Parameters that were replaced.
    error : float
        Largest relative error of what is written, permuted and rotated back.

    Raises
    ------
    ArchitectureError
        If the model's writers aren't as they are described.
    VerificationError
        If one writes something else.
    """
    state = dict(model.named_parameters())
    changed: list[str] = []
    largest = 0.0
    for name, writer in check_writers(plan, {n: tuple(p.shape) for n, p in state.items()}).items():
        weight, bias = _of(name, state)
        side = "input" if writer.transposed else "output"
        W = transform_side(weight, plan.written, side, choices)
        b = None if bias is None else transform_side(bias, plan.written, "output", choices)
        error = stream_error(_write(writer, weight, bias), _write(writer, W, b), plan, choices)
        if not error <= TOLERANCE:
            raise VerificationError(
                f"what {name} writes to the residual stream differs from what the float model's "
                f"writes: relative error {error:.2e}, allowed {TOLERANCE:.0e}; nothing was written"
            )
        largest = max(largest, error)
        for each, old, new in ((name, weight, W), (_bias_of(name), bias, b)):
            if old is not None and new is not None and not np.array_equal(old, new):
                _set(model, each, new)
                changed.append(each)
    return changed, largest


def check_writers(plan: ModelPlan, shapes: dict[str, tuple[int, ...]]) -> dict[str, Writer]:
    """Return a plan's writers by the names of a model's parameters.

    Parameters
    ----------
    plan : ModelPlan
    shapes : dict of str to tuple of int
        Shape of every parameter of the model.

    Raises
    ------
    ArchitectureError
        If one isn't there, or doesn't write as many channels as the residual stream has.
    """
    found = {}
    for writer in plan.writers:
        names = writer.among(shapes)
        if not names and "{}" not in writer.weight:
            raise ArchitectureError(
                f"the model has no parameter {writer.weight!r}, which the description of "
                f"{plan.architecture.model_type!r} names as a writer of the residual stream"
            )
        for name in names:
            shape, width = shapes[name], plan.dimensions.hidden
            if len(shape) != 2 or shape[1 if writer.transposed else 0] != width:
                raise ArchitectureError(
                    f"{name} must write the {width} channels of the residual stream, as "
                    f"{plan.architecture.model_type!r} is described, got shape {shape}"
                )
            found[name] = writer
    return found


def _of(name: str, state: dict[str, Any]) -> tuple[Array, Array | None]:
    bias = state.get(_bias_of(name))
    wide = to_host(state[name]).astype(np.float64)
    return wide, None if bias is None else to_host(bias).astype(np.float64)


def _bias_of(name: str) -> str:
    """Return the name of a weight's bias; empty for parameters of other names."""
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else ""


def _write(writer: Writer, W: Array, bias: Array | None) -> torch.Tensor:
    matrix = W if writer.transposed else W.T
    x = np.random.default_rng(0).standard_normal((_INPUTS, len(matrix)))
    y = x @ matrix + (0.0 if bias is None else bias)
    return torch.from_numpy(y)[None]


def _set(model: Any, name: str, value: Array) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[key]
    new = torch.from_numpy(np.ascontiguousarray(value)).to(old.device, old.dtype)
    module._parameters[key] = torch.nn.Parameter(new, requires_grad=False)
