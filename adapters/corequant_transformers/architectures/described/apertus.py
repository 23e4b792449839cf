"""Apertus: an MLP without a gate, whose activation function has parameters."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "apertus",
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        gate=None,
        inner=("self_attn.q_norm", "self_attn.k_norm", "mlp.act_fn"),
    ),
)
