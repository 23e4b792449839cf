"""Small random models, for tests and examples."""

from __future__ import annotations

import threading
from typing import Any

import torch
import transformers

from corequant_transformers.architectures.dimensions import of_block
from corequant_transformers.architectures.known import (
    architecture_of,
    is_composite,
    is_enclosed,
)
from corequant_transformers.model.loaders import make_model
from corequant_transformers.model.surroundings import undisturbed

__all__ = ["tiny_model"]


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 48}
_AROUND: dict[str, dict[str, Any]] = {
    "llava": {
        "decoder": "llama",
        "text": {},
        "vision": {"model_type": "clip_vision_model", "projection_dim": 32},
        "own": {"image_token_index": 5},
    },
    "mistral3": {
        "decoder": "mistral",
        "text": {},
        "vision": {"model_type": "pixtral", "head_dim": 16},
        "own": {"image_token_index": 5},
    },
    "gemma3": {
        "decoder": "gemma3_text",
        "text": {},
        "vision": {"model_type": "siglip_vision_model"},
        "own": {"mm_tokens_per_image": 4, "image_token_index": 5},
    },
    "qwen2_5_vl": {
        "decoder": "qwen2_5_vl_text",
        # Its heads have the width that is left for each.
        "text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2]}, "head_dim": None},
        "vision": {**_QWEN, "fullatt_block_indexes": [0]},
        "own": {"image_token_id": 5, "vision_start_token_id": 6},
    },
    "qwen3_vl": {
        "decoder": "qwen3_vl_text",
        "text": {"rope_parameters": _ROPE},
        "vision": {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "own": {"image_token_id": 5, "vision_start_token_id": 6},
    },
}
"""Modules around the decoder of models that read images, by model type."""

_BUILDING = threading.Lock()
"""Transformers draws from torch's own generator, and makes the dtype the process's meanwhile."""


@undisturbed()
def tiny_model(model_type: str, *, seed: int = 0, **config: Any) -> Any:
    """Make a random float32 model of a known architecture, small but with all of its parts.

    Norm gains and biases are random too, so that a forgotten one shows. Where the architecture
    allows it, heads share keys and values in groups of two. Experts are four, of which a token
    visits two. The global generators are left as they were.

    Parameters
    ----------
    model_type : str
        Model type in ``config.json``, such as ``llama``, ``gpt2`` or ``mixtral``.
    seed : int
        Random seed of the weights.
    **config
        Fields of the config to set otherwise.

    Returns
    -------
    transformers.PreTrainedModel

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> cqhf.tiny_model("qwen3").config.hidden_size
    48
    """
    values: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        # Names that some architectures have for the same, and what only some have.
        "n_inner": 96,
        "ffn_dim": 96,
        "word_embed_proj_dim": 48,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_end_index": 1,
        "shared_expert_intermediate_size": 64,
        "shared_intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "num_decoder_layers": 2,
        "d_kv": 16,
        "d_ff": 96,
        "decoder_start_token_id": 0,
        "cls_token_id": None,
        "sep_token_id": None,
        # Small enough to bend the values that such a model has.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
    }
    made = _config(model_type, values, config)
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(made, dtype=torch.float32)
        one_plus = bool(architecture_of(model.config).gain_offset)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                base = 1.0 if name.endswith("weight") and not one_plus else 0.0
                torch.nn.init.normal_(parameter, base, 0.3)
            else:
                torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            # What is added to routers' scores; zeros would hide whether it is kept.
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, 0.0, 0.1)
        model.tie_weights()
    return model.eval().requires_grad_(False)


def _config(model_type: str, values: dict[str, Any], given: dict[str, Any]) -> Any:
    """Return a config with those of the values that it has, and what was given for it."""
    usual = transformers.AutoConfig.for_model(model_type)
    if is_composite(usual):
        around = _AROUND[model_type]
        # Whatever isn't a field of the whole model's config is one of the decoder's.
        own = {k: v for k, v in given.items() if hasattr(usual, k)}
        decoding = {k: v for k, v in given.items() if k not in own}
        kind = decoding.pop("decoder", around["decoder"])
        inner = _config(kind, values, {**around["text"], **decoding})
        return transformers.AutoConfig.for_model(
            model_type,
            text_config=inner.to_dict(),
            vision_config={**_VISION, **around["vision"]},
            **{"tie_word_embeddings": False, **around["own"], **own},
        )
    first = of_block(usual, 0)
    known = {name for name in values if hasattr(first, name) and not _is_computed(usual, name)}
    if "num_key_value_heads" in known:
        # Many models honour it although their configs don't have it unless it is given.
        known.add("head_dim")
    values = {name: value for name, value in values.items() if name in known}
    if is_enclosed(usual):
        # Positions count from the first token that isn't padding.
        values["pad_token_id"] = 0
    return transformers.AutoConfig.for_model(model_type, **{**values, **given})


def _is_computed(config: Any, name: str) -> bool:
    return isinstance(getattr(type(config), name, None), property)
