"""Latent attention: queries, keys and values computed from narrow latent vectors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Latent"]


@dataclass(frozen=True)
class Latent:
    """Latent attention, as in DeepSeek-V2 and V3.

    One projection of the stream gives a latent vector and the part of the keys that all heads
    share; the latent's norm is read by a projection whose rows are, head by head, the rest of the
    key and the value. Queries are made in the same way, or by one projection. Sizes are
    expressions.

    Attributes
    ----------
    query_down, query_norm, query_up : str, optional
        Paths in a block; without them the architecture's query reads the stream.
    down, norm, up : str
        The same for keys and values.
    query_rank, rank : str
        Channels of the latents.
    shared_key, own_key, value : str
        Channels of a key that all heads share, and of a head's own key and value.
    """

    query_down: str | None = "self_attn.q_a_proj"
    query_norm: str | None = "self_attn.q_a_layernorm"
    query_up: str | None = "self_attn.q_b_proj"
    down: str = "self_attn.kv_a_proj_with_mqa"
    norm: str = "self_attn.kv_a_layernorm"
    up: str = "self_attn.kv_b_proj"
    query_rank: str = "q_lora_rank"
    rank: str = "kv_lora_rank"
    shared_key: str = "qk_rope_head_dim"
    own_key: str = "qk_nope_head_dim"
    value: str = "v_head_dim"
