"""Zero-shot tasks in local files of JSON lines: multiple choice and minimal pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corequant._validation import check_index
from corequant.errors import TaskError
from corequant.storage.files import read_text

__all__ = ["CHOICE", "PAIRS", "Item", "Task", "read_task"]

CHOICE, PAIRS = "multiple choice", "minimal pairs"

_CONTEXTS = ("query", "ctx", "context")
_CHOICES = ("choices", "endings")
_ANSWERS = ("gold", "label")
_SENTENCES = (("sentence_good", "sentence_bad"), ("good", "bad"))
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_FIELDS = (
    f"one of {', '.join(_CONTEXTS)}, one of {', '.join(_CHOICES)} and one of "
    f"{', '.join(_ANSWERS)} (multiple choice), or {' or '.join(map(' and '.join, _SENTENCES))} "
    "(minimal pairs)"
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    context : str
        What the choices continue, after a space; empty for minimal pairs.
    choices : tuple of str
    gold : int
        Index of the right one; 0, the good sentence, for minimal pairs.
    """

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes
    ----------
    name : str
    kind : {'multiple choice', 'minimal pairs'}
    items : tuple of Item
    """

    name: str
    kind: str
    items: tuple[Item, ...]


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """Read a file of JSON lines, whose fields tell what kind of task it is.

    Parameters
    ----------
    path : str or Path
        A JSON object a line. Multiple choice has a context in ``query``, ``ctx`` or ``context``,
        choices in ``choices`` or ``endings``, and in ``gold`` or ``label`` the right one, as its
        index or its text; the first of these names that a line has counts. HellaSwag's own fields
        (``activity_label``, ``ctx_a``, ``ctx_b``, ``endings``, ``label``) are cleaned and put
        together as lm-evaluation-harness does. Minimal pairs have ``sentence_good`` and
        ``sentence_bad``, or ``good`` and ``bad``. Other fields are not looked at.
    limit : int, optional
        Number of lines to read, from the first; all by default.

    Returns
    -------
    Task
        Named after the file and the folder that the path names.

    Raises
    ------
    TaskError
        If the file can't be read or is empty, or a line isn't such an object, or of another kind
        than the first. Names the line.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from corequant_transformers.evaluation.task_files import read_task
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "animals.jsonl"
    ...     line = '{"ctx": "A cat says", "endings": ["woof.", "meow."], "label": 1}'
    ...     size = file.write_text(line)
    ...     task = read_task(file)
    >>> task.kind, task.items[0].choices, task.items[0].gold
    ('multiple choice', ('woof.', 'meow.'), 1)
    """
    file = Path(path)
    most = None if limit is None else check_index("limit", limit)
    kind = ""
    items: list[Item] = []
    for number, line in _lines(file):
        if most is not None and len(items) == most:
            break
        where = f"line {number} of {file}"
        found, item = _item(where, _object(where, line))
        if items and found != kind:
            raise TaskError(
                f"{where} must be of the same kind as the first line, {kind}, got {found}"
            )
        kind = found
        items.append(item)
    if not items:
        raise TaskError(f"{file} must hold one JSON object per line, got an empty file")
    return Task("/".join([*file.parts[-2:-1], file.stem]).removeprefix("/"), kind, tuple(items))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks must be a readable UTF-8 file of JSON lines: {error}") from error
    # Not splitlines: strings of JSON may hold other line separators than this one.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where} must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise TaskError(f"{where} must be a JSON object, got {line.strip()[:40]!r}")
    return value


def _item(where: str, fields: dict[str, Any]) -> tuple[str, Item]:
    """Return the kind of a line and what it asks."""
    choices = next((name for name in _CHOICES if name in fields), None)
    sentences = next((names for names in _SENTENCES if set(names) <= set(fields)), None)
    if (choices is None) == (sentences is None):
        raise TaskError(f"{where} must have {_FIELDS}, got {', '.join(map(str, fields)) or 'none'}")
    if sentences is not None:
        return PAIRS, Item("", tuple(_text(where, fields, name) for name in sentences), 0)
    assert choices is not None
    if set(_HELLASWAG) <= set(fields) and not {"query", "choices"} & set(fields):
        return CHOICE, _hellaswag(where, fields)
    context = next((name for name in _CONTEXTS if name in fields), None)
    answer = next((name for name in _ANSWERS if name in fields), None)
    if context is None or answer is None:
        raise TaskError(f"{where} must have {_FIELDS}, got {', '.join(map(str, fields))}")
    given = fields[context]
    if not isinstance(given, str) or (given and not given.strip()):
        raise TaskError(f"{context} in {where} must be empty or text, got {str(given)[:40]!r}")
    return CHOICE, _choice(where, given, _texts(where, fields, choices), fields[answer], answer)


def _choice(where: str, context: str, choices: tuple[str, ...], answer: Any, name: str) -> Item:
    places = [index for index, choice in enumerate(choices) if choice == answer]
    if isinstance(answer, str) and answer.strip().isdecimal():
        places.append(int(answer))
    elif isinstance(answer, int) and not isinstance(answer, bool):
        places = [answer]
    if len(set(places)) != 1 or not 0 <= places[0] < len(choices):
        raise TaskError(
            f"{name} in {where} must name one of the {len(choices)} choices, by its index from 0 "
            f"or its text, got {str(answer)[:40]!r}"
        )
    return Item(context, choices, places[0])


def _texts(where: str, fields: dict[str, Any], name: str) -> tuple[str, ...]:
    given = fields[name]
    if not isinstance(given, list) or len(given) < 2:
        raise TaskError(f"{name} in {where} must be a list of two or more, got {str(given)[:40]!r}")
    return tuple(_text(where, {name: choice}, name) for choice in given)


def _text(where: str, fields: dict[str, Any], name: str) -> str:
    text = fields[name]
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{name} in {where} must be text, got {str(text)[:40]!r}")
    return text


def _hellaswag(where: str, fields: dict[str, Any]) -> Item:
    activity, first = (_text(where, fields, name) for name in ("activity_label", "ctx_a"))
    second = fields["ctx_b"]
    if not isinstance(second, str):
        raise TaskError(f"ctx_b in {where} must be a string, got {str(second)[:40]!r}")
    context = _cleaned(f"{activity}: {first} {second.capitalize()}")
    endings = [_cleaned(text) for text in _texts(where, fields, "endings")]
    choices = _texts(where, {"endings": endings}, "endings")
    return _choice(where, context, choices, fields["label"], "label")


def _cleaned(text: str) -> str:
    """Remove what WikiHow's markup left in HellaSwag's texts."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
