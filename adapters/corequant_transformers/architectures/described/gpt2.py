"""GPT-2 and its descendants GPT-Neo and GPT-BigCode."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_GPT2 = Architecture(
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
    kv_heads="num_attention_heads",
    head_dim="hidden_size // num_attention_heads",
    intermediate_size="n_inner",
    usual_expansion=4,
    requires=(("add_cross_attention", False),),
)

DESCRIPTIONS = (
    _GPT2,
    replace(
        _GPT2,
        model_type="gpt_bigcode",
        transposed=False,
        kv_heads="1",
        variants=(
            Variant(
                (Where("multi_query", "differs", (True,)),),
                {"kv_heads": "num_attention_heads", "qkv_groups": "num_attention_heads"},
            ),
        ),
    ),
    replace(
        _GPT2,
        model_type="gpt_neo",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        attention_output="attn.attention.out_proj",
        transposed=False,
        intermediate_size="intermediate_size",
        requires=(),
    ),
)
