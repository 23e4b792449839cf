"""Nemotron: LayerNorms that multiply by 1 + w, an MLP without a gate."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = (Architecture("nemotron", norm="layer_one_plus", gate=None),)
