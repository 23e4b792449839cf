"""Phi."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "phi",
        final_norm="model.final_layernorm",
        norm="layer",
        attention_output="self_attn.dense",
        mlp_norm="input_layernorm",
        gate=None,
        up="mlp.fc1",
        down="mlp.fc2",
        inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    Architecture(
        "phi3",
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    Architecture(
        "phimoe",
        norm="layer",
        experts=Experts(
            router="mlp.router", count="num_local_experts", intermediate_size="intermediate_size"
        ),
    ),
)
