"""DeepSeek, and others with latent attention; blocks with experts are those of ``Experts``."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.latent import Latent
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_PLAIN_QUERIES = Variant(
    (Where("q_lora_rank", "equals", (None,)),), {"latent": Latent(query_down=None, query_up=None)}
)
_V3 = Architecture("deepseek_v3", latent=Latent(), variants=(_PLAIN_QUERIES,))

DESCRIPTIONS = (
    _V3,
    replace(_V3, model_type="deepseek_v2"),
    replace(_V3, model_type="youtu"),
    replace(_V3, model_type="minicpm3"),
)
