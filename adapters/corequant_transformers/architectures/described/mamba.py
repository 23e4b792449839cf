"""State spaces: Mamba 2 alone, Falcon-H1, Granite and Nemotron with attention."""

from __future__ import annotations

from corequant_transformers.architectures.description import Architecture, Variant
from corequant_transformers.architectures.mixer import Mixer
from corequant_transformers.architectures.where import Where

__all__ = ["DESCRIPTIONS"]


def _mamba(path: str, norm: str, width: str, states: str, heads: str) -> Mixer:
    return Mixer(
        norm,
        # A gate, what the states are made of, and a time step for each head.
        readers=((f"{path}.in_proj", f"2 * ({width}) + 2 * {states} + {heads}"),),
        writers=((f"{path}.out_proj", width),),
        inner=tuple(f"{path}.{name}" for name in ("conv1d", "norm", "A_log", "D", "dt_bias")),
    )


_GRANITE = _mamba(
    "mamba",
    "input_layernorm",
    "mamba_expand * hidden_size",
    "mamba_n_groups * mamba_d_state",
    "mamba_n_heads",
)
_NEMOTRON = _mamba(
    "mixer",
    "norm",
    "mamba_num_heads * mamba_head_dim",
    "n_groups * ssm_state_size",
    "mamba_num_heads",
)

DESCRIPTIONS = (
    Architecture(
        "mamba2",
        embedding="backbone.embeddings",
        final_norm="backbone.norm_f",
        block="backbone.layers.{}",
        attention_output=None,
        down=None,
        mixers=(
            _mamba("mixer", "norm", "expand * hidden_size", "n_groups * state_size", "num_heads"),
        ),
    ),
    Architecture(
        "falcon_h1",
        final_norm="model.final_layernorm",
        mlp_norm="pre_ff_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
        mixers=(
            _mamba(
                "mamba",
                "input_layernorm",
                "mamba_n_heads * mamba_d_head",
                "mamba_n_groups * mamba_d_state",
                "mamba_n_heads",
            ),
        ),
    ),
    Architecture(
        "granitemoehybrid",
        gate="shared_mlp.input_linear",
        up="shared_mlp.input_linear",
        down="shared_mlp.output_linear",
        intermediate_size="shared_intermediate_size",
        requires=(("num_local_experts", 0),),
        variants=(
            Variant(
                (Where("layer_types", "names", ("linear_attention",)),),
                {"attention_output": None, "mixers": (_GRANITE,)},
            ),
        ),
    ),
    Architecture(
        "nemotron_h",
        embedding="model.embeddings",
        final_norm="model.norm_f",
        attention_norm="norm",
        query="mixer.q_proj",
        key="mixer.k_proj",
        value="mixer.v_proj",
        attention_output="mixer.o_proj",
        mlp_norm="norm",
        gate=None,
        up="mixer.up_proj",
        down="mixer.down_proj",
        variants=(
            Variant(
                (Where("layers_block_type", "names", ("linear_attention",)),),
                {"attention_output": None, "down": None, "mixers": (_NEMOTRON,)},
            ),
            Variant((Where("layers_block_type", "names", ("full_attention",)),), {"down": None}),
            Variant((Where("layers_block_type", "names", ("mlp",)),), {"attention_output": None}),
        ),
    ),
)
