"""Cohere: attention and MLP side by side, LayerNorms without a bias."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

_COHERE = Architecture("cohere", norm="layer", mlp_norm="input_layernorm")

DESCRIPTIONS = (_COHERE, replace(_COHERE, model_type="cohere2"))
