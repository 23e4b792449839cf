"""Architectures, each declared by where its parts are: writers and readers of the residual stream.

A description is all that the rest of the package knows about a model. It says which modules embed
tokens, which norms stand before which linear layers, and which of these write to the residual
stream, so that norms can be folded and rotations merged. Register another with ``register``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from corequant.errors import ArchitectureError

__all__ = [
    "MOST_BLOCKS",
    "NORMS",
    "Architecture",
    "Dimensions",
    "Experts",
    "UnknownArchitectureError",
    "architecture_of",
    "dimensions_of",
    "register",
]

MOST_BLOCKS = 4096
"""Decoder blocks of a config that is believed; published models have some hundred at most."""

_MOST_WIDE = 2**24
_MOST_EXPERTS = 2**16
"""In all blocks together."""

NORMS = ("rms", "rms_one_plus", "layer")
"""Kinds of norm: RMSNorm with gain w, RMSNorm with gain 1 + w, LayerNorm with gain and bias."""


class UnknownArchitectureError(ArchitectureError):
    """A model type without a description."""


@dataclass(frozen=True)
class Experts:
    """An MLP of routed experts, each with a gate.

    Transformers keeps the experts' weights in two parameters with three axes. They are split into
    a linear layer for each matrix, ``{path}.{expert}.{gate}`` and so on, before anything is done.

    Attributes
    ----------
    path, router : str
        In a decoder block: the experts, and the layer that scores them, which reads the same norm.
    gate, up, down : str
        Names that the layers of one expert are given, or have where they are not fused.
    fused_gate_up, fused_down : str
        The parameters (experts, 2·intermediate, hidden), gate first, and (experts, hidden,
        intermediate).
    count, chosen, intermediate_size : str
        Fields of the config: experts, experts per token, width of one.
    is_sparse : callable, optional
        Called with the config and a block's index, says whether that block has experts; one that
        has none has the MLP of the architecture. None means that all have.
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = "gate_up_proj"
    fused_down: str = "down_proj"
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    intermediate_size: str = "moe_intermediate_size"
    is_sparse: Callable[[Any, int], bool] | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder whose blocks add attention and an MLP to a residual stream, one after the other.

    Defaults are those of Llama. Projections that are stored as one matrix have the same path; its
    rows are query, key, value and gate, up in that order.

    Attributes
    ----------
    model_type : str
        Model type in ``config.json``.
    embedding, final_norm, head : str
        Module paths; the head reads what the final norm gives.
    positions : str, optional
        A second embedding, of learned positions, that is added to the first.
    extra_positions : int
        Rows that it has beyond the config's ``max_position_embeddings``.
    block : str
        Path of decoder block i, with ``{}`` for i. The paths below start there.
    norm : str
        Kind of all norms, one of ``NORMS``.
    attention_norm : str, optional
        The norm that query, key and value read; None if they read the stream itself.
    query, key, value, attention_output : str
        The output projection writes the residual.
    attention_post_norm : str, optional
        An RMSNorm between the output projection and the residual.
    mlp_norm : str, optional
        The norm that gate and up, or router and experts, read; None as above.
    gate : str, optional
        None for an MLP without a gate, where down reads ``act(up)``.
    up, down : str
        With a gate, down reads ``act(gate) * up``; it writes the residual.
    mlp_post_norm : str, optional
        An RMSNorm between down and the residual.
    experts : Experts, optional
        Description of a model's routed experts.
    transposed : bool
        Whether linear layers are stored (in_features, out_features), as GPT-2's ``Conv1D``.
    inner : tuple of str
        Modules of a block that no merge touches, such as norms of queries and keys.
    intermediate_size : str
        The config's field with the MLP's width.
    usual_expansion : int, optional
        Width as a multiple of the hidden size where a config leaves that field open.
    requires : tuple of (str, value)
        Fields of the config that must have a value for the description to hold; a string is the
        name of a field that must be equal.

    Raises
    ------
    ArchitectureError
        If a field contradicts another.

    Examples
    --------
    StarCoder2 has LayerNorms and an MLP without a gate, and is like Llama otherwise:

    >>> import corequant_transformers as cqhf
    >>> starcoder2 = cqhf.Architecture(
    ...     "starcoder2", norm="layer", gate=None, up="mlp.c_fc", down="mlp.c_proj")
    >>> starcoder2.query
    'self_attn.q_proj'
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    positions: str | None = None
    extra_positions: int = 0
    block: str = "model.layers.{}"
    norm: str = "rms"
    attention_norm: str | None = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_post_norm: str | None = None
    experts: Experts | None = None
    transposed: bool = False
    inner: tuple[str, ...] = ("self_attn.q_norm", "self_attn.k_norm")
    intermediate_size: str = "intermediate_size"
    usual_expansion: int | None = None
    requires: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.norm not in NORMS:
            raise ArchitectureError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if "{}" not in self.block:
            raise ArchitectureError(f"block must hold {{}} for the index, got {self.block!r}")
        if self.norm == "layer" and (self.attention_post_norm or self.mlp_post_norm):
            raise ArchitectureError(
                "a LayerNorm between a writer and the residual can't be centered: "
                f"attention_post_norm and mlp_post_norm must be RMSNorms, got norm={self.norm!r}"
            )
        if self.norm == "layer" and None in (self.attention_norm, self.mlp_norm):
            raise ArchitectureError(
                "with norm='layer', the residual is centered, so attention_norm and mlp_norm must "
                "read it first, got None"
            )

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a block whose channels are those of the residual stream."""
        before = (self.attention_norm, self.mlp_norm)
        return tuple(n for n in (*before, *self.post_norms) if n is not None)

    @property
    def post_norms(self) -> tuple[str, ...]:
        """The norms between writers and residual."""
        return tuple(n for n in (self.attention_post_norm, self.mlp_post_norm) if n is not None)


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


def _is_sparse_qwen3_moe(config: Any, block: int) -> bool:
    dense = block in (config.mlp_only_layers or ())
    return not dense and (block + 1) % _positive(config, "decoder_sparse_step") == 0


_GEMMA2 = Architecture(
    "gemma2",
    norm="rms_one_plus",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

_DESCRIBED = (
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture(
        "phi3",
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    Architecture("gemma", norm="rms_one_plus"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text"),
    Architecture(
        "olmo2",
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    ),
    Architecture(
        "gpt2",
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        block="transformer.h.{}",
        norm="layer",
        attention_norm="ln_1",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        attention_output="attn.c_proj",
        mlp_norm="ln_2",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
        intermediate_size="n_inner",
        usual_expansion=4,
        requires=(("add_cross_attention", False),),
    ),
    Architecture(
        "opt",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        extra_positions=2,
        final_norm="model.decoder.final_layer_norm",
        block="model.decoder.layers.{}",
        norm="layer",
        attention_norm="self_attn_layer_norm",
        attention_output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        gate=None,
        up="fc1",
        down="fc2",
        intermediate_size="ffn_dim",
        requires=(
            ("do_layer_norm_before", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
            ("word_embed_proj_dim", "hidden_size"),
        ),
    ),
    Architecture(
        "mixtral",
        experts=Experts(count="num_local_experts", intermediate_size="intermediate_size"),
    ),
    Architecture(
        "qwen3_moe",
        experts=Experts(is_sparse=_is_sparse_qwen3_moe),
    ),
)

_KNOWN = {architecture.model_type: architecture for architecture in _DESCRIBED}


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
        If the model type is unknown, or the config asks for something that its description
        doesn't cover; the message says what would have to be described.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _KNOWN:
        raise UnknownArchitectureError(
            f"model_type must be one of {', '.join(sorted(_KNOWN))}, got {kind!r}; to describe "
            "another, call corequant_transformers.register(Architecture(...)) with the paths of "
            "its embedding, final norm and head, in each block of the norms, of query, key, "
            "value and output projections, and of the MLP's gate, up and down projections or its "
            "experts, as far as they differ from Llama's"
        )
    architecture = _KNOWN[kind]
    for name, wanted in architecture.requires:
        found = getattr(config, name, None)
        value = getattr(config, wanted) if isinstance(wanted, str) else wanted
        if found != value:
            other = f"{wanted}={value!r}" if isinstance(wanted, str) else repr(value)
            raise ArchitectureError(
                f"the description of {kind!r} holds for configs whose {name} is {other}, "
                f"got {found!r}"
            )
    return architecture


def dimensions_of(config: Any) -> Dimensions:
    """Read the sizes from a Transformers config.

    Raises
    ------
    ArchitectureError
        If one is missing, not positive or contradicts another.
    """
    architecture = architecture_of(config)
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
        tied=bool(getattr(config, "tie_word_embeddings", False)),
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
