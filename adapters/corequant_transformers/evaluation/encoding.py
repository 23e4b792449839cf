"""Contexts and continuations as tokens, split where lm-evaluation-harness splits them."""

from __future__ import annotations

from typing import Any

from corequant.errors import TaskError
from corequant_transformers.evaluation.continuations import Pair
from corequant_transformers.evaluation.task_files import Item

__all__ = ["encode", "encode_item", "longest_input", "prefix_token", "tokens_of"]

_LONGEST = 2048
"""Context length assumed where a config doesn't state one."""


def encode_item(tokenizer: Any, item: Item) -> list[Pair]:
    """Return the context and each choice, which a space comes before, as tokens."""
    return [encode(tokenizer, item.context, f" {choice}") for choice in item.choices]


def encode(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Return a context and its continuation as tokens.

    Both are tokenised together; what comes after as many tokens as the context alone has is the
    continuation. White space at the context's end belongs to the continuation.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its own default says whether special tokens are added.
    context : str
        Where it is empty, ``prefix_token`` stands for it.
    continuation : str
    """
    if not context:
        prefix = prefix_token(tokenizer)
        ids = tokens_of(tokenizer, continuation, special=False)
        # A text that begins with it already has its context.
        return Pair(ids[:1], ids[1:]) if ids[:1] == (prefix,) else Pair((prefix,), ids)
    stem = context.rstrip()
    before = tokens_of(tokenizer, stem)
    both = tokens_of(tokenizer, context + continuation)
    return Pair(before, both[len(before) :])


def tokens_of(tokenizer: Any, text: str, *, special: bool | None = None) -> tuple[int, ...]:
    """Return a text's tokens.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    text : str
    special : bool, optional
        Whether special tokens are added; by default as the tokenizer does by itself, unless the
        text begins with what stands for an empty context.
    """
    if special is None:
        found = _prefix(tokenizer)
        special = False if found is not None and text.startswith(tokenizer.decode(found)) else None
    options = {} if special is None else {"add_special_tokens": special}
    return tuple(tokenizer(text, verbose=False, **options)["input_ids"])


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands for an empty context: a text's beginning, or else its end.

    Raises
    ------
    TaskError
        If the tokenizer has neither.
    """
    found = _prefix(tokenizer)
    if found is None:
        raise TaskError(
            "the tokenizer must have a token for the beginning or the end of a text (bos_token, "
            "eos_token), which stands for an empty context; it has neither"
        )
    return found


def _prefix(tokenizer: Any) -> int | None:
    begin, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    return end if begin is None else begin


def longest_input(config: Any) -> int:
    """Return the context length of a model, by its config."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else _LONGEST
