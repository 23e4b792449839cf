"""Falcon: attention and MLP side by side, in three generations."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_NEW = Where("new_decoder_architecture", "equals", (True,))
_OLD = Where("new_decoder_architecture", "differs", (True,))

DESCRIPTIONS = (
    Architecture(
        "falcon",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        block="transformer.h.{}",
        norm="layer",
        query="self_attention.query_key_value",
        key="self_attention.query_key_value",
        value="self_attention.query_key_value",
        attention_output="self_attention.dense",
        mlp_norm="input_layernorm",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        linear_classes=("FalconLinear",),
        kv_heads="1",
        head_dim="hidden_size // num_attention_heads",
        intermediate_size="ffn_hidden_size",
        variants=(
            Variant(
                (_OLD, Where("multi_query", "differs", (True,))),
                {"kv_heads": "num_attention_heads", "qkv_groups": "num_attention_heads"},
            ),
            Variant(
                (_OLD, Where("parallel_attn", "differs", (True,))),
                {"mlp_norm": "post_attention_layernorm"},
            ),
            Variant((_NEW,), {"kv_heads": "num_kv_heads", "qkv_groups": "num_kv_heads"}),
            Variant(
                (_NEW, Where("num_ln_in_parallel_attn", "equals", (2, None))),
                {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
            ),
        ),
    ),
)
