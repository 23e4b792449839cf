"""Files next to a model's weights: tokenizer, processor, generation config, licence."""

from __future__ import annotations

import fnmatch

__all__ = ["TEMPLATES", "is_copied", "is_tokenizers"]

TEMPLATES = "additional_chat_templates"
"""The one folder next to a tokenizer's files that is read: its files that end in ``.jinja``."""

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
)
_OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


def is_copied(name: str) -> bool:
    """Return whether a file belongs to tokenizer, processor or generation, and is copied."""
    return _matches(name, _TOKENIZER + _OTHERS)


def is_tokenizers(name: str) -> bool:
    """Return whether a file, by its name within a model's directory, is the tokenizer's."""
    return _matches(name, _TOKENIZER) or name.startswith(f"{TEMPLATES}/")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
