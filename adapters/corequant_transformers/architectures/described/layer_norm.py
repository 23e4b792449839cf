"""Llama with LayerNorms: StarCoder2, StableLM."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture("starcoder2", norm="layer", gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    Architecture(
        "stablelm",
        norm="layer",
        requires=(("use_parallel_residual", False), ("qk_layernorm", False)),
    ),
)
