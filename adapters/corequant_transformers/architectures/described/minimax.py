"""MiniMax: linear attention in most blocks, parts that add to what their norm gives."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts, Variant
from corequant_transformers.architectures.mixer import Mixer
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_LIGHTNING = Mixer(
    "input_layernorm",
    readers=(
        ("self_attn.qkv_proj", "3 * num_attention_heads * head_dim"),
        ("self_attn.output_gate", "num_attention_heads * head_dim"),
    ),
    writers=(("self_attn.out_proj", "num_attention_heads * head_dim"),),
    inner=tuple(
        f"self_attn.{name}"
        for name in ("norm", "slope_rate", "query_decay", "key_decay", "diagonal_decay")
    ),
)

DESCRIPTIONS = (
    Architecture(
        "minimax",
        residual_normed=True,
        experts=Experts(count="num_local_experts", intermediate_size="intermediate_size"),
        variants=(
            Variant(
                (Where("layer_types", "names", ("linear_attention",)),),
                {"attention_output": None, "mixers": (_LIGHTNING,)},
            ),
        ),
    ),
)
