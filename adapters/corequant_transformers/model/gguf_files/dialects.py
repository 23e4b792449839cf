"""llama.cpp's names of model types, and the differences between its files and Transformers' own.

A dialect is all that reading and writing GGUF files knows about a model type besides its
description: the name of llama.cpp's architecture, which fields of the config a file has, in which
order the rows of queries and keys are, and what llama.cpp takes for granted, so that a config with
another value is refused. Names of tensors are those of the gguf package.

Source: conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from corequant.errors import ArchitectureError

__all__ = ["DIALECTS", "Dialect", "Field", "dialect_named", "dialect_of", "head_dim_of"]


_WITH_BIAS = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_ALL_LAYERS = ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
_LAYER_NORMS = ("attn_norm", "ffn_norm", "output_norm")


@dataclass(frozen=True)
class Field:
    """A number that a file and a config both have.

    Attributes
    ----------
    key : str
        In the file, after the architecture's name.
    attribute : str
        Name of the config's attribute.
    kind : type
        int, float or bool.
    needed : bool
        Whether llama.cpp has a value of its own where the file has none.
    """

    key: str
    attribute: str
    kind: type = int
    needed: bool = False


@dataclass(frozen=True)
class Fixed:
    """A field of the config that has one value in llama.cpp.

    Attributes
    ----------
    attribute : str
    wanted : callable
        Called with the config, gives the value.
    words : str
        What llama.cpp does.
    """

    attribute: str
    wanted: Callable[[Any], Any]
    words: str


@dataclass(frozen=True)
class Dialect:
    """A model type in GGUF files; defaults are Llama's, without its order of rows.

    Attributes
    ----------
    model_type, name : str
        Transformers' name and llama.cpp's.
    permuted : bool
        Whether llama.cpp turns neighbouring channels of queries and keys against each other where
        Transformers turns the first half of a head against the second, so that rows are reordered.
    epsilon : Field
        What is added to a norm's mean square, or variance.
    fields : tuple of Field
        Numbers beyond those that all have.
    activation : str
        Activation function of the MLP, by Transformers' name.
    windows : int or str
        Sliding windows: 0 if llama.cpp has none for this architecture, n if the last of n
        consecutive blocks attends to everything and the others to a window, "listed" if the file
        says which do.
    fixed : tuple of Fixed
    tied : bool
        Whether there is no place for a head of its own.
    divided : bool
        Whether files may have divisors of the rotary frequencies, as Llama 3's are.
    experts : bool
        Whether an MLP is routed experts.
    biases : tuple of str
        What may have a bias beyond queries, keys and values, by llama.cpp's names.
    """

    model_type: str
    name: str
    permuted: bool = False
    epsilon: Field = Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", float)
    fields: tuple[Field, ...] = ()
    activation: str = "silu"
    windows: int | str = 0
    fixed: tuple[Fixed, ...] = ()
    tied: bool = False
    divided: bool = False
    experts: bool = False
    biases: tuple[str, ...] = ()

    def takes_bias(self, tensor: str) -> bool:
        """Return whether llama.cpp reads a bias of that name."""
        module = tensor.removesuffix(".bias").rpartition(".")[2]
        return module in (*_WITH_BIAS, *self.biases)


def head_dim_of(config: Any) -> int:
    """Return the channels of a head."""
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _none(attribute: str, what: str) -> Fixed:
    return Fixed(attribute, lambda config: False, f"reads no {what}")


def _cap(name: str, *, needed: bool = False) -> Field:
    return Field(f"{name}_logit_softcapping", f"{name}_logit_softcapping", float, needed)


def _query_scale(deepest: int) -> Fixed:
    """Return the divisor of Gemma's queries; the largest model, known by its depth, has its own."""

    def wanted(config: Any) -> int:
        largest = config.num_hidden_layers == deepest
        return int(
            config.hidden_size // config.num_attention_heads if largest else head_dim_of(config)
        )

    return Fixed("query_pre_attn_scalar", wanted, "divides queries by the root of that")


_LAYER_NORM = Field("attention.layer_norm_epsilon", "layer_norm_eps", float)
_SCALES = (
    Field("attention.scale", "attention_multiplier", float, needed=True),
    Field("embedding_scale", "embedding_multiplier", float, needed=True),
    Field("residual_scale", "residual_multiplier", float, needed=True),
    Field("logit_scale", "logits_scaling", float, needed=True),
)
_BARE = Dialect("llama", "llama", permuted=True, divided=True)
_LLAMA = replace(_BARE, biases=_ALL_LAYERS)
_QWEN3 = Dialect("qwen3", "qwen3", fixed=(_none("attention_bias", "biases of attention"),))
_GEMMA = Dialect("gemma", "gemma", activation="gelu_pytorch_tanh", tied=True)
_SHARES = Fixed(
    "norm_topk_prob", lambda config: True, "makes the shares of a token's experts sum to 1"
)
_EVERY_FOURTH = Fixed(
    "no_rope_layers",
    lambda config: [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)],
    "leaves out the rotary embedding of every fourth block",
)

