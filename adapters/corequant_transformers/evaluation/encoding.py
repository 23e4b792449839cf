"""Contexts and continuations as tokens, split where lm-evaluation-harness splits them."""

from __future__ import annotations

from typing import Any

from corequant.errors import TaskError
from corequant_transformers.evaluation.continuations import Pair
from corequant_transformers.evaluation.task_files import Item

__all__ = ["encode", "encode_item", "longest_input", "prefix_token"]

_LONGEST = 2048
"""Tokens that a model is taken to be able to read whose config doesn't say."""


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
    prefix = prefix_token(tokenizer)
    if not context:
        ids = _tokens(tokenizer, continuation, add_special_tokens=False)
        # A text that begins with it already has its context.
        return Pair(ids[:1], ids[1:]) if ids[:1] == (prefix,) else Pair((prefix,), ids)
    stem = context.rstrip()
    whole = stem + context[len(stem) :] + continuation
    mark = tokenizer.decode(prefix)
    before, both = (
        _tokens(tokenizer, text, **({"add_special_tokens": False} if text.startswith(mark) else {}))
        for text in (stem, whole)
    )
    return Pair(before, both[len(before) :])


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands for an empty context: a text's beginning, or else its end.

    Raises
    ------
    TaskError
        If the tokenizer has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise TaskError(
        "the tokenizer must have a token for the beginning or the end of a text (bos_token, "
        "eos_token), which stands for an empty context; it has neither"
    )


def longest_input(config: Any) -> int:
    """Return how many tokens a model reads at most, by its config."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else _LONGEST


def _tokens(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False, **options)["input_ids"])
