"""The Transformers config of a GGUF file, and what rotary embeddings both know."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers

from corequant.errors import ArchitectureError, CheckpointError
from corequant.storage.gguf_file import GgufFile
from corequant_transformers.architectures.known import architecture_of
from corequant_transformers.model.gguf_files.dialects import Dialect, dialect_named, head_dim_of
from corequant_transformers.model.gguf_files.names import ROPE_FREQUENCIES

__all__ = ["config_of", "dialect_in", "llama3_factors", "rope_of"]

_LOCAL_BASE = 10000.0
"""Of the rotary embeddings in Gemma 3's sliding windows, which files leave out."""

_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = (8192, *(2**power for power in range(5, 21)))
"""Of these values and a factor a file has only what follows, the frequencies' divisors."""

_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_BIASES = {
    "attention_bias": "attn_q.bias",
    "attention_out_bias": "attn_output.bias",
    "mlp_bias": "ffn_up.bias",
    "use_bias": "attn_q.bias",
    "use_qkv_bias": "attn_q.bias",
}
"""Fields of configs that say whether a block has a tensor."""


def dialect_in(file: GgufFile) -> Dialect:
    """Return the dialect of a GGUF file."""
    name = file.fields.get("general.architecture")
    return dialect_named(
        name,
        listed=f"{name}.attention.sliding_window_pattern" in file.fields,
        experts=bool(file.fields.get(f"{name}.expert_count")),
    )


