"""Routed experts with linear layers of their own, on the memory of Transformers' fused ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from corequant._validation import join_some
from corequant.errors import ArchitectureError
from corequant_transformers.architectures.experts import Experts

__all__ = ["ExpertList", "check_experts", "linear_layer", "matrices_of"]


class ExpertList(torch.nn.Module):
    """Experts with linear layers of their own, called as Transformers calls its fused ones.

    Parameters
    ----------
    fused : torch.nn.Module
        With the parameters that ``description`` names, and its activation function.
    description : Experts

    Raises
    ------
    ArchitectureError
        If the module lacks what the description names, or has parameters that it doesn't.

    Attributes
    ----------
    shared : set of int
        Experts that read all tokens, whichever they are given; what they make of the others is
        dropped.
    """

    def __init__(self, fused: Any, description: Experts) -> None:
        super().__init__()
        _check_names(fused, description)
        self.shared: set[int] = set()
        self.description = description
        self.count = len(getattr(fused, description.fused_down))
        # What else it is, without its parameters.
        rest = copy.copy(fused)
        rest.__dict__["_parameters"] = {}
        self.__dict__["_rest"] = rest
        if description.activation is None:
            self.act_fn: Any = fused.act_fn
        for index in range(self.count):
            matrices = matrices_of(description, partial(_part, fused, index))
            layers = {name: linear_layer(*pair) for name, pair in matrices.items()}
            self.add_module(str(index), torch.nn.ModuleDict(layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        chosen: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the chosen experts give.

        Parameters
        ----------
        hidden_states : torch.Tensor (tokens, hidden)
            For experts with scaled inputs (experts · tokens, hidden), all tokens for each expert,
            zeros where a token doesn't visit it; the result has the same rows then.
        chosen, weights : torch.Tensor (tokens, experts per token), optional
            Indices of experts, and their shares, by which the result is the sum of what they give.
        """
        if chosen is None or weights is None:
            return self._each(hidden_states)
        total = torch.zeros_like(hidden_states)
        visited = sorted({*torch.unique(chosen).tolist(), *self.shared})
        self.add(total, hidden_states, chosen, weights, visited)
        return total

    def add(
        self,
        total: torch.Tensor,
        hidden_states: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        indices: Iterable[int],
    ) -> None:
        """Add what some experts give to ``total``, in place; arguments are those of ``forward``.

        Parameters
        ----------
        total : torch.Tensor (tokens, hidden)
        hidden_states, chosen, weights : torch.Tensor
        indices : iterable of int
            The experts, in ascending order.
        """
        for index in indices:
            token, position = torch.where(chosen == index)
            shared = index in self.shared
            if not shared and not len(token):
                continue
            y = self._expert(index, hidden_states if shared else hidden_states[token])
            y = (y[token] if shared else y) * weights[token, position, None]
            total.index_add_(0, token, y.to(total.dtype))

    def _each(self, hidden_states: torch.Tensor) -> torch.Tensor:
        given = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        result = torch.zeros_like(given)
        for index, x in enumerate(given):
            visits = x.any(-1)
            if index in self.shared:
                # Unscaled rows of all tokens aren't here; each has those of the experts it visits.
                every = given.sum(0)
                result[index, visits] = self._expert(index, torch.where(visits[:, None], x, every))[
                    visits
                ]
            elif bool(visits.any()):
                result[index, visits] = self._expert(index, x[visits])
        return result.view_as(hidden_states)

    def _expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        names, expert = self.description, self.get_submodule(str(index))
        assert isinstance(expert, torch.nn.ModuleDict), "experts are made here"
        gate, up = expert[names.gate](x), expert[names.up](x)
        if names.activation is None:
            inner = self.act_fn(gate) * up
        else:
            both = torch.stack((gate, up), -1).flatten(-2)
            both = both if names.interleaved else torch.cat((gate, up), -1)
            inner = getattr(self._rest, names.activation)(both)
        result: torch.Tensor = expert[names.down](inner)
        return result

    @property
    def _rest(self) -> Any:
        return self.__dict__["_rest"]


def check_experts(fused: Any, made: ExpertList) -> None:
    """Raise ArchitectureError unless experts compute what Transformers' fused ones do.

    Nothing else compares them: both networks of the verification have these.

    Parameters
    ----------
    fused : torch.nn.Module
        With weights in float32.
    made : ExpertList
        Made of it.
    """
    up: Any = made.get_submodule("0").get_submodule(made.description.up)
    hidden = int(up.weight.shape[1])
    generator = torch.Generator().manual_seed(0)
    device = getattr(fused, made.description.fused_down).device
    # Small and large inputs: some activation functions clip.
    x = torch.randn(8, hidden, generator=generator) * torch.tensor([[0.3], [30.0]]).repeat(4, 1)
    chosen = torch.arange(8)[:, None] % made.count
    shares = torch.rand(8, 1, generator=generator) + 0.5
    given: tuple[torch.Tensor, ...] = (x.to(device), chosen.to(device), shares.to(device))
    if made.description.scaled_inputs:
        every = torch.zeros(made.count, 8, hidden)
        every[chosen[:, 0], torch.arange(8)] = x
        given = (every.reshape(-1, hidden).to(device),)
    with torch.no_grad():
        expected, found = fused(*given).double(), made(*given).double()
    # Rows differ in magnitude.
    scale = expected.abs().amax(-1, keepdim=True) + 1e-12
    error = float(((expected - found).abs() / scale).max())
    if not error <= 1e-3:
        raise ArchitectureError(
            f"{type(fused).__name__} must compute what the description of its experts says, got "
            f"outputs that differ by {error:.1e} of the largest"
        )


def _check_names(fused: Any, description: Experts) -> None:
    biases = (description.fused_gate_up_bias, description.fused_down_bias)
    described = {description.fused_gate_up, description.fused_down, *biases} - {None}
    there = {name for name, _ in fused.named_parameters()}
    activation = description.activation or "act_fn"
    lacks = [] if hasattr(fused, activation) else [activation]
    if there != described or lacks:
        raise ArchitectureError(
            f"{type(fused).__name__} must have {activation} and the parameters "
            f"{join_some(sorted(map(str, described)))} as it is described, got one that differs "
            f"in {join_some(sorted(map(str, there ^ described)) + lacks)}"
        )


def matrices_of(
    description: Experts, part: Callable[[str], torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Return weight and bias of each layer of one expert, by the layer's name.

    Parameters
    ----------
    description : Experts
    part : callable
        Returns the expert's part of one of the parameters that the description names.
    """
    both, down = part(description.fused_gate_up), part(description.fused_down)
    if description.transposed:
        both, down = both.T, down.T
    gate, up = _halves(both, description)
    names = (description.gate, description.up, description.down)
    biases: tuple[Any, ...] = (None, None, None)
    if description.fused_gate_up_bias is not None:
        biases = (*_halves(part(description.fused_gate_up_bias), description), biases[2])
    if description.fused_down_bias is not None:
        biases = (*biases[:2], part(description.fused_down_bias))
    return dict(zip(names, zip((gate, up, down), biases, strict=True), strict=True))


def _part(fused: Any, index: int, name: str) -> torch.Tensor:
    found: torch.Tensor = getattr(fused, name)[index]
    return found


def _halves(both: torch.Tensor, description: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    if description.interleaved:
        return both[::2], both[1::2]
    gate, up = both.chunk(2)
    return gate, up


def linear_layer(W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """Return a linear layer with this memory as its weight and bias."""
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(W.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return layer
