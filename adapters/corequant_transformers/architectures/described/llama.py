"""Llama and the models that are built like it."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("ministral"),
    Architecture("ministral3"),
    Architecture("smollm3"),
    Architecture("granite"),
    Architecture("ernie4_5"),
    Architecture("seed_oss"),
    Architecture("helium"),
    Architecture("arcee", gate=None),
    Architecture(
        "llama4_text",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
        intermediate_size="intermediate_size_mlp",
        experts=Experts(
            path="feed_forward.experts",
            router="feed_forward.router",
            transposed=True,
            scaled_inputs=True,
            shared_gate="feed_forward.shared_expert.gate_proj",
            shared_up="feed_forward.shared_expert.up_proj",
            shared_down="feed_forward.shared_expert.down_proj",
            count="num_local_experts",
            intermediate_size="intermediate_size",
            shared_size="intermediate_size",
            where=(Where("moe_layers", "lists"),),
        ),
    ),
    Architecture(
        "hunyuan_v1_dense", inner=("self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
)
