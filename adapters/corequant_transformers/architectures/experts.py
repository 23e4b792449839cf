"""Routed experts, which take the place of an MLP."""

from __future__ import annotations

from dataclasses import dataclass

from corequant_transformers.architectures.where import Where

__all__ = ["Experts"]


@dataclass(frozen=True)
class Experts:
    """An MLP of routed experts, each with a gate, and of shared ones that every token visits.

    Transformers keeps the experts' weights in two parameters with three axes. They are split into
    a linear layer for each matrix, ``{path}.{expert}.{gate}`` and so on, before anything is done.

    Attributes
    ----------
    path, router : str
        In a decoder block: the experts, and the layer that scores them, which reads the same norm.
    gate, up, down : str
        Names that the layers of one expert are given, or have where they are not fused.
    fused_gate_up, fused_down : str
        The parameters (experts, 2·intermediate, hidden), gate first, and (experts, hidden,
        intermediate).
    fused_gate_up_bias, fused_down_bias : str, optional
        Parameters with their biases.
    transposed, interleaved : bool
        Whether the matrices are stored (in_features, out_features), and whether rows of gate and
        up take turns.
    activation : str, optional
        Method of the experts' module that makes one of gate and up, which it gets as they are
        stored; down reads ``act(gate) * up`` by default.
    linear_up : bool
        Whether what down reads is linear in up.
    scaled_inputs : bool
        Whether shares multiply what experts read, not what they give.
    shared_gate, shared_up, shared_down : str, optional
        Shared MLP that reads the same norm, like that of the architecture.
    shared_router : str, optional
        The layer that gives a token's share of it.
    shared_first : bool
        Whether it runs before the experts.
    count, chosen : str
        Fields of the config: experts, experts per token.
    intermediate_size, shared_size : str
        Fields of the config or expressions: widths of an expert and of the shared MLP.
    where : tuple of Where
        The blocks that have experts, by fields of the config; the others have the MLP of the
        architecture. All have if it is empty.
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = "gate_up_proj"
    fused_down: str = "down_proj"
    fused_gate_up_bias: str | None = None
    fused_down_bias: str | None = None
    transposed: bool = False
    interleaved: bool = False
    activation: str | None = None
    linear_up: bool = True
    scaled_inputs: bool = False
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    shared_router: str | None = None
    shared_first: bool = False
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    intermediate_size: str = "moe_intermediate_size"
    shared_size: str = "shared_expert_intermediate_size"
    where: tuple[Where, ...] = ()
