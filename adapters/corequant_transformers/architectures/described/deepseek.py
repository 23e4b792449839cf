"""DeepSeek, and others with latent attention."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Experts, Variant
from corequant_transformers.architectures.latent import Latent
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_PLAIN_QUERIES = Variant(
    (Where("q_lora_rank", "equals", (None,)),), {"latent": Latent(query_down=None, query_up=None)}
)
_LATENT = Architecture("youtu", latent=Latent(), variants=(_PLAIN_QUERIES,))
_EXPERTS = Experts(
    shared_gate="mlp.shared_experts.gate_proj",
    shared_up="mlp.shared_experts.up_proj",
    shared_down="mlp.shared_experts.down_proj",
    shared_size="moe_intermediate_size * n_shared_experts",
    count="n_routed_experts",
    where=(Where("first_k_dense_replace", "from"),),
)

DESCRIPTIONS = (
    replace(_LATENT, model_type="deepseek_v3", experts=_EXPERTS),
    replace(_LATENT, model_type="deepseek_v2", experts=_EXPERTS),
    _LATENT,
    replace(_LATENT, model_type="minicpm3"),
)
