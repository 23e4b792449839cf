"""Sizes of a model, read from its config with the names that its description gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.known import architecture_of, decoder_config

__all__ = ["MOST_BLOCKS", "Dimensions", "dimensions_of"]

MOST_BLOCKS = 4096
"""Decoder blocks of a config that is believed; published models have some hundred at most."""

_MOST_WIDE = 2**24
_MOST_EXPERTS = 2**16
"""In all blocks together."""


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
    positions : int
        Rows of the embedding of positions; 0 without one.
    experts, experts_chosen, expert_intermediate : int
        Experts in a sparse block, how many of them a token visits, their width; 0 without any.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int = 0
    experts: int = 0
    experts_chosen: int = 0
    expert_intermediate: int = 0


def dimensions_of(config: Any) -> Dimensions:
    """Read the sizes from a Transformers config.

    Raises
    ------
    ArchitectureError
        If one is missing, not positive or contradicts another.
    """
    architecture = architecture_of(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    config = decoder_config(config)
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ArchitectureError(
            f"num_key_value_heads must divide num_attention_heads={heads}, got {kv_heads}"
        )
    blocks = _positive(config, "num_hidden_layers", most=MOST_BLOCKS)
    expansion, experts = architecture.usual_expansion, architecture.experts
    usual = expansion * hidden if expansion is not None else None
    return Dimensions(
        blocks=blocks,
        hidden=hidden,
        intermediate=_positive(config, architecture.intermediate_size, usual),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", hidden // heads),
        vocabulary=_positive(config, "vocab_size"),
        tied=tied,
        positions=(
            _positive(config, "max_position_embeddings") + architecture.extra_positions
            if architecture.positions is not None
            else 0
        ),
        experts=(_positive(config, experts.count, most=_MOST_EXPERTS // blocks) if experts else 0),
        experts_chosen=_positive(config, experts.chosen) if experts else 0,
        expert_intermediate=_positive(config, experts.intermediate_size) if experts else 0,
    )


def _positive(config: Any, name: str, default: int | None = None, most: int = _MOST_WIDE) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = repr(value)[:80]
        raise ArchitectureError(f"the config's {name} must be a positive integer, got {got}")
    if value > most:
        raise ArchitectureError(
            f"the config's {name} must be at most {most}, got {str(value)[:40]}"
        )
    return value
