"""Qwen, with experts, and with linear attention in most blocks since version 3.5."""

from __future__ import annotations

from dataclasses import replace

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
_JOINT_DELTA_NET = replace(
    _DELTA_NET,
    readers=(("linear_attn.in_proj_qkvz", f"2 * {_KEYS} + 2 * {_VALUES}"),),
    steering=(("linear_attn.in_proj_ba", "2 * linear_num_value_heads"),),
)
_SPARSE = (Where("mlp_only_layers", "omits"), Where("decoder_sparse_step", "divides"))
_SHARED = Experts(
    shared_gate="mlp.shared_expert.gate_proj",
    shared_up="mlp.shared_expert.up_proj",
    shared_down="mlp.shared_expert.down_proj",
    shared_router="mlp.shared_expert_gate",
    shared_first=True,
)


def _hybrid(kind: str, mixer: Mixer, experts: Experts | None) -> Architecture:
    linear = (Where("layer_types", "names", ("linear_attention",)),)
    return Architecture(
        kind,
        norm="rms_one_plus",
        query_gate=True,
        linear_values=False,
        # With experts in every block, a config says nothing of another MLP.
        down=None if experts and not experts.where else "mlp.down_proj",
        experts=experts,
        variants=(Variant(linear, {"attention_output": None, "mixers": (mixer,)}),),
    )


DESCRIPTIONS = (
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture("qwen3_moe", experts=Experts(where=_SPARSE)),
    _hybrid("qwen3_next", _JOINT_DELTA_NET, replace(_SHARED, where=_SPARSE)),
    _hybrid("qwen3_5_text", _DELTA_NET, None),
    _hybrid("qwen3_5_moe_text", _DELTA_NET, _SHARED),
)
