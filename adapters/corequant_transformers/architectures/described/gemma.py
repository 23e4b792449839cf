"""Gemma: norms that multiply by 1 + w, from the second version on also after a part."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_GEMMA2 = Architecture(
    "gemma2",
    norm="rms_one_plus",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

DESCRIPTIONS = (
    Architecture("gemma", norm="rms_one_plus"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text"),
    # Its norm of values has no weights, so that it commutes with what happens inside a head.
    replace(
        _GEMMA2,
        model_type="gemma4_text",
        norm="rms",
        inner=("self_attn.q_norm", "self_attn.k_norm", "layer_scalar"),
        requires=(
            ("hidden_size_per_layer_input", 0),
            ("num_kv_shared_layers", 0),
            ("enable_moe_block", False),
        ),
        variants=(
            Variant(
                (
                    Where("attention_k_eq_v", "equals", (True,)),
                    Where("layer_types", "names", ("full_attention",)),
                ),
                {"value": None},
            ),
        ),
    ),
)
