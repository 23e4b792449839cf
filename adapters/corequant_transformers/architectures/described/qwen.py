"""Qwen, with experts, and with linear attention in most blocks since version 3.5."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts, Variant
from corequant_transformers.architectures.mixer import Mixer
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_KEYS = "linear_num_key_heads * linear_key_head_dim"
_VALUES = "linear_num_value_heads * linear_value_head_dim"
_DELTA_NET = Mixer(
    "input_layernorm",
    readers=(
        ("linear_attn.in_proj_qkv", f"2 * {_KEYS} + {_VALUES}"),
        ("linear_attn.in_proj_z", _VALUES),
    ),
    steering=(
        ("linear_attn.in_proj_b", "linear_num_value_heads"),
        ("linear_attn.in_proj_a", "linear_num_value_heads"),
    ),
    writers=(("linear_attn.out_proj", _VALUES),),
    inner=tuple(f"linear_attn.{name}" for name in ("conv1d", "norm", "A_log", "dt_bias")),
)

DESCRIPTIONS = (
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture(
        "qwen3_5_text",
        norm="rms_one_plus",
        query_gate=True,
        linear_values=False,
        variants=(
            Variant(
                (Where("layer_types", "names", ("linear_attention",)),),
                {"attention_output": None, "mixers": (_DELTA_NET,)},
            ),
        ),
    ),
    Architecture(
        "qwen3_moe",
        experts=Experts(
            where=(Where("mlp_only_layers", "omits"), Where("decoder_sparse_step", "divides"))
        ),
    ),
)
