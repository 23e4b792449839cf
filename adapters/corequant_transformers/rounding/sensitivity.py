"""Cost of each width for the layers of an unrounded block, from their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.recipe import Recipe, candidates_of
from corequant.rounding import InputMoments, expected_losses, unpredicted
from corequant.specs import QuantSpec
from corequant_transformers.model.forward import leaving
from corequant_transformers.model.parts import Parts
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["Watch", "gradient_of_logits", "layer_losses"]

Array = npt.NDArray[Any]

_POSITIONS = 128
"""Positions of a window whose logits are held at once."""


class Watch:
    """Moments of what layers read, while the context lasts, and gradients of their weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the layers' block open.
    rows : sequence of MatrixPlan
    gradients : bool
        Keep what layers read and write until ``trace_back`` asks for it.

    Attributes
    ----------
    squares : dict of str to numpy.ndarray (out_features, in_features), float32
        Sums over windows of the squared gradients of the weights, by the rows' names.
    """

    def __init__(self, model: Any, rows: Sequence[MatrixPlan], *, gradients: bool = False) -> None:
        self.squares: dict[str, Array] = {}
        self._moments: dict[object, InputMoments] = {}
        self._calls: list[tuple[MatrixPlan, torch.Tensor, torch.Tensor]] = []
        self._model, self._rows, self._gradients = model, rows, gradients
        self._hooks = ExitStack()

    def __enter__(self) -> Watch:
        for row in self._rows:
            module = self._model.get_submodule(row.name)
            first = self._key(row) not in self._moments
            if first:
                self._moments[self._key(row)] = InputMoments(row.shape[1], cross=False)
            if first or self._gradients:
                handle = module.register_forward_hook(self._hook(row, first))
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    @staticmethod
    def _key(row: MatrixPlan) -> object:
        # Experts read different tokens of one activation.
        return row.reads or row.name, row.expert

    def _hook(self, row: MatrixPlan, first: bool) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            x = args[0].detach()
            if first and x.numel():
                self._moments[self._key(row)].update(x)
            if self._gradients:
                self._calls.append((row, x, output))

        return hook

    def trace_back(self, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a block's input (length, hidden), and add those of the weights.

        Parameters
        ----------
        x, y : torch.Tensor (1, length, hidden)
            Input and output of the block in the pass that was watched.
        gradient : torch.Tensor (1, length, hidden)
            Gradient of ``y``.
        """
        calls = [call for call in self._calls if call[2].requires_grad]
        self._calls = []
        outputs = [output for _, _, output in calls]
        given = gradient.to(y.device, y.dtype)
        found = torch.autograd.grad(y, [x, *outputs], given, allow_unused=True)
        own: dict[str, torch.Tensor] = {}
        for (row, inputs, _), back in zip(calls, found[1:], strict=True):
            if back is not None:
                product = back.detach().flatten(0, -2).T @ inputs.flatten(0, -2)
                own[row.name] = own[row.name] + product if row.name in own else product
        for name, product in own.items():
            squares = to_host(product.square())
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        result: torch.Tensor = found[0].detach()[0]
        return result

    def moments(self, row: MatrixPlan) -> InputMoments:
        """Return the moments of a row's inputs."""
        return self._moments[self._key(row)]


def gradient_of_logits(
    parts: Parts,
    hidden: torch.Tensor,
    ids: npt.NDArray[np.int64],
    restored: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    """Return gradients of the log-probabilities of labels drawn from a model's own predictions.

    Parameters
    ----------
    parts : Parts
        Parts with the exit open and untransformed.
    hidden : torch.Tensor (1, length, hidden)
        Output of the last block.
    ids : numpy.ndarray (length,), int64
    restored : callable
        Undoes the transformations of the channels of hidden states.
    generator : torch.Generator
        Draws the labels, on the CPU.

    Returns
    -------
    torch.Tensor (length, hidden)
        Gradient at each position, for the label of that position.
    """
    found = []
    for first in range(0, hidden.shape[1], _POSITIONS):
        x = hidden[:, first : first + _POSITIONS].to(parts.device).requires_grad_()
        some = torch.from_numpy(ids[first : first + _POSITIONS])[None].to(parts.device)
        with torch.enable_grad(), leaving(parts, restored(x)) as model:
            logits = model(input_ids=some, use_cache=False).logits[0]
        chances = logits.detach().softmax(-1)
        labels = torch.multinomial(chances.cpu(), 1, generator=generator).to(logits.device)
        # The gradient of a label's log-probability.
        given = (-chances).scatter_add(1, labels, torch.ones_like(labels, dtype=chances.dtype))
        found.append(torch.autograd.grad(logits, x, given)[0][0].detach())
    return torch.cat(found)


def layer_losses(
    model: Any,
    recipe: Recipe,
    rows: Sequence[MatrixPlan],
    watch: Watch,
    tokens: int,
) -> dict[str, list[float]]:
    """Return the loss of each of a recipe's candidates for each layer, by the rows' names.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model with the layers' block open and transformed.
    recipe : Recipe
    rows : sequence of MatrixPlan
    watch : Watch
        Watch of these rows.
    tokens : int
        Number of tokens of all windows.
    """
    candidates, found = candidates_of(recipe), {}
    for row in rows:
        # A candidate whose groups don't divide the inputs is never chosen.
        fits = [not s.group_size or row.shape[1] % s.group_size == 0 for s in candidates]
        specs = [spec for spec, fit in zip(candidates, fits, strict=True) if fit]
        W = to_host(model.get_submodule(row.name).weight).astype(np.float32, copy=False)
        values = iter(_losses(W, row, specs, recipe.sensitivity, watch, tokens))
        found[row.name] = [float(next(values)) if fit else 0.0 for fit in fits]
    return found


def _losses(
    W: npt.NDArray[np.float32],
    row: MatrixPlan,
    specs: Sequence[QuantSpec],
    sensitivity: str,
    watch: Watch,
    tokens: int,
) -> npt.NDArray[np.float64]:
    if sensitivity == "weights":
        power = float(np.square(W, dtype=np.float64).sum())
        return _relative(expected_losses(W, specs, weights=np.ones(row.shape[1])), power)
    moments = watch.moments(row)
    if not moments.count:
        # No token was routed to this expert.
        return np.zeros(len(specs))
    H = to_host(moments.H) if isinstance(moments.H, torch.Tensor) else moments.H
    feedback = row.options.method != "nearest"
    options: dict[str, Any] = {"act_order": row.options.act_order, "tokens": moments.count}
    left = unpredicted(H, **options) if feedback else None
    if sensitivity == "output":
        power = float(np.einsum("ij,ij->", W @ H, W, dtype=np.float64))
        given = {"H": H} if left is None else {"weights": left}
        return _relative(expected_losses(W, specs, **given), power)
    squares = watch.squares.get(row.name)
    if squares is None:
        return np.zeros(len(specs))
    if left is not None:
        # What feedback takes off a column's error.
        whole = np.diagonal(H).astype(np.float64)
        squares = squares * (left / np.where(whole > 0, whole, 1))
    return expected_losses(W, specs, weights=squares) / (2 * tokens)


def _relative(losses: npt.NDArray[np.float64], power: float) -> npt.NDArray[np.float64]:
    return losses / power if power else losses
