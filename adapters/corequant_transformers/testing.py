"""Small random models, for tests and examples."""

from __future__ import annotations

from typing import Any

import torch
import transformers

__all__ = ["tiny_model"]


def tiny_model(model_type: str, *, seed: int = 0, **config: Any) -> Any:
    """Make a random float32 model of a known architecture, small but with all of its parts.

    Norm gains and biases are random too, so that a forgotten one shows. Heads share keys and
    values in groups of two. The global generators are left as they were.

    Parameters
    ----------
    model_type : str
        As in ``config.json``, such as ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
    seed : int
        Of the weights.
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
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **{**values, **config}),
            dtype=torch.float32,
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                base = 1.0 if name.endswith("weight") else 0.0
                torch.nn.init.normal_(parameter, base, 0.3)
            else:
                torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
        model.tie_weights()
    return model.eval().requires_grad_(False)
