"""BitNet: norms before the output projections of attention and MLP."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "bitnet",
        attention_inner_norm="self_attn.attn_sub_norm",
        mlp_inner_norm="mlp.ffn_sub_norm",
    ),
)
