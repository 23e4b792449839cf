"""Metadata of a GGUF file: sizes of the model, and the tokenizer.

Sizes come from the Transformers config. A tokenizer is carried over from a GGUF source as it is,
one of ``tokenizer.json`` is translated.

Source: gguf-py and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError, CheckpointError
from corequant.storage.gguf_file import GgufFile
from corequant_transformers.checkpoint.reader import Stored, load_tokenizer
from corequant_transformers.exports.gguf_tokenizers import KeyValue, translated
from corequant_transformers.exports.prospect import Candidate
from corequant_transformers.files.digests import check_digests
from corequant_transformers.model.gguf_files.configs import llama3_factors, rope_of
from corequant_transformers.model.gguf_files.dialects import Dialect, dialect_of
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "KeyValue",
    "about",
    "hyperparameters",
    "metadata_bytes",
    "rope_factors",
    "vocabulary",
]

_T = gguf.GGUFValueType

_KINDS = {int: _T.UINT32, float: _T.FLOAT32, bool: _T.BOOL}

_NOT_CARRIED = (
    *("general.architecture", "general.file_type", "general.quantization_version"),
    "general.quantized_by",
)


def hyperparameters(config: Any, plan: ModelPlan) -> Iterator[KeyValue]:
    """Yield what llama.cpp must know to build the model.

    Raises
    ------
    ArchitectureError
        If it computes something else than the config says.
    """
    dialect, sizes, rope = dialect_of(config), plan.dimensions, rope_of(config)
    arch = dialect.name
    _check_rope(dialect, rope)
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
        "rope.dimension_count": rope["dims"],
        "vocab_size": sizes.vocabulary,
    }
    if sizes.experts:
        whole["expert_count"] = sizes.experts
        whole["expert_used_count"] = sizes.experts_chosen
        whole["expert_feed_forward_length"] = sizes.expert_intermediate
    for key, value in whole.items():
        yield f"{arch}.{key}", value, _T.UINT32, None
    if "rope_theta" in rope:
        yield f"{arch}.rope.freq_base", float(rope["rope_theta"]), _T.FLOAT32, None
    for field in (dialect.epsilon, *dialect.fields):
        value = getattr(config, field.attribute, None)
        if value is None and field.needed:
            raise ArchitectureError(
                f"llama.cpp's {arch!r} has a value of its own for {field.attribute}, so it must be "
                "given, got None"
            )
        if value is not None:
            yield f"{arch}.{field.key}", field.kind(value), _KINDS[field.kind], None
    if rope["rope_type"] == "linear":
        yield f"{arch}.rope.scaling.type", "linear", _T.STRING, None
        yield f"{arch}.rope.scaling.factor", float(rope["factor"]), _T.FLOAT32, None
    window = getattr(config, "sliding_window", None)
    if dialect.windows and window is not None:
        yield f"{arch}.attention.sliding_window", int(window), _T.UINT32, None
        if dialect.windows == "listed":
            inside = [kind == "sliding_attention" for kind in config.layer_types]
            yield f"{arch}.attention.sliding_window_pattern", inside, _T.ARRAY, _T.BOOL


def _check_rope(dialect: Dialect, rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    allowed = ["default", "linear", *(["llama3"] if dialect.divided else [])]
    if kind not in allowed:
        *most, last = allowed
        raise ArchitectureError(
            f"rope_type must be {', '.join(most)} or {last} for GGUF files of llama.cpp's "
            f"{dialect.name!r}, got {kind!r}"
        )


def rope_factors(config: Any) -> npt.NDArray[np.float32] | None:
    """Return by what llama.cpp divides each rotary frequency, where they are those of Llama 3."""
    rope = rope_of(config)
    return llama3_factors(rope, rope["dims"]) if rope["rope_type"] == "llama3" else None


def metadata_bytes(values: Iterable[KeyValue]) -> int:
    """Return about how many bytes keys and values take in a file."""
    return sum(len(key) + 16 + _value_bytes(value) for key, value, *_ in values)


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if isinstance(value, Sequence | np.ndarray):
        return 12 + sum(map(_value_bytes, value))
    return 4


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
        *translated(folder, tokenizer, stored.plan.dimensions.vocabulary),
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
        file = GgufFile(path)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    for key, value in file.fields.items():
        if key.startswith(("general.", "tokenizer.")) and key not in _NOT_CARRIED:
            kind, *inner = map(_T, file.kinds[key])
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            yield key, plain, kind, inner[0] if inner else None
