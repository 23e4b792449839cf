"""Descriptions of architectures: writers and readers of the residual stream.

A description is all that the rest of the package knows about a model. It says which modules embed
tokens, which norms stand before which linear layers, and which of these write to the residual
stream, so that norms can be folded and rotations merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.experts import Experts
from corequant_transformers.architectures.latent import Latent
from corequant_transformers.architectures.mixer import Mixer
from corequant_transformers.architectures.second import SecondStack
from corequant_transformers.architectures.serialization import (
    FIELDS_OF,
    from_plain,
    from_toml,
    to_plain,
    to_toml,
)
from corequant_transformers.architectures.where import Where, holds
from corequant_transformers.architectures.writer import Writer

__all__ = ["NORMS", "Architecture", "Experts", "Variant"]

NORMS = ("rms", "rms_one_plus", "rms_plain", "layer", "layer_one_plus", "layer_plain")
"""Kinds of norm: RMSNorm with gain w, with gain 1 + w, without a gain; the same three of LayerNorm,
which subtracts the mean, with a bias or not."""


@dataclass(frozen=True)
class Variant:
    """Differences in some configs or in some decoder blocks.

    Attributes
    ----------
    where : tuple of Where
        It holds where all of them do.
    changes : mapping of str to values
        Fields of ``Architecture`` and what they are there. Conditions on blocks change the fields
        that are about a block.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> parallel = cqhf.Variant(
    ...     (cqhf.Where("use_parallel_residual", "equals", (True,)),),
    ...     {"mlp_norm": "input_layernorm"})
    """

    where: tuple[Where, ...]
    changes: Mapping[str, Any] = field(metadata={FIELDS_OF: lambda: Architecture})

    def __hash__(self) -> int:
        """Hash by the conditions; changes compare equal or not."""
        return hash((self.where, *sorted(self.changes)))


@dataclass(frozen=True)
class Architecture:
    """A decoder whose blocks add attention and an MLP to a residual stream.

    Defaults are those of Llama. Projections that are stored as one matrix have the same path; its
    rows are query, key, value and gate, up in that order. Attention and MLP come one after the
    other, or both read what enters the block.

    Attributes
    ----------
    model_type : str
        Model type in ``config.json``.
    embedding, final_norm, head : str
        Module paths; the head reads what the final norm gives.
    embedding_norm : str, optional
        A norm of the same kind between the embedding and the first block.
    positions : str, optional
        A second embedding, of learned positions, that is added to the first.
    extra_positions : int
        Rows that it has beyond the config's ``max_position_embeddings``.
    reserved_positions : int
        Rows that no token of a text without padding uses.
    block : str
        Path of decoder block i, with ``{}`` for i. The paths below start there.
    norm : str
        Kind of all norms of the residual stream, one of ``NORMS``.
    norm_eps : float, optional
        Epsilon of the norms, if their modules have neither ``eps`` nor ``variance_epsilon``.
    attention_norm : str, optional
        The norm that query, key and value read; None if they read the stream itself.
    query, key, value, attention_output : str
        The output projection writes the residual; it is None in a block without attention. Value is
        None where values are what key gives; they are not rotated then.
    latent : Latent, optional
        Latent attention, which replaces ``key`` and ``value``, and ``query`` if it has one.
    query_gate : bool
        Whether query has as many rows again, which gate the output of attention.
    qkv_order : tuple of str
        Order of query, key and value in one matrix.
    qkv_groups : str
        Expression of the number of groups that the rows of one matrix with query, key and value are
        stored in, each group having its share of all three in that order; ``1`` where all queries
        come first.
    linear_values : bool
        Whether attention is linear in its values up to the output projection: nothing clips them,
        and no gate stands between. Otherwise they are not rotated.
    attention_inner_norm : str, optional
        An RMSNorm of all heads' channels that the output projection reads.
    attention_post_norm : str, optional
        An RMSNorm between the output projection and the residual.
    mlp_norm : str, optional
        The norm that gate and up, or router and experts, read; None as above. Where it is
        ``attention_norm``, both read one norm.
    gate : str, optional
        None for an MLP without a gate, where down reads ``act(up)``.
    up, down : str
        With a gate, down reads ``act(gate) * up``; it writes the residual, and is None in a block
        without an MLP.
    mlp_inner_norm : str, optional
        An RMSNorm that down reads.
    mlp_post_norm : str, optional
        An RMSNorm between down and the residual.
    residual_normed : bool
        Whether parts add to what their norm gives, rather than to what it reads.
    mixers : tuple of Mixer
        Parts that come before attention, or take its place.
    experts : Experts, optional
        Description of a model's routed experts.
    transposed : bool
        Whether linear layers are stored (in_features, out_features), as GPT-2's ``Conv1D``.
    linear_classes : tuple of str
        Transformers' own classes of linear layers, if they compute what ``torch.nn.Linear`` does
        in another way.
    inner : tuple of str
        Modules or parameters of a block that no merge touches, such as norms of queries and keys.
    heads, kv_heads, head_dim, intermediate_size : str
        Expressions of query heads, key and value heads, channels of a head, and the MLP's width.
        Where the config lacks the field that one of the first three names, it has as many key and
        value heads as query heads, and heads share the hidden size.
    usual_expansion : int, optional
        Width as a multiple of the hidden size where a config leaves that field open.
    requires : tuple of (str, value)
        Fields of the config, or of a config in it as ``attn_config.clip_qkv``, that must have a
        value for the description to hold; a string is the name of a field that must be equal.
    enclosed : bool
        Whether everything around the blocks stays as it is, and only what happens inside a block
        is described, as of encoders. The residual stream is left alone then. Final norm and head
        are empty, and the paths start at the model without a head.
    nested : bool
        Whether an enclosed model with a head has the one without it as a module.
    trunk : str
        Path of an enclosed model without its head.
    stem : str
        Path of the module whose output is the input of an enclosed model's first block.
    second : SecondStack, optional
        Further blocks, which also read the output of the described ones, such as a decoder after
        an encoder.
    hands_on : tuple of str
        Arguments of a block that the block before it returns after hidden states, in order. The
        first block makes them.
    outside : tuple of str
        Modules outside of the decoder that are left unchanged, such as a vision tower.
    writers : tuple of Writer
        Parameters in them whose products are added to the residual stream.
    variants : tuple of Variant
        Differences in some configs or some blocks; of two that hold, the later one counts.

    Notes
    -----
    An expression is a field of the config, a number, or several of them with ``+``, ``-``, ``*``
    and ``//``.

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
    embedding_norm: str | None = None
    positions: str | None = None
    extra_positions: int = 0
    reserved_positions: int = 0
    block: str = "model.layers.{}"
    norm: str = "rms"
    norm_eps: float | None = None
    attention_norm: str | None = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    attention_output: str | None = "self_attn.o_proj"
    latent: Latent | None = None
    query_gate: bool = False
    qkv_order: tuple[str, ...] = ("query", "key", "value")
    qkv_groups: str = "1"
    linear_values: bool = True
    attention_inner_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str | None = "mlp.down_proj"
    mlp_inner_norm: str | None = None
    mlp_post_norm: str | None = None
    residual_normed: bool = False
    mixers: tuple[Mixer, ...] = ()
    experts: Experts | None = None
    transposed: bool = False
    linear_classes: tuple[str, ...] = ()
    inner: tuple[str, ...] = ("self_attn.q_norm", "self_attn.k_norm")
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    intermediate_size: str = "intermediate_size"
    usual_expansion: int | None = None
    requires: tuple[tuple[str, Any], ...] = ()
    enclosed: bool = False
    nested: bool = True
    trunk: str = ""
    stem: str = ""
    second: SecondStack | None = None
    hands_on: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    writers: tuple[Writer, ...] = ()
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        """Refuse contradictory fields."""
        if self.norm not in NORMS:
            raise ArchitectureError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if "{}" not in self.block:
            raise ArchitectureError(f"block must hold {{}} for the index, got {self.block!r}")
        if sorted(self.qkv_order) != ["key", "query", "value"]:
            raise ArchitectureError(
                f"qkv_order must name query, key and value once each, got {self.qkv_order!r}"
            )
        if self.subtracts_mean and self.post_norms:
            raise ArchitectureError(
                "a LayerNorm between a writer and the residual can't be centered: "
                f"attention_post_norm and mlp_post_norm must be RMSNorms, got norm={self.norm!r}"
            )
        if self.subtracts_mean and None in self._read_norms:
            raise ArchitectureError(
                f"with norm={self.norm!r}, the residual is centered, so attention_norm and "
                "mlp_norm must read it first, got None"
            )
        fields = {field.name for field in dataclasses.fields(self)} - {"model_type", "variants"}
        for variant in self.variants:
            unknown = sorted(set(variant.changes) - fields)
            if unknown:
                raise ArchitectureError(
                    f"a variant must change fields of an architecture, got {', '.join(unknown)}"
                )

    @property
    def subtracts_mean(self) -> bool:
        """Whether the norms subtract the mean over the channels."""
        return self.norm.startswith("layer")

    @property
    def gain_offset(self) -> float:
        """Addition to a norm's weight that gives its gain."""
        return 1.0 if self.norm.endswith("one_plus") else 0.0

    @property
    def has_gains(self) -> bool:
        """Whether the norms have weights."""
        return not self.norm.endswith("plain")

    def resolved(self, config: Any) -> Architecture:
        """Return the description resolved for a config, except what depends on the block.

        Parameters
        ----------
        config : transformers.PreTrainedConfig

        Raises
        ------
        ArchitectureError
            If what a variant changes contradicts the rest.
        """
        if not self.variants:
            return self
        found = self
        later = []
        for variant in self.variants:
            if any(each.by_block for each in variant.where):
                later.append(variant)
            elif holds(variant.where, config, 0):
                found = replace(found, **variant.changes)
        return replace(found, variants=tuple(later))

    def in_block(self, config: Any, block: int) -> Architecture:
        """Return the description resolved for a decoder block of a config.

        Parameters
        ----------
        config : transformers.PreTrainedConfig
        block : int
        """
        found = self
        for variant in self.variants:
            if holds(variant.where, config, block):
                found = replace(found, **variant.changes)
        return replace(found, variants=()) if self.variants else self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the fields that aren't Llama's, None as ``"none"``."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Build a description from plain values; an unknown or wrong field is an error."""
        return from_plain(cls, values)

    def to_toml(self, *, whole: bool = False) -> str:
        """Write the description as TOML, ``whole`` with the fields that are Llama's."""
        return to_toml(self, whole=whole)

    @classmethod
    def from_toml(cls, text: str) -> Architecture:
        """Read what ``to_toml`` writes; anything else is an ArchitectureError."""
        return from_toml(cls, text)

    def block_path(self, block: int) -> str:
        """Return the path of a block, in a description that was resolved for a config."""
        second = self.second
        if second is not None and block >= second.first:
            return second.block.format(block - second.first)
        return self.block.format(block)

    def block_index(self, name: str) -> int | None:
        """Return the index of the block that a parameter or module belongs to, by its name.

        Examples
        --------
        >>> import corequant_transformers as cqhf
        >>> cqhf.Architecture("llama").block_index("model.layers.3.mlp.up_proj.weight")
        3
        """
        stacks = [(self.block, 0)]
        if self.second is not None:
            stacks.append((self.second.block, self.second.first))
        for path, first in stacks:
            before, after = path.split("{}")
            if name.startswith(before):
                index, _, _ = name.removeprefix(before).removesuffix(after).partition(".")
                if index.isdigit():
                    return first + int(index)
        return None

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a block whose channels are those of the residual stream."""
        found = (*self._read_norms, *self.post_norms)
        return tuple(dict.fromkeys(n for n in found if n is not None))

    @property
    def _read_norms(self) -> tuple[str | None, ...]:
        """The norms that parts read; None for one that reads the stream itself."""
        attention = () if self.attention_output is None else (self.attention_norm,)
        mlp = () if self.down is None and self.experts is None else (self.mlp_norm,)
        return (*attention, *mlp, *(mixer.norm for mixer in self.mixers))

    @property
    def untouched(self) -> tuple[str, ...]:
        """The modules and parameters of a block that nothing is done to."""
        return (*self.inner, *(name for mixer in self.mixers for name in mixer.inner))

    @property
    def merges(self) -> bool:
        """Whether a rotation of the residual stream can be merged."""
        return not self.post_norms and not self.residual_normed

    @property
    def post_norms(self) -> tuple[str, ...]:
        """The norms between writers and residual."""
        return tuple(n for n in (self.attention_post_norm, self.mlp_post_norm) if n is not None)
