"""Llama and the models that are built like it."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

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
    ),
    Architecture(
        "hunyuan_v1_dense", inner=("self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
)
