"""MPT: LayerNorms without a bias, query, key and value in one matrix that may be clipped."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "mpt",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        block="transformer.blocks.{}",
        norm="layer",
        attention_norm="norm_1",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.out_proj",
        mlp_norm="norm_2",
        gate=None,
        up="ffn.up_proj",
        down="ffn.down_proj",
        kv_heads="num_attention_heads",
        head_dim="hidden_size // num_attention_heads",
        intermediate_size="4 * hidden_size",
        variants=(
            Variant(
                (Where("attn_config.clip_qkv", "differs", (None, 0)),), {"linear_values": False}
            ),
        ),
    ),
)
