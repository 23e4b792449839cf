"""Documents as tokens, and the tokens between two of them.

Between texts stand the special tokens that the tokenizer itself puts at the end of one and at the
beginning of the next; where it has none of its own, its token for the end of a text; where it lacks
that too, a blank line. A chat template brings its own, so nothing is added after a conversation but
what the next text begins with.
"""

from __future__ import annotations

from typing import Any

from corequant.errors import CalibrationError
from corequant_transformers.calibration.data.formats import Document

__all__ = ["Separators", "tokenize"]


def tokenize(document: Document, tokenizer: Any) -> list[int]:
    """Return a document's tokens, without any that the tokenizer would add around them.

    Raises
    ------
    CalibrationError
        If it is a conversation, and the tokenizer has no chat template or its template refuses it.
    """
    text = document.text if document.messages is None else _rendered(document, tokenizer)
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # A long text is fine here: it is cut into windows before the model sees it.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _rendered(document: Document, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{document.place} must have 'text' for this model, whose tokenizer has no chat "
            "template, got 'messages'; use texts, or a model with a template"
        )
    messages = [dict(message) for message in document.messages or ()]
    tools = None if document.tools is None else list(document.tools)
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception as error:
        # Templates are programs: they raise what they like.
        raise CalibrationError(
            f"messages of {document.place} must fit the model's chat template, which says: {error}"
        ) from error
    return str(text)


class Separators:
    """Separator between two documents.

    Attributes
    ----------
    before, after : list of int
        Tokens that the tokenizer puts before a text and after it.
    instead : list of int
        What separates two texts if it puts none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.before, self.after = _around(tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        self.instead = _ids(tokenizer, "\n\n") if end is None else [int(end)]

    def between(self, before: Document, after: list[int]) -> list[int]:
        """Return the tokens between a document and the tokens of the next one."""
        ended = before.messages is not None
        # A template may begin with the same token that the tokenizer puts there.
        begun = bool(self.before) and after[: len(self.before)] == self.before
        found = [] if ended else [*self.after]
        found += [] if begun else self.before
        return found if found or ended or begun else [*self.instead]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before a text and after it."""
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
