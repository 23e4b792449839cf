"""OLMo, whose norms have no weights, and since OLMo 2, and in EXAONE 4, stand after a part."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Experts, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_OLMO2 = Architecture(
    "olmo2",
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)

_CLIPPED = (Variant((Where("clip_qkv", "differs", (None,)),), {"linear_values": False}),)

DESCRIPTIONS = (
    Architecture("olmo", norm="layer_plain", norm_eps=1e-5, variants=_CLIPPED),
    _OLMO2,
    replace(_OLMO2, model_type="olmo3"),
    replace(_OLMO2, model_type="exaone4"),
    Architecture(
        "olmoe", experts=Experts(intermediate_size="intermediate_size"), variants=_CLIPPED
    ),
)