DIALECTS = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral"),
    replace(_LLAMA, model_type="ministral"),
    replace(_BARE, model_type="smollm3", name="smollm3", divided=False, fixed=(_EVERY_FOURTH,)),
    replace(_BARE, model_type="arcee", name="arcee", activation="relu2"),
    replace(_LLAMA, model_type="granite", name="granite", fields=_SCALES),
    replace(_BARE, model_type="mixtral", experts=True),
    Dialect("qwen2", "qwen2"),
    _QWEN3,
    replace(
        _QWEN3,
        model_type="qwen3_moe",
        name="qwen3moe",
        experts=True,
        fixed=(*_QWEN3.fixed, _SHARES),
    ),
    Dialect("ernie4_5", "ernie4_5", biases=("attn_output",)),
    Dialect("seed_oss", "seed_oss"),
    Dialect("hunyuan_v1_dense", "hunyuan-dense"),
    Dialect("phi3", "phi3"),
    Dialect("glm", "chatglm"),
    Dialect("glm4", "glm4"),
    Dialect("olmo2", "olmo2"),
    Dialect("olmo3", "olmo2", windows="listed"),
    Dialect("exaone4", "exaone4", divided=True),
    _GEMMA,
    replace(
        _GEMMA,
        model_type="gemma2",
        name="gemma2",
        fields=(_cap("attn", needed=True), _cap("final", needed=True)),
        windows=2,
        fixed=(_query_scale(46),),
    ),
    replace(
        _GEMMA,
        model_type="gemma3_text",
        name="gemma3",
        fields=(_cap("final"),),
        windows=6,
        fixed=(
            _query_scale(62),
            Fixed("attn_logit_softcapping", lambda config: None, "caps no scores of attention"),
        ),
        tied=False,
    ),
    Dialect(
        "starcoder2",
        "starcoder2",
        epsilon=replace(_LAYER_NORM, attribute="norm_epsilon"),
        activation="gelu_pytorch_tanh",
        biases=(*_ALL_LAYERS, *_LAYER_NORMS),
    ),
    Dialect("stablelm", "stablelm", epsilon=_LAYER_NORM, biases=_LAYER_NORMS),
    Dialect(
        "gpt2",
        "gpt2",
        epsilon=replace(_LAYER_NORM, attribute="layer_norm_epsilon"),
        activation="gelu_new",
        biases=(*_ALL_LAYERS, *_LAYER_NORMS),
    ),
)
"""All model types whose GGUF files are read or written."""

_BY_TYPE = {dialect.model_type: dialect for dialect in DIALECTS}
_BY_NAME: dict[tuple[Any, bool, bool], Dialect] = {
    (dialect.name, dialect.windows == "listed", dialect.experts): dialect
    for dialect in reversed(DIALECTS)
}


def dialect_of(config: Any) -> Dialect:
    """Return the dialect of a config's model type.

    Raises
    ------
    ArchitectureError
        If there is none, or llama.cpp computes something else than the config says.
    """
    kind = config.model_type
    if kind not in _BY_TYPE:
        known = ", ".join(_BY_TYPE)
        raise ArchitectureError(f"GGUF files are written for {known}, got {kind!r}")
    dialect = _BY_TYPE[kind]
    _check_windows(config, dialect)
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((getattr(config, n) for n in names if hasattr(config, n)), None)
    if activation is not None and activation != dialect.activation:
        raise ArchitectureError(
            f"llama.cpp's {dialect.name!r} computes {dialect.activation}, so hidden_act must be "
            f"that, got {activation!r}"
        )
    for fixed in dialect.fixed:
        found, wanted = getattr(config, fixed.attribute, None), fixed.wanted(config)
        if found != wanted and (found or wanted):
            raise ArchitectureError(
                f"llama.cpp's {dialect.name!r} {fixed.words}, so {fixed.attribute} must be "
                f"{_as_json(wanted)}, got {found!r}"
            )
    return dialect


def _as_json(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _check_windows(config: Any, dialect: Dialect) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    if dialect.windows == 0 and window is not None and window < config.max_position_embeddings:
        raise ArchitectureError(
            f"llama.cpp's {dialect.name!r} attends to everything, so sliding_window must "
            f"be null, got {window}"
        )
    if isinstance(dialect.windows, int) and dialect.windows:
        step = dialect.windows
        wanted = [
            "sliding_attention" if (i + 1) % step else "full_attention"
            for i in range(config.num_hidden_layers)
        ]
        if kinds is not None and list(kinds) != wanted:
            raise ArchitectureError(
                f"llama.cpp's {dialect.name!r} attends to everything in every block whose number "
                f"is a multiple of {step}, so layer_types must say that, got {list(kinds)}"
            )


def dialect_named(name: Any, *, listed: bool = False, experts: bool = False) -> Dialect:
    """Return the dialect of a file.

    Parameters
    ----------
    name : str
        llama.cpp's architecture, as ``general.architecture`` says it.
    listed : bool
        Whether the file says which blocks attend to a window.
    experts : bool
        Whether it has experts.

    Raises
    ------
    ArchitectureError
        If it isn't known here.
    """
    found = _BY_NAME.get((name, listed, experts), _BY_NAME.get((name, False, experts)))
    if found is None:
        known = ", ".join(dict.fromkeys(dialect.name for dialect in DIALECTS))
        raise ArchitectureError(
            f"general.architecture of a GGUF file must be one of {known}, got {name!r}"
        )
    return found
