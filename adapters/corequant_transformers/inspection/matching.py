"""Recovery of a quantized model's permutations and factors from its float model.

A directory holds what was rounded, not what it was rounded from. Signs of the residual stream and
rotations follow from the recipe. Permutations and factors inside blocks were chosen from
activations, and are told from the weights: each channel of the quantized model is the float model's
whose weights it resembles, which rounding hardly hides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment

from corequant.errors import CheckpointError
from corequant.permutation import identity_permutation
from corequant.rotation import block_hadamard
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.replicas import replicate
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import RESIDUAL, MatrixPlan, Region, Side
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import Choices, transform_model

__all__ = ["check_alike", "find_choices", "match_channels", "transformed"]

Array = npt.NDArray[Any]

_ROWS = 4096
"""Rows of an embedding that tell its columns apart."""

_LEAST_COSINE = 0.5
"""Between a matrix and what it was rounded to, all entries taken as one vector: two bits leave 0.9,
another model's is 0."""


def transformed(model: Any, plan: ModelPlan, choices: Choices) -> Any:
    """Return a float model as a plan and choices transform it, in float32, unrounded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Only read.
    plan : ModelPlan
    choices : Choices
    """
    own = replicate(model, _float32)
    own.config.return_dict = True
    standardize(own, plan)
    transform_model(own, plan, choices)
    return own


def _float32(parameter: torch.Tensor) -> torch.nn.Parameter:
    # An object of its own, whose data can be exchanged.
    return torch.nn.Parameter(parameter.detach().float(), requires_grad=False)


def find_choices(plan: ModelPlan, quantized: Any, model: Any, draw: int = 0) -> Choices:
    """Return the permutations and factors that lead from a float model to a quantized one.

    Parameters
    ----------
    plan : ModelPlan
        The quantized model's.
    quantized : transformers.PreTrainedModel
    model : transformers.PreTrainedModel
        The float model.
    draw : int
        Which draw of the residual stream's signs was taken.

    Returns
    -------
    Choices
        Scales, which rounding blurs, are those of least squares.
    """
    choices = Choices({}, dict(plan.draw_signs(draw)))
    sides = [side for m in plan.matrices for side in _sides(m)]
    if any(side.permutation == RESIDUAL for side in sides):
        order = _residual_order(plan, quantized, model, choices)
        choices = Choices({RESIDUAL: order}, choices.factors)
    hidden = [r for r in plan.regions if r.name != RESIDUAL and (r.permuted or r.factored)]
    if not hidden:
        return choices
    names = {region.name for region in hidden}
    bare = replace(plan, matrices=tuple(_without(m, names) for m in plan.matrices))
    halfway = transformed(model, bare, choices)
    permutations, factors = dict(choices.permutations), dict(choices.factors)
    for region in hidden:
        pairs = list(_channel_pairs(region, plan, quantized, halfway))
        order, found = match_channels(pairs, region.side.heads, signed=region.factored)
        if region.permuted:
            permutations[region.name] = order
        if region.factored:
            signs_only = plan.recipe.factors == "signs"
            factors[region.name] = np.sign(found) if signs_only else found
    return Choices(permutations, factors)


def _sides(matrix: MatrixPlan) -> Iterable[Side]:
    return (matrix.input, *(part.output for part in matrix.row_slices))


def _without(matrix: MatrixPlan, regions: set[str]) -> MatrixPlan:
    """Return a row that leaves the channels of some regions as they are."""

    def blank(side: Side) -> Side:
        inside = regions.intersection((side.permutation or "", side.factors or ""))
        return Side(centered=side.centered) if inside else side

    slices = tuple(replace(part, output=blank(part.output)) for part in matrix.slices)
    return replace(matrix, input=blank(matrix.input), output=blank(matrix.output), slices=slices)


def _residual_order(
    plan: ModelPlan, quantized: Any, model: Any, choices: Choices
) -> npt.NDArray[np.int64]:
    path = plan.architecture.embedding
    stored = to_host(quantized.get_submodule(path).weight[:_ROWS]).astype(np.float32)
    given = to_host(model.get_submodule(path).weight[:_ROWS].float())
    side = next(m.input for m in plan.matrices if m.name == path)
    if side.factors is not None:
        stored = stored * choices.factors[side.factors].astype(np.float32)
    return match_channels([(stored.T, given.T, 1)])[0]


