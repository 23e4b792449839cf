"""GPT-2."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "gpt2",
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        block="transformer.h.{}",
        norm="layer",
        attention_norm="ln_1",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        attention_output="attn.c_proj",
        mlp_norm="ln_2",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
        intermediate_size="n_inner",
        usual_expansion=4,
        requires=(("add_cross_attention", False),),
    ),
)
