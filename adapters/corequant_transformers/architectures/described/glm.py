"""GLM: gate and up in one matrix, in the fourth version also norms after a part."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

_GLM = Architecture("glm", gate="mlp.gate_up_proj", up="mlp.gate_up_proj")

DESCRIPTIONS = (
    _GLM,
    replace(
        _GLM,
        model_type="glm4",
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
)
