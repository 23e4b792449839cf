"""SentencePiece's BPE in a ``tokenizer.json``: whether llama.cpp would give the same tokens.

There a text is normalized to one with ``▁`` for spaces and merged as a whole, the pair with the
best merge first; characters that are no token become bytes. llama.cpp knows no merges: it joins two
tokens wherever that gives a third one, the one with the best score first. Both are the same if the
merges are all pairs that give a token, and those of one token follow each other, which is
what converters make of a SentencePiece model. Scores are then the order of the merges.

Source: llama-vocab.cpp of llama.cpp (llm_tokenizer_spm), Transformers' convert_slow_tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from corequant.errors import CheckpointError

__all__ = ["check_pieces", "is_byte"]

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CARRIED = "a GGUF file of the same model, given as source, is carried over whatever it is"


def is_byte(token: str) -> bool:
    """Return whether a token stands for a byte."""
    return _BYTE.fullmatch(token) is not None


def check_pieces(file: Path, values: dict[str, Any]) -> tuple[bool, dict[str, int]]:
    """Return whether a space is put before a text, and the tokens' scores.

    Parameters
    ----------
    file : Path
        The ``tokenizer.json``, for error messages.
    values : dict
        What it says.

    Raises
    ------
    CheckpointError
        If llama.cpp would give other tokens.
    """
    prefix = _prefix(file, values)
    model = values["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise CheckpointError(
                f"{name} of {file} must be null or false, since llama.cpp has nothing like it, got "
                f"{str(model[name])[:40]!r}"
            )
    scores: dict[str, int] = {}
    pairs, last = set(), None
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token != last and token in scores:
            raise CheckpointError(
                f"merges of {file} must have those that give one token in a row, since llama.cpp "
                f"has one score for {token!r}; {_CARRIED}"
            )
        scores.setdefault(token, -rank)
        pairs.add((left, right))
        last = token
    _check_complete(file, values, pairs)
    return prefix, scores


def _check_complete(file: Path, values: dict[str, Any], pairs: set[tuple[str, str]]) -> None:
    """Refuse tokens that llama.cpp would join two others to, and the merges don't."""
    vocabulary = values["model"]["vocab"]
    special = {token["content"] for token in values.get("added_tokens", [])}
    for token in vocabulary:
        if token in special or is_byte(token):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs:
                raise CheckpointError(
                    f"merges of {file} must have every pair that gives a token, since llama.cpp "
                    f"joins {left!r} and {right!r} to {token!r}; {_CARRIED}"
                )


def _prefix(file: Path, values: dict[str, Any]) -> bool:
    """Return whether a text gets a space before it; refuse any other way to normalize and split."""
    normalizer = values.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    split = values.get("pre_tokenizer")
    found = []
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            found.append("prepend")
        elif kind == "Replace" and pattern == {"String": " "} and step.get("content") == _SPACE:
            found.append("replace")
        else:
            found.append(str(kind))
    if isinstance(split, dict):
        scheme = split.get("prepend_scheme", "always" if split.get("add_prefix_space") else "never")
        if split.get("type") == "Metaspace" and split.get("replacement") == _SPACE:
            # It puts none before a text that begins with one, which llama.cpp does, and may cut
            # before every one.
            found += [f"Metaspace {scheme}"] if scheme != "never" else []
            found += ["replace"] if not split.get("split", True) else ["words"]
        elif split.get("type") == "Split" and "replace" in found:
            # Of spaces, of which none is left.
            found += [] if split.get("pattern") == {"String": " "} else ["Split"]
        else:
            found.append(str(split.get("type")))
    if sorted(found) not in (["replace"], ["prepend", "replace"]):
        raise CheckpointError(
            f"normalizer and pre_tokenizer of {file} must replace spaces by {_SPACE} and "
            f"may put one before the text, and nothing else, got {', '.join(found) or 'none'}; "
            f"{_CARRIED}"
        )
    return "prepend" in found
