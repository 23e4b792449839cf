"""What a GGUF file says about a model besides its tensors: sizes, and the tokenizer.

Sizes come from the Transformers config. A tokenizer is carried over from a GGUF source as it is.
One of ``tokenizer.json`` is translated if it is byte-level BPE, with llama.cpp's name for
its way of splitting a text into words.

Source: gguf-py and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError, CheckpointError
from corequant_transformers.checkpoint.reader import Stored, load_tokenizer
from corequant_transformers.exports.prospect import Candidate
from corequant_transformers.files.atomic import read_json
from corequant_transformers.files.digests import check_digests
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "PERMUTED",
    "KeyValue",
    "about",
    "architecture_name",
    "hyperparameters",
    "metadata_bytes",
    "rope_factors",
    "vocabulary",
]

_T = gguf.GGUFValueType

KeyValue = tuple[str, Any, Any, Any]
"""Key, value, its type, and the type of an array's entries."""

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
_ACTIVATION = "silu"
PERMUTED = ("llama",)
"""Architectures whose queries and keys have their channels in another order."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_WORDS % r"\p{N}", "bytes"): "qwen2",
}
"""llama.cpp's names for the steps of ``pre_tokenizer``."""

_NOT_CARRIED = (
    *("general.architecture", "general.file_type", "general.quantization_version"),
    "general.quantized_by",
)


def architecture_name(config: Any) -> str:
    """Return llama.cpp's name for a model's architecture.

    Raises
    ------
    ArchitectureError
        If it has none of those that are known here, or a feature that its files don't say.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ArchitectureError(f"GGUF files are written for {known}, got {kind!r}")
    if getattr(config, "sliding_window", None) is not None:
        raise ArchitectureError(
            f"llama.cpp's {_ARCHITECTURES[kind]!r} attends to everything, so sliding_window must "
            f"be null, got {config.sliding_window}"
        )
    activation = getattr(config, "hidden_act", _ACTIVATION)
    if activation != _ACTIVATION:
        raise ArchitectureError(
            f"llama.cpp's {_ARCHITECTURES[kind]!r} computes {_ACTIVATION}, so hidden_act must be "
            f"that, got {activation!r}"
        )
    if kind in ("qwen3", "qwen3_moe") and getattr(config, "attention_bias", False):
        raise ArchitectureError(
            f"llama.cpp's {_ARCHITECTURES[kind]!r} reads no biases of attention, so attention_bias "
            "must be false"
        )
    if not getattr(config, "norm_topk_prob", True):
        raise ArchitectureError(
            f"llama.cpp's {_ARCHITECTURES[kind]!r} makes the shares of a token's experts sum to 1, "
            "so norm_topk_prob must be true, got False"
        )
    return _ARCHITECTURES[kind]


def hyperparameters(config: Any, plan: ModelPlan) -> Iterator[KeyValue]:
    """Yield what llama.cpp must know to build the model."""
    arch, sizes = architecture_name(config), plan.dimensions
    sparse = {m.block for m in plan.matrices if m.expert is not None}
    if sizes.experts and len(sparse) != sizes.blocks:
        dense = min(set(range(sizes.blocks)) - sparse)
        raise ArchitectureError(
            f"llama.cpp's {arch!r} has experts in every block, got a model without any in block "
            f"{dense}"
        )
    whole = {
        "block_count": sizes.blocks,
        "context_length": config.max_position_embeddings,
        "embedding_length": sizes.hidden,
        "feed_forward_length": sizes.intermediate,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
    }
    if sizes.experts:
        whole["expert_count"] = sizes.experts
        whole["expert_used_count"] = sizes.experts_chosen
        whole["expert_feed_forward_length"] = sizes.expert_intermediate
    for key, value in whole.items():
        yield f"{arch}.{key}", value, _T.UINT32, None
    rope = _rope(config)
    yield f"{arch}.rope.freq_base", float(rope["rope_theta"]), _T.FLOAT32, None
    yield (
        f"{arch}.attention.layer_norm_rms_epsilon",
        float(config.rms_norm_eps),
        _T.FLOAT32,
        None,
    )
    if rope["rope_type"] == "linear":
        yield f"{arch}.rope.scaling.type", "linear", _T.STRING, None
        yield f"{arch}.rope.scaling.factor", float(rope["factor"]), _T.FLOAT32, None


def rope_factors(config: Any) -> npt.NDArray[np.float32] | None:
    """Return by what llama.cpp divides each rotary frequency, where they are those of Llama 3."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    exponents = np.arange(0, head_dim, 2) / head_dim
    turns = context / (2 * math.pi * float(rope["rope_theta"]) ** exponents)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def metadata_bytes(values: Iterable[KeyValue]) -> int:
    """Return about how many bytes keys and values take in a file."""
    return sum(len(key) + 16 + _value_bytes(value) for key, value, *_ in values)


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if isinstance(value, Sequence | np.ndarray):
        return 12 + sum(map(_value_bytes, value))
    return 4


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ArchitectureError(
            f"rope_type must be default, linear or llama3 for GGUF, got {rope['rope_type']!r}"
        )
    return rope


