"""Qwen."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture(
        "qwen3_moe",
        experts=Experts(
            where=(Where("mlp_only_layers", "omits"), Where("decoder_sparse_step", "divides"))
        ),
    ),
)
