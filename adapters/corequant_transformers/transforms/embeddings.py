"""The embedding and the head, transformed and verified a few rows at a time.

A row belongs to a token, and nothing moves between rows, so that a large vocabulary needs no matrix
in float64: the float64 model is computed from a few rows at a time, or from those of the tokens
that it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import VerificationError
from corequant_transformers.model.forward import enter, leaving
from corequant_transformers.model.parts import ENTRY, EXIT, Parts, part_plan
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import (
    Choices,
    FoldedNorm,
    folded_norm,
    settle_norms,
    transform_matrix,
)
from corequant_transformers.transforms.verification import (
    KeepFloat64,
    check_changed,
    fingerprints,
    relative_error,
    transform_checked,
)

__all__ = ["transform_entry", "transform_exit"]

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
Pieces = Callable[[], Iterator[tuple[Array, Array | None]]]
"""Yields a matrix's rows and their bias in float64, a few at a time."""

_PIECE = 2**20
"""Weights at a time: 8 MiB in float64."""


def transform_entry(
    parts: Parts, plan: ModelPlan, choices: Choices, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Transform the open entry, which stays in float32.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    choices : Choices
    tokens : numpy.ndarray (length,), int64

    Returns
    -------
    before, after : torch.Tensor (1, length, hidden), float64
        Input of the first block in the float model and in the transformed one.
    changed : int
        Number of matrices that changed.

    Raises
    ------
    VerificationError
        If one that should change doesn't.
    """
    model, rows = parts.model, part_plan(plan, ENTRY)
    if plan.architecture.enclosed:
        model.double()
        with KeepFloat64():
            same = enter(parts, tokens)
        model.float()
        return same, same, 0
    path = plan.architecture.embedding
    matrix = next(m for m in rows.matrices if m.name == path)
    table = model.get_submodule(path)
    norm = folded_norm(model, matrix, plan)
    known = torch.from_numpy(np.unique(tokens)).to(parts.device)
    model.set_submodule(path, _excerpt(table, known))
    try:
        model.double()
        with KeepFloat64():
            before = enter(parts, tokens)
        changed = transform_checked(model, rows, choices)
        with KeepFloat64():
            after = enter(parts, tokens)
        wanted = model.get_submodule(path).weight.float()
    finally:
        model.set_submodule(path, table)
        model.float()
    weight, _ = _assemble(_pieces(table, matrix, choices, norm), matrix.shape, parts.device)
    if not torch.equal(weight[known], wanted):
        raise VerificationError(
            f"row-wise and whole-matrix transforms of {path} differ, so that what was verified is "
            "not what would be kept; nothing was written. Please report it with the model's config "
            "and the recipe"
        )
    table.weight = torch.nn.Parameter(weight, requires_grad=False)
    return before, after, changed


def transform_exit(
    parts: Parts,
    plan: ModelPlan,
    choices: Choices,
    states: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
) -> tuple[float, int]:
    """Transform the open exit, which stays in float32.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    choices : Choices
    states : pair of torch.Tensor (1, length, hidden), float64
        Output of the last block in the float model and in the transformed one.
    ids : torch.Tensor (1, length)

    Returns
    -------
    error : float
        Largest difference of logits, relative to their largest magnitude.
    changed : int
        Number of matrices that changed.

    Raises
    ------
    VerificationError
        If one that should change doesn't.
    """
    model, rows = parts.model, part_plan(plan, EXIT)
    path = plan.architecture.head
    matrix = next(m for m in rows.matrices if m.name == path)
    head = model.get_submodule(path)
    prints = fingerprints(model, rows)
    reference = _logits(parts, path, _pieces(head), states[0], ids)
    transformed = _pieces(head, matrix, choices, folded_norm(model, matrix, plan))
    weight, bias = _assemble(transformed, matrix.shape, parts.device)
    settle_norms(model, rows, choices.permutations)
    error = relative_error(reference, _logits(parts, path, transformed, states[1], ids))
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    head.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return error, check_changed(prints, model, rows, choices)


def _excerpt(table: Any, known: torch.Tensor) -> Any:
    """Return an embedding that has the rows of ascending token ids only."""
    few = torch.nn.Parameter(table.weight[known].detach(), requires_grad=False)
    small: Any = copy.deepcopy(table, {id(table.weight): few})
    # Which row stays zero while training has no part in a forward pass.
    small.num_embeddings, small.padding_idx = len(known), None

    def look_up(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = [*args, *kwargs.values()][0]
        return (torch.searchsorted(known, ids),), {}

    small.register_forward_pre_hook(look_up, with_kwargs=True)
    return small


def _pieces(
    module: Any,
    matrix: MatrixPlan | None = None,
    choices: Choices | None = None,
    norm: FoldedNorm | None = None,
) -> Pieces:
    """Return a float32 module's rows in float64, transformed if there is a row of a plan."""
    weight = to_host(module.weight)
    given = getattr(module, "bias", None)
    bias = None if given is None else to_host(given)
    step = max(1, _PIECE // weight.shape[1])

    def pieces() -> Iterator[tuple[Array, Array | None]]:
        for first in range(0, len(weight), step):
            W = weight[first : first + step].astype(np.float64)
            b = None if bias is None else bias[first : first + step].astype(np.float64)
            if matrix is not None and choices is not None:
                W, b = transform_matrix(W, b, matrix, norm, choices)
            yield W, b

    return pieces


def _assemble(
    pieces: Pieces, shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all rows and their bias in float32, on a device."""
    weight, biases, first = torch.empty(shape, dtype=torch.float32), list[Array](), 0
    for W, b in pieces():
        weight[first : first + len(W)] = torch.from_numpy(W)
        first += len(W)
        if b is not None:
            biases.append(b)
    bias = torch.from_numpy(np.concatenate(biases)).float() if biases else None
    return weight.to(device), None if bias is None else bias.to(device)


class _Head(torch.nn.Module):
    """A linear layer whose rows are made when they are multiplied by."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self._rows = pieces
        # Models ask for its dtype.
        self.weight = torch.empty(0, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x Wᵀ + b``."""
        products = []
        for W, b in self._rows():
            bias = None if b is None else torch.from_numpy(b).to(x.device)
            products.append(torch.nn.functional.linear(x, torch.from_numpy(W).to(x.device), bias))
        return torch.cat(products, -1)


@contextmanager
def _head(model: Any, path: str, pieces: Pieces) -> Iterator[None]:
    original = model.get_submodule(path)
    model.set_submodule(path, _Head(pieces))
    try:
        model.double()
        yield
    finally:
        model.set_submodule(path, original)
        model.float()


def _logits(
    parts: Parts, path: str, pieces: Pieces, state: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    with _head(parts.model, path, pieces), KeepFloat64(), leaving(parts, state) as model:
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found
