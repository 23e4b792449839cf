"""LFM2: short convolutions in place of most attentions."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.mixer import Mixer
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]

_CONVOLUTION = Mixer(
    "operator_norm",
    readers=(("conv.in_proj", "3 * hidden_size"),),
    writers=(("conv.out_proj", "hidden_size"),),
    inner=("conv.conv",),
)
_ADJUSTED = (
    "(2 * intermediate_size // 3 + block_multiple_of - 1) // block_multiple_of * block_multiple_of"
)

DESCRIPTIONS = (
    Architecture(
        "lfm2",
        final_norm="model.embedding_norm",
        attention_norm="operator_norm",
        attention_output="self_attn.out_proj",
        mlp_norm="ffn_norm",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        variants=(
            Variant(
                (Where("block_auto_adjust_ff_dim", "equals", (True,)),),
                {"intermediate_size": _ADJUSTED},
            ),
            Variant(
                (Where("layer_types", "names", ("conv",)),),
                {"attention_output": None, "mixers": (_CONVOLUTION,)},
            ),
        ),
    ),
)
