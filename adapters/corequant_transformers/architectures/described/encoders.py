"""Encoders, BERT, those built like it and ModernBERT, and T5, an encoder with a decoder."""

from __future__ import annotations

from dataclasses import replace

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.second import SecondStack
from corequant_transformers.architectures.where import Where

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

_GATED = Where("is_gated_act", "equals", (True,))
_DECODER = Where("num_layers", "from")
_ENCODER_INNER = (
    "layer.0.layer_norm",
    "layer.1.layer_norm",
    "layer.0.SelfAttention.relative_attention_bias",
)
_DECODER_INNER = (*_ENCODER_INNER, "layer.2.layer_norm")


def _mlp(layer: str, *, gated: bool) -> dict[str, str | None]:
    path = f"{layer}.DenseReluDense"
    names = {"gate": f"{path}.wi_0", "up": f"{path}.wi_1"} if gated else {"up": f"{path}.wi"}
    return {"gate": None, **names, "down": f"{path}.wo"}


# An encoder and a decoder, RMSNorms before attention and MLP.
_T5 = Architecture(
    "t5",
    enclosed=True,
    nested=False,
    embedding="shared",
    stem="encoder.embed_tokens",
    final_norm="",
    head="",
    block="encoder.block.{}",
    attention_norm=None,
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_output="layer.0.SelfAttention.o",
    mlp_norm=None,
    gate=None,
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    heads="num_heads",
    kv_heads="num_heads",
    head_dim="d_kv",
    intermediate_size="d_ff",
    inner=_ENCODER_INNER,
    hands_on=("position_bias", "encoder_decoder_position_bias"),
    second=SecondStack(
        block="decoder.block.{}",
        stem="decoder.embed_tokens",
        norm="encoder.final_layer_norm",
        query="layer.1.EncDecAttention.q",
        key="layer.1.EncDecAttention.k",
        value="layer.1.EncDecAttention.v",
        output="layer.1.EncDecAttention.o",
        blocks="num_decoder_layers",
    ),
    variants=(
        Variant((_GATED,), _mlp("layer.1", gated=True)),
        Variant((_DECODER,), {**_mlp("layer.2", gated=False), "inner": _DECODER_INNER}),
        Variant((_GATED, _DECODER), _mlp("layer.2", gated=True)),
    ),
)

DESCRIPTIONS = (
    _T5,
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
