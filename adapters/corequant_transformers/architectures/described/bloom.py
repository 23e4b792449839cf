"""BLOOM: a norm on the embedding; query, key and value in one matrix, head by head."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "bloom",
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        block="transformer.h.{}",
        norm="layer",
        query="self_attention.query_key_value",
        key="self_attention.query_key_value",
        value="self_attention.query_key_value",
        attention_output="self_attention.dense",
        qkv_groups="num_attention_heads",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        kv_heads="num_attention_heads",
        head_dim="hidden_size // num_attention_heads",
        intermediate_size="4 * hidden_size",
        requires=(
            ("apply_residual_connection_post_layernorm", False),
            ("slow_but_exact", False),
        ),
    ),
)
