"""Words from files, as a terminal may see them."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

__all__ = ["marked", "plain"]


def plain(value: Any) -> str:
    r"""Return a value's text with whatever a terminal would obey written as an escape.

    Control characters, those that change the direction of a line, and halves of pairs, which names
    of files in other encodings come as, can't be printed.

    Examples
    --------
    >>> from corequant_cli.plain import plain
    >>> print(plain("a\x1b[31mb\u202e"))
    a\x1b[31mb\u202e
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def marked(value: Any) -> str:
    """Return the same for rich, where square brackets are no markup."""
    return escape(plain(value))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
