"""GPT-NeoX: query, key and value in one matrix, head by head; two norms that read the same."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "gpt_neox",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        block="gpt_neox.layers.{}",
        norm="layer",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        attention_output="attention.dense",
        qkv_groups="num_attention_heads",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        kv_heads="num_attention_heads",
    ),
)
