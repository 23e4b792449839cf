"""GPT-J and CodeGen: attention and MLP read the same norm."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

_GPTJ = Architecture(
    "gptj",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    block="transformer.h.{}",
    norm="layer",
    attention_norm="ln_1",
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    attention_output="attn.out_proj",
    mlp_norm="ln_1",
    gate=None,
    up="mlp.fc_in",
    down="mlp.fc_out",
    kv_heads="num_attention_heads",
    head_dim="hidden_size // num_attention_heads",
    intermediate_size="n_inner",
    usual_expansion=4,
)

DESCRIPTIONS = (
    _GPTJ,
    replace(
        _GPTJ,
        model_type="codegen",
        query="attn.qkv_proj",
        key="attn.qkv_proj",
        value="attn.qkv_proj",
        qkv_order=("query", "value", "key"),
        # It was trained on four devices.
        qkv_groups="4",
    ),
)
