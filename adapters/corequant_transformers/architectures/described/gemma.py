"""Gemma: norms that multiply by 1 + w, from the second version on also after a part."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

_GEMMA2 = Architecture(
    "gemma2",
    norm="rms_one_plus",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

DESCRIPTIONS = (
    Architecture("gemma", norm="rms_one_plus"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text"),
)