def vocabulary(stored: Candidate, source: Source | None) -> list[KeyValue]:
    """Return the tokenizer and what else is known about the model.

    Raises
    ------
    CheckpointError
        If there is no tokenizer, or none that can be translated, or it is another model's.
    """
    if source is not None and source.is_gguf:
        values = list(_carried(source.path))
        size = next((len(v) for k, v, *_ in values if k == "tokenizer.ggml.tokens"), 0)
        if size != stored.plan.dimensions.vocabulary:
            raise CheckpointError(
                f"{source.path} must have {stored.plan.dimensions.vocabulary} tokens as the "
                f"quantized model has, got {size}"
            )
        return values
    if source is None and stored.source_name.endswith(".gguf"):
        raise CheckpointError(
            f"source must be given: {stored.folder} was made from {stored.source_name}, whose "
            "metadata and tokenizer are carried over"
        )
    folder = stored.folder if source is None else source.path
    # Its files are compared with their digests when all is known to be of the right kind.
    tokenizer = load_tokenizer(folder, verify=False) if source is None else source.tokenizer()
    name = source.name if source is not None else stored.source_name
    # A name in another encoding isn't UTF-8, as texts in a GGUF file must be.
    name = (name or stored.folder.resolve().name).encode("utf-8", "replace").decode()
    return [
        ("general.type", "model", _T.STRING, None),
        ("general.name", name, _T.STRING, None),
        *_translated(folder, tokenizer, stored.plan.dimensions.vocabulary),
    ]


def about(stored: Stored, known: Iterable[KeyValue]) -> Iterator[KeyValue]:
    """Yield what a model card says, as far as a file has fields for it.

    Parameters
    ----------
    stored : Stored
    known : iterable of KeyValue
        Fields that the file has already; they stay as they are.
    """
    taken = {key for key, *_ in known}
    formats = sorted({m.weights.format.name for m in stored.plan.quantized})
    origin = stored.report.get("origin")
    origin = origin if isinstance(origin, dict) else {}
    values: list[KeyValue] = [
        ("general.quantized_by", "corequant", _T.STRING, None),
        ("general.tags", ["corequant", *formats], _T.ARRAY, _T.STRING),
    ]
    if "license" in origin:
        values.append(("general.license", str(origin["license"]), _T.STRING, None))
    if "base_model" in origin and "general.base_model.count" not in taken:
        name = str(origin["base_model"])
        organization, _, model = name.partition("/")
        prefix = "general.base_model"
        values += [
            (f"{prefix}.count", 1, _T.UINT32, None),
            (f"{prefix}.0.name", model, _T.STRING, None),
            (f"{prefix}.0.organization", organization, _T.STRING, None),
            (f"{prefix}.0.repo_url", f"https://huggingface.co/{name}", _T.STRING, None),
        ]
    values.append(("corequant.recipe", stored.plan.recipe.to_toml(), _T.STRING, None))
    yield from (value for value in values if value[0] not in taken)


def _carried(path: Path) -> Iterator[KeyValue]:
    try:
        check_digests(path)
        fields = gguf.GGUFReader(path).fields
    except Exception as error:
        # Its reader raises errors of many kinds for broken files.
        raise CheckpointError(f"{path} can't be read: {error}") from error
    for key, field in fields.items():
        if key.startswith(("general.", "tokenizer.")) and key not in _NOT_CARRIED:
            kind, *_ = field.types
            yield key, field.contents(), kind, field.types[-1] if kind is _T.ARRAY else None


