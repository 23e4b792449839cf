"""Llama with LayerNorms: StarCoder2, StableLM."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (
    Architecture("starcoder2", norm="layer", gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    Architecture(
        "stablelm",
        norm="layer",
        requires=(("qk_layernorm", False),),
        variants=(
            Variant(
                (Where("use_parallel_residual", "equals", (True,)),),
                {"mlp_norm": "input_layernorm"},
            ),
        ),
    ),
)