def config_of(file: GgufFile) -> Any:
    """Return the config that a GGUF file's fields and tensors say.

    Raises
    ------
    ArchitectureError
        If its architecture isn't known here, or it has a feature that isn't read.
    CheckpointError
        If a field is missing or isn't what it must be.
    """
    fields = _Fields(file)
    dialect = fields.dialect
    values: dict[str, Any] = {name: fields.whole(key) for name, key in _SIZES.items()}
    usual_config = _make(file, dialect, {})
    a = architecture_of(usual_config)
    values[a.intermediate_size] = fields.whole("feed_forward_length")
    if a.experts is not None:
        values[a.experts.count] = fields.whole("expert_count")
        values[a.experts.chosen] = fields.whole("expert_used_count")
        width = fields.whole("expert_feed_forward_length", values[a.intermediate_size])
        values[a.experts.intermediate_size] = width
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = fields.whole("attention.head_count_kv", heads)
    usual = fields.whole("rope.dimension_count", values["hidden_size"] // max(heads, 1))
    head_dim = fields.whole("attention.key_length", usual)
    if fields.whole("attention.value_length", head_dim) != head_dim:
        raise ArchitectureError(f"{file.path} must have values as wide as keys")
    values["head_dim"] = head_dim
    tokens = file.fields.get("tokenizer.ggml.tokens", ())
    values["vocab_size"] = fields.whole("vocab_size", len(tokens))
    for field in (dialect.epsilon, *dialect.fields):
        found = fields.get(field.key)
        if found is None and field.needed:
            raise CheckpointError(f"{file.path} lacks its field {dialect.name}.{field.key}")
        if found is not None or field is not dialect.epsilon:
            values[field.attribute] = found
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    for name, key in _IDS.items():
        values[f"{name}_token_id"] = file.fields.get(f"tokenizer.ggml.{key}_token_id")
    for name, suffix in _BIASES.items():
        if hasattr(usual_config, name):
            values[name] = f"blk.0.{suffix}" in file.tensors
    values |= _windows(fields, values)
    values["rope_parameters"] = _rope(fields, head_dim)
    for fixed in dialect.fixed:
        made = _make(file, dialect, values)
        if hasattr(usual_config, fixed.attribute):
            values[fixed.attribute] = fixed.wanted(made)
    return _make(file, dialect, values)


def _make(file: GgufFile, dialect: Dialect, values: dict[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.for_model(dialect.model_type, **values)
    except Exception as error:
        # Transformers validates configs with errors of several kinds.
        raise CheckpointError(f"{file.path} has a config that can't be: {error}") from error


class _Fields:
    """An architecture's fields of a file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.dialect = dialect_in(file)

    def get(self, key: str, usual: Any = None) -> Any:
        found = self.file.fields.get(f"{self.dialect.name}.{key}", usual)
        return found.tolist() if isinstance(found, np.ndarray) else found

    def whole(self, key: str, usual: int | None = None) -> int:
        found = self.get(key, usual)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise CheckpointError(
                f"{self.dialect.name}.{key} of {self.file.path} must be a positive integer, got "
                f"{str(found)[:40]}"
            )
        return found


def _windows(fields: _Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Return which blocks attend to a sliding window, and how long it is."""
    dialect, window = fields.dialect, fields.get("attention.sliding_window")
    blocks = values["num_hidden_layers"]
    if dialect.windows == 0 or not window:
        if window and window < values["max_position_embeddings"]:
            raise ArchitectureError(
                f"{fields.file.path} must have no sliding window, which is not read for "
                f"{dialect.name!r}, got {window}"
            )
        kinds = ["full_attention"] * blocks
        return {"sliding_window": None, "layer_types": kinds} if dialect.windows == 0 else {}
    if dialect.windows == "listed":
        inside = fields.get("attention.sliding_window_pattern")
        if not isinstance(inside, list) or len(inside) != blocks:
            raise CheckpointError(
                f"{dialect.name}.attention.sliding_window_pattern of {fields.file.path} must have "
                f"{blocks} entries"
            )
    else:
        inside = [(i + 1) % int(dialect.windows) != 0 for i in range(blocks)]
    kinds = ["sliding_attention" if each else "full_attention" for each in inside]
    return {"sliding_window": int(window), "layer_types": kinds}


def _rope(fields: _Fields, head_dim: int) -> dict[str, Any]:
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear"))
    if kind == "none" and factor not in (None, 0, 1):
        kind = "linear"
    if kind not in ("none", "linear"):
        raise ArchitectureError(
            f"{fields.dialect.name}.rope.scaling.type of {fields.file.path} must be none or "
            f"linear, got {kind!r}"
        )
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(fields.get("rope.freq_base", _LOCAL_BASE)),
    }
    if kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    dims = fields.whole("rope.dimension_count", head_dim)
    if dims != head_dim:
        rope["partial_rotary_factor"] = dims / head_dim
    if ROPE_FREQUENCIES in fields.file.tensors:
        rope = _llama3(fields, rope, dims)
    if fields.dialect.windows == 6:
        base = float(fields.get("rope.freq_base_swa", _LOCAL_BASE))
        local = {"rope_type": "default", "rope_theta": base}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3(fields: _Fields, rope: dict[str, Any], dims: int) -> dict[str, Any]:
    """Return Llama 3's parameters, from the divisors of the frequencies that they give."""
    divisors = fields.file.read(ROPE_FREQUENCIES)
    made = {**rope, **_LLAMA3, "factor": round(float(divisors.max()), 4)}
    for context in _CONTEXTS if rope["rope_type"] == "default" else ():
        made["original_max_position_embeddings"] = context
        expected = llama3_factors(made, dims)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-5, atol=0):
            return made
    raise ArchitectureError(
        f"{ROPE_FREQUENCIES} of {fields.file.path} must be those of Llama 3, which no other "
        "values of a config give"
    )


def rope_of(config: Any) -> dict[str, Any]:
    """Return a config's rotary parameters for blocks that attend to everything."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_type", "default")
    rope["dims"] = int(head_dim_of(config) * float(rope.get("partial_rotary_factor") or 1.0))
    return rope


def llama3_factors(rope: dict[str, Any], dims: int) -> npt.NDArray[np.float32]:
    """Return by what Llama 3's rotary embeddings divide each frequency."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    exponents = np.arange(0, dims, 2) / dims
    turns = context / (2 * math.pi * float(rope["rope_theta"]) ** exponents)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
