"""Encoders: BERT and those built like it, ModernBERT."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture

__all__ = ["DESCRIPTIONS"]

_BERT = Architecture(
    "bert",
    enclosed=True,
    embedding="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    stem="embeddings",
    final_norm="",
    head="",
    block="encoder.layer.{}",
    attention_norm=None,
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    mlp_norm=None,
    gate=None,
    up="intermediate.dense",
    down="output.dense",
    inner=("attention.output.LayerNorm", "output.LayerNorm"),
    requires=(("is_decoder", False), ("add_cross_attention", False)),
)

_ROBERTA = replace(_BERT, model_type="roberta", reserved_positions=2)

DESCRIPTIONS = (
    _BERT,
    _ROBERTA,
    replace(_ROBERTA, model_type="xlm-roberta"),
    replace(_ROBERTA, model_type="camembert"),
    Architecture(
        "modernbert",
        enclosed=True,
        embedding="embeddings.tok_embeddings",
        stem="embeddings",
        final_norm="",
        head="",
        block="layers.{}",
        attention_norm=None,
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        mlp_norm=None,
        gate="mlp.Wi",
        up="mlp.Wi",
        down="mlp.Wo",
        # The first block has no norm before its attention.
        inner=("attn_norm", "mlp_norm"),
    ),
)
