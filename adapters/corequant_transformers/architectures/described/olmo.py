"""OLMo and EXAONE 4: since OLMo 2 norms stand after a part and not before it."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Experts

__all__ = ["DESCRIPTIONS"]

_OLMO2 = Architecture(
    "olmo2",
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)

DESCRIPTIONS = (
    _OLMO2,
    replace(_OLMO2, model_type="olmo3"),
    replace(_OLMO2, model_type="exaone4"),
    Architecture("olmoe", experts=Experts(intermediate_size="intermediate_size")),
)
