"""OPT."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "opt",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        extra_positions=2,
        final_norm="model.decoder.final_layer_norm",
        block="model.decoder.layers.{}",
        norm="layer",
        attention_norm="self_attn_layer_norm",
        attention_output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        gate=None,
        up="fc1",
        down="fc2",
        kv_heads="num_attention_heads",
        head_dim="hidden_size // num_attention_heads",
        intermediate_size="ffn_dim",
        requires=(
            ("do_layer_norm_before", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
            ("word_embed_proj_dim", "hidden_size"),
        ),
    ),
)
