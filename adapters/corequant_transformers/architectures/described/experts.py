"""Models of experts: Mixtral, those with a shared MLP or corrected scores, and gpt-oss."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Experts, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_SHARED = Experts(
    shared_gate="mlp.shared_experts.gate_proj",
    shared_up="mlp.shared_experts.up_proj",
    shared_down="mlp.shared_experts.down_proj",
    shared_size="moe_intermediate_size * n_shared_experts",
    count="n_routed_experts",
    where=(Where("first_k_dense_replace", "from"),),
)
_ERNIE = replace(
    _SHARED,
    count="moe_num_experts",
    chosen="moe_k",
    shared_size="moe_intermediate_size * moe_num_shared_experts",
    shared_first=True,
    where=(
        Where("moe_layer_interval", "divides"),
        Where("moe_layer_start_index", "from"),
        Where("moe_layer_end_index", "upto"),
    ),
)
_GRANITE = Experts(
    path="block_sparse_moe.experts",
    router="block_sparse_moe.router",
    count="num_local_experts",
    intermediate_size="intermediate_size",
)


_ERNIE_ALONE = replace(_ERNIE, shared_gate=None, shared_up=None, shared_down=None)

DESCRIPTIONS = (
    Architecture(
        "mixtral",
        experts=Experts(count="num_local_experts", intermediate_size="intermediate_size"),
    ),
    Architecture("granitemoe", experts=_GRANITE),
    Architecture(
        "qwen2_moe",
        experts=Experts(
            shared_gate="mlp.shared_expert.gate_proj",
            shared_up="mlp.shared_expert.up_proj",
            shared_down="mlp.shared_expert.down_proj",
            shared_router="mlp.shared_expert_gate",
            shared_first=True,
            where=(Where("mlp_only_layers", "omits"), Where("decoder_sparse_step", "divides")),
        ),
    ),
    Architecture("glm4_moe", experts=_SHARED),
    Architecture("dots1", experts=_SHARED),
    Architecture(
        "ernie4_5_moe",
        experts=_ERNIE,
        inner=("mlp.gate.moe_statics",),
        variants=(
            Variant((Where("moe_num_shared_experts", "equals", (0,)),), {"experts": _ERNIE_ALONE}),
        ),
    ),
    Architecture(
        "hunyuan_v1_moe",
        experts=Experts(
            router="mlp.gate.wg",
            shared_gate="mlp.shared_mlp.gate_proj",
            shared_up="mlp.shared_mlp.up_proj",
            shared_down="mlp.shared_mlp.down_proj",
            shared_first=True,
            chosen="moe_topk",
            intermediate_size="intermediate_size",
            shared_size="intermediate_size",
        ),
        inner=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    ),
    Architecture(
        "granitemoeshared",
        experts=replace(
            _GRANITE,
            shared_gate="shared_mlp.input_linear",
            shared_up="shared_mlp.input_linear",
            shared_down="shared_mlp.output_linear",
            shared_size="shared_intermediate_size",
        ),
        variants=(
            Variant((Where("shared_intermediate_size", "equals", (0,)),), {"experts": _GRANITE}),
        ),
    ),
    Architecture(
        "minimax_m2",
        experts=Experts(count="num_local_experts", intermediate_size="intermediate_size"),
        inner=("self_attn.q_norm", "self_attn.k_norm", "mlp.e_score_correction_bias"),
    ),
    # Biases, gate and up taking turns, and attention with sinks.
    Architecture(
        "gpt_oss",
        experts=Experts(
            router="mlp.router",
            fused_gate_up_bias="gate_up_proj_bias",
            fused_down_bias="down_proj_bias",
            transposed=True,
            interleaved=True,
            activation="_apply_gate",
            linear_up=False,
            count="num_local_experts",
            intermediate_size="intermediate_size",
        ),
        inner=("self_attn.sinks",),
    ),
)