def _translated(folder: Path, tokenizer: Any, size: int) -> Iterator[KeyValue]:
    file = folder / "tokenizer.json"
    values = read_json(file)
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(
            f"{file} must be byte-level BPE to be translated; a GGUF file of the same model, given "
            "as source, is carried over whatever it is"
        )
    splitting = _splitting(file, values.get("pre_tokenizer"))
    _check_plain(file, values, splitting)
    yield "tokenizer.ggml.model", "gpt2", _T.STRING, None
    yield "tokenizer.ggml.pre", splitting, _T.STRING, None
    added = {t["id"]: t for t in values.get("added_tokens", [])}
    names = {i: token for token, i in model["vocab"].items()}
    names |= {i: t["content"] for i, t in added.items()}
    if names and max(names) >= size:
        raise CheckpointError(f"{file} must have ids below {size}, got {max(names)}")
    kinds = []
    for i in range(size):
        if i in added:
            special = added[i]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if i in names else gguf.TokenType.UNUSED)
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    yield "tokenizer.ggml.tokens", tokens, _T.ARRAY, _T.STRING
    yield "tokenizer.ggml.token_type", [int(kind) for kind in kinds], _T.ARRAY, _T.INT32
    yield "tokenizer.ggml.merges", merges, _T.ARRAY, _T.STRING
    for key, i in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if i is not None:
            yield f"tokenizer.ggml.{key}_token_id", int(i), _T.UINT32, None
    ids = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    ends = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    yield "tokenizer.ggml.add_bos_token", begins, _T.BOOL, None
    yield "tokenizer.ggml.add_eos_token", ends, _T.BOOL, None
    yield "tokenizer.ggml.add_space_prefix", False, _T.BOOL, None
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        yield "tokenizer.chat_template", template, _T.STRING, None


def _check_plain(file: Path, values: dict[str, Any], splitting: str) -> None:
    """Refuse what llama.cpp would leave out: it would count other tokens, and not say so."""
    normalizer = values.get("normalizer")
    if normalizer and normalizer.get("normalizers", True):
        raise CheckpointError(
            f"normalizer of {file} must be null, since llama.cpp normalizes no text for byte-level "
            f"BPE and would count other tokens, got {normalizer.get('type')}; set it to null if "
            "your texts are normalized already, or give a GGUF file of the same model as source, "
            "which is carried over whatever it is"
        )
    model = values["model"]
    fields = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    if splitting != "llama-bpe":
        # There it takes a word that is in the vocabulary without merging.
        fields.append("ignore_merges")
    for name in fields:
        if model.get(name):
            raise CheckpointError(
                f"{name} of {file} must be null or false, since llama.cpp has nothing like it, got "
                f"{str(model[name])[:40]!r}"
            )
    for token in values.get("added_tokens", []):
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise CheckpointError(
                    f"{name} of the added token {token['content']!r} in {file} must be false, "
                    "since llama.cpp doesn't ask what is beside a token"
                )


def _splitting(file: Path, steps: Any) -> str:
    """Return llama.cpp's name for how a text is split before it is encoded."""
    kinds = []
    parts = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else [steps]
    for part in parts:
        part = part if isinstance(part, dict) else {}
        kind, pattern = part.get("type"), part.get("pattern")
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            kinds.append("words" if part.get("use_regex", True) else "bytes")
        elif kind == "Digits" and part.get("individual_digits"):
            kinds.append("digits")
        elif kind == "Split" and isinstance(pattern, dict) and part.get("behavior") == "Isolated":
            kinds.append(str(pattern.get("Regex")))
        else:
            kinds.append(json.dumps(part))
    name = _SPLITS.get(tuple(kinds))
    if name is None:
        raise CheckpointError(
            f"pre_tokenizer of {file} must be one that llama.cpp has a name for here "
            f"({', '.join(_SPLITS.values())}); a GGUF file of the same model, given as source, is "
            "carried over whatever it is"
        )
    return name
