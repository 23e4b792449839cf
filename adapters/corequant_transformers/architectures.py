"""Architectures, each declared by where its parts are: writers and readers of the residual stream.

A description is all that the rest of the package knows about a model. It says which module embeds
tokens, which norms stand before which linear layers, and which of these write to the residual
stream, so that norms can be folded and rotations merged. Register another with ``register``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corequant.errors import ArchitectureError

__all__ = ["Architecture", "Dimensions", "architecture_of", "dimensions_of", "register"]


@dataclass(frozen=True)
class Architecture:
    """A decoder of blocks with RMSNorm, rotary attention and a gated MLP.

    Attributes
    ----------
    model_type : str
        As in the model's ``config.json``.
    embedding, final_norm, head : str
        Module paths; the head reads what the final norm gives.
    block : str
        Path of decoder block i, with ``{}`` for i. The paths below start there.
    attention_norm, query, key, value, attention_output : str
        The norm that query, key and value read; the output projection writes the residual.
    mlp_norm, gate, up, down : str
        The norm that gate and up read; down reads ``act(gate) * up`` and writes the residual.
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    block: str = "model.layers.{}"
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model, read from its config.

    Attributes
    ----------
    blocks, hidden, intermediate, heads, kv_heads, head_dim, vocabulary : int
        Decoder blocks, residual width, MLP width, query heads, key and value heads, channels per
        head, tokens of the vocabulary.
    tied : bool
        Whether embedding and head share one matrix.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool


_KNOWN = {name: Architecture(name) for name in ("llama", "mistral", "qwen2", "qwen3")}


def register(architecture: Architecture) -> None:
    """Make an architecture known under its model type, replacing an earlier one."""
    if not isinstance(architecture, Architecture):
        got = type(architecture).__name__
        raise TypeError(f"architecture must be an Architecture, got {got}")
    _KNOWN[architecture.model_type] = architecture


def architecture_of(config: Any) -> Architecture:
    """Return the description for a Transformers config.

    Raises
    ------
    ArchitectureError
        If the model type is unknown; the message says what would have to be described.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _KNOWN:
        raise ArchitectureError(
            f"model_type must be one of {', '.join(sorted(_KNOWN))}, got {kind!r}; to describe "
            "another, call corequant_transformers.register(Architecture(...)) with the paths of "
            "its embedding, final norm and head, and in each block of the norms, of query, key, "
            "value and output projections, and of the MLP's gate, up and down projections"
        )
    return _KNOWN[kind]


def dimensions_of(config: Any) -> Dimensions:
    """Read the sizes from a Transformers config.

    Raises
    ------
    ArchitectureError
        If one is missing, not positive or contradicts another.
    """
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ArchitectureError(
            f"num_key_value_heads must divide num_attention_heads={heads}, got {kv_heads}"
        )
    return Dimensions(
        blocks=_positive(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", hidden // heads),
        vocabulary=_positive(config, "vocab_size"),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def _positive(config: Any, name: str, default: int | None = None) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArchitectureError(f"the config's {name} must be a positive integer, got {value!r}")
    return value
