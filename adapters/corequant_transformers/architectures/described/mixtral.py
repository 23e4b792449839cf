"""Mixtral, and Granite with experts."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Experts

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture(
        "mixtral",
        experts=Experts(count="num_local_experts", intermediate_size="intermediate_size"),
    ),
    Architecture(
        "granitemoe",
        experts=Experts(
            path="block_sparse_moe.experts",
            router="block_sparse_moe.router",
            count="num_local_experts",
            intermediate_size="intermediate_size",
        ),
    ),
)
