"""A tokenizer as GGUF files hold it: tokens, merges, and how a text is split.

Those of ``tokenizer.json`` are translated if they are byte-level BPE, with llama.cpp's name for
their way of splitting a text into words, or SentencePiece's BPE.

Source: gguf-py and conversion/base.py of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

from corequant.errors import CheckpointError
from corequant_transformers.exports.gguf_pieces import check_pieces, is_byte
from corequant_transformers.files.atomic import read_json

__all__ = ["KeyValue", "translated"]

_T = gguf.GGUFValueType

KeyValue = tuple[str, Any, Any, Any]
"""Key, value, its type, and the type of an array's entries."""

_UNMERGED = -1e6
"""Score of a token that nothing is merged to, below that of any other."""

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


def translated(folder: Path, tokenizer: Any, size: int) -> Iterator[KeyValue]:
    """Yield a tokenizer's fields.

    Parameters
    ----------
    folder : Path
        Where its ``tokenizer.json`` is.
    tokenizer : transformers tokenizer
        The same, loaded.
    size : int
        Tokens of the model's vocabulary.

    Raises
    ------
    CheckpointError
        If llama.cpp's tokenizers would give other tokens.
    """
    file = folder / "tokenizer.json"
    values = read_json(file)
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(
            f"{file} must be BPE, byte-level or SentencePiece's, to be translated; a GGUF file of "
            "the same model, given as source, is carried over whatever it is"
        )
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        prefix, scores = check_pieces(file, values)
        yield "tokenizer.ggml.model", "llama", _T.STRING, None
        yield "tokenizer.ggml.pre", "default", _T.STRING, None
    else:
        splitting = _splitting(file, values.get("pre_tokenizer"))
        _check_plain(file, values, splitting)
        prefix, scores = False, {}
        yield "tokenizer.ggml.model", "gpt2", _T.STRING, None
        yield "tokenizer.ggml.pre", splitting, _T.STRING, None
    _check_added(file, values)
    added = {t["id"]: t for t in values.get("added_tokens", [])}
    names = {i: token for token, i in model["vocab"].items()}
    names |= {i: t["content"] for i, t in added.items()}
    if names and max(names) >= size:
        raise CheckpointError(f"{file} must have ids below {size}, got {max(names)}")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [_kind(i, names, added, model if pieces else {}) for i in range(size)]
    yield "tokenizer.ggml.tokens", tokens, _T.ARRAY, _T.STRING
    yield "tokenizer.ggml.token_type", [int(kind) for kind in kinds], _T.ARRAY, _T.INT32
    if pieces:
        given = [float(scores.get(token, _UNMERGED)) for token in tokens]
        yield "tokenizer.ggml.scores", given, _T.ARRAY, _T.FLOAT32
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        yield "tokenizer.ggml.merges", merges, _T.ARRAY, _T.STRING
    yield from _special(tokenizer)
    yield "tokenizer.ggml.add_space_prefix", prefix, _T.BOOL, None
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        yield "tokenizer.chat_template", template, _T.STRING, None


def _kind(
    index: int, names: dict[int, str], added: dict[int, Any], pieces: dict[str, Any]
) -> gguf.TokenType:
    """Return llama.cpp's kind of a token."""
    if index not in names:
        return gguf.TokenType.UNUSED
    if pieces and names[index] == pieces.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if index in added:
        special = added[index]["special"]
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    if pieces and is_byte(names[index]):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _special(tokenizer: Any) -> Iterator[KeyValue]:
    """Yield which tokens mean something, and which are put around a text."""
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


def _check_added(file: Path, values: dict[str, Any]) -> None:
    for token in values.get("added_tokens", []):
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise CheckpointError(
                    f"{name} of the added token {token['content']!r} in {file} must be false, "
                    "since llama.cpp ignores the characters around a token"
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