def _channel_pairs(
    region: Region, plan: ModelPlan, quantized: Any, halfway: Any
) -> Iterable[tuple[Array, Array, int]]:
    """Yield what a region's channels have in a quantized model and in the float one, row by row.

    With the power of the channel's factor that the quantized rows are multiplied by.
    """
    for matrix in plan.matrices:
        own = to_host(quantized.get_submodule(matrix.name).weight)
        given = to_host(halfway.get_submodule(matrix.name).weight)
        for part, rows in zip(matrix.row_slices, matrix.sliced_rows(), strict=True):
            side = part.output
            if region.name in (side.permutation, side.factors):
                yield _unrotated(own[rows].T, side).T, given[rows], _power(side, region, 1)
        side = matrix.input
        if region.name in (side.permutation, side.factors) and side.repeat == 1:
            yield _unrotated(own, side).T, given.T, _power(side, region, -1)


def _unrotated(W: Array, side: Side) -> Array:
    if side.rotation is None:
        return W
    unrotated: Array = block_hadamard(np.ascontiguousarray(W), side.rotation, inverse=True)
    return unrotated


def _power(side: Side, region: Region, power: int) -> int:
    return power if side.factors == region.name else 0


def match_channels(
    pairs: Iterable[tuple[Array, Array, int]], heads: int = 1, *, signed: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the permutation and the factors of channels.

    Parameters
    ----------
    pairs : iterable of (ours, theirs, power)
        Arrays (channels, d), rounded and not; row ``k`` of ``ours`` is about row
        ``permutation[k]`` of ``theirs``, times that channel's factor to the ``power``.
    heads : int
        Number of heads; channels stay within theirs.
    signed : bool
        Whether factors may be negative.

    Returns
    -------
    permutation : numpy.ndarray (channels,), int64
    factors : numpy.ndarray (channels,), float64
        1 where no power tells.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant_transformers.inspection.matching import match_channels
    >>> W = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    >>> order, factors = match_channels([(-2 * W[[2, 0, 3, 1]], W, 1)], signed=True)
    >>> order.tolist(), factors.tolist()
    ([2, 0, 3, 1], [-2.0, -2.0, -2.0, -2.0])
    """
    pairs = list(pairs)
    channels = len(pairs[0][0])
    width = channels // heads
    order = identity_permutation(channels)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        alike = np.zeros((width, width), np.float32)
        for ours, theirs, power in pairs:
            cosine = _normal(ours[rows]) @ _normal(theirs[rows]).T
            alike += np.abs(cosine) if signed and power else cosine
        order[rows] = _assign(alike) + head * width
    logarithms, votes = np.zeros(channels), np.zeros(channels)
    count = 0
    for ours, theirs, power in pairs:
        if not power:
            continue
        b = theirs[order].astype(np.float64)
        squares = np.square(b).sum(1)
        ratio = np.divide((ours * b).sum(1), squares, out=np.ones(channels), where=squares > 0)
        ratio[ratio == 0] = 1.0
        logarithms += power * np.log(np.abs(ratio))
        votes += np.sign(ratio) * np.abs(ratio * np.sqrt(squares))
        count += 1
    # The mean of what writers and readers tell: what rounding shrinks pulls them apart.
    factors = np.exp(logarithms / max(1, count)) * np.where(votes < 0, -1.0, 1.0)
    return order, factors


def _normal(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    normal: Array = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return normal


def _assign(alike: Array) -> npt.NDArray[np.int64]:
    """Return the permutation that a similarity matrix (ours, theirs) supports."""
    best: npt.NDArray[np.int64] = alike.argmax(1)
    _, counts = np.unique(best, return_counts=True)
    if len(counts) == len(best):
        return best
    # Channels without weights, and equal ones.
    taken = np.bincount(best, minlength=len(best))
    open_rows = np.flatnonzero(taken[best] > 1)
    left = np.setdiff1d(np.arange(len(best)), best[taken[best] == 1])
    rows, columns = linear_sum_assignment(alike[np.ix_(open_rows, left)], maximize=True)
    best[open_rows[rows]] = left[columns]
    return best


def check_alike(plan: ModelPlan, quantized: Any, model: Any, where: str) -> None:
    """Raise CheckpointError unless a transformed model's matrices are those that were quantized.

    Parameters
    ----------
    plan : ModelPlan
    quantized, model : transformers.PreTrainedModel
    where : str
        Name of the quantized model, for the error message.
    """
    for matrix in plan.quantized:
        ours = quantized.get_submodule(matrix.name).weight.float().reshape(-1)
        theirs = model.get_submodule(matrix.name).weight.reshape(-1).to(ours.device)
        scale = float(ours.norm() * theirs.norm())
        cosine = float(ours @ theirs) / scale if scale else 1.0
        if cosine < _LEAST_COSINE:
            raise CheckpointError(
                f"against must be the float model that {where} was made from, got one whose "
                f"{matrix.name} is another matrix: the cosine between the two, transformed alike, "
                f"is {cosine:.2f}"
            )
