"""Small random models, for tests and examples."""

from __future__ import annotations

import threading
from typing import Any

import torch
import transformers

from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.surroundings import undisturbed

__all__ = ["tiny_model"]


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
        # Small enough to bend the values that such a model has.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
    }
    usual = transformers.AutoConfig.for_model(model_type)
    known = {name for name in values if hasattr(usual, name)}
    if "num_key_value_heads" in known:
        # Many models honour it although their configs don't have it unless it is given.
        known.add("head_dim")
    values = {name: value for name, value in values.items() if name in known}
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **{**values, **config}),
            dtype=torch.float32,
        )
        one_plus = architecture_of(model.config).norm == "rms_one_plus"
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                base = 1.0 if name.endswith("weight") and not one_plus else 0.0
                torch.nn.init.normal_(parameter, base, 0.3)
            else:
                torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
        model.tie_weights()
    return model.eval().requires_grad_(False)
