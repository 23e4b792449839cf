"""Formats of files of documents, detected by their content.

Text, JSON lines, a JSON array or Parquet; text and JSON also compressed with gzip. A file that
could be read in two ways is refused: prose taken for records, or records for prose, would calibrate
a model on something that was not intended.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from corequant._validation import join_some, need_packages
from corequant.errors import CalibrationError

__all__ = ["JSON_SUFFIXES", "Document", "parse"]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
"""Suffixes of JSON files."""

_TABLES = (".csv", ".tsv")
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it, or compress it with gzip",
    b"\xfd7zXZ\x00": "is compressed with xz; decompress it, or compress it with gzip",
    b"PK\x03\x04": "is a ZIP archive; unpack it and name the files in it",
    b"ARROW1\x00\x00": "is an Arrow file; write it as Parquet",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
}
_COLUMNS = ("text", "messages")
_BEGINS_LIKE_JSON = re.compile(r"(\[\s*)?\{\s*[\"']|\[\s*\]\s*\Z")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation that a chat template makes a text of.

    Attributes
    ----------
    text : str
        Empty for a conversation.
    messages : tuple of mapping, optional
        Each with a role and content, as ``apply_chat_template`` takes them.
    tools : tuple, optional
        Descriptions of the tools that a conversation may call.
    place : str
        File, and line or row from 1, that it comes from.
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Any, ...] | None = None
    place: str = ""


def parse(name: str, data: bytes) -> tuple[str, list[Document]]:
    r"""Return the format of a file's bytes, and its documents.

    Parameters
    ----------
    name : str
        Name for messages. Its end decides nothing, but ``.json`` and its like must hold JSON and
        ``.parquet`` Parquet; ``.csv`` and ``.tsv`` are refused.
    data : bytes

    Returns
    -------
    format : str
        ``text``, ``JSON lines``, ``JSON array`` or ``Parquet``.
    documents : list of Document

    Raises
    ------
    CalibrationError
        If the bytes have none of these formats, or could have two of them.
    MissingPackageError
        If they are Parquet, and pyarrow is not installed.

    Examples
    --------
    >>> from corequant_transformers.calibration.data.formats import parse
    >>> kind, documents = parse("a.txt", b'{"text": "one"}\n{"text": "two"}\n')
    >>> kind, [document.text for document in documents]
    ('JSON lines', ['one', 'two'])
    """
    plain = name.lower().removesuffix(".gz")
    if data.startswith(_GZIP):
        data = _decompressed(name, data)
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise CalibrationError(f"{name} {what}")
    if plain.endswith(_TABLES):
        raise CalibrationError(
            f"{name} has the suffix of a table; save it as JSON lines or Parquet with a column "
            "'text'"
        )
    if data.startswith(_PARQUET):
        return "Parquet", list(_rows(name, data))
    if plain.endswith(".parquet"):
        raise CalibrationError(f"{name} must be Parquet, got a file that begins with {data[:4]!r}")
    return _parse_text(name, _decoded(name, data), named_json=plain.endswith(JSON_SUFFIXES))


def _decompressed(name: str, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{name} must be complete gzip data, got {error}") from error


def _decoded(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{name} must be readable UTF-8, got {error} (line {line})"
        ) from None
    at = text.find("\0")
    if at >= 0:
        raise CalibrationError(f"{name} must be text, got a zero byte in line {_line(text, at)}")
    return text


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _parse_text(name: str, text: str, *, named_json: bool) -> tuple[str, list[Document]]:
    body = text.lstrip()
    if not body:
        return "text", []
    if body[0] in "[{":
        array = _array(name, body)
        if array is not None:
            return "JSON array", array
    # Not ``splitlines``: strings of JSON may hold characters that end a line for it.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    values = [_object(line) for _, line in lines]
    objects = sum(value is not None for value in values)
    if objects == len(lines):
        records = zip(lines, values, strict=True)
        return "JSON lines", _same_kind(_record(f"{name}:{n}", v) for (n, _), v in records)
    known = next((k for k, v in enumerate(values) if v is not None and _is_record(v)), None)
    if known is None and not named_json and not _BEGINS_LIKE_JSON.match(body):
        return "text", [Document(text, place=name)]
    wrong = values.index(None)
    problem = _problem(lines[wrong][1])
    if known is None:
        raise CalibrationError(
            f"{name} must be text or JSON; its {'name' if named_json else 'beginning'} is that of "
            f"JSON, but line {lines[wrong][0]} is not a JSON object: {problem}"
        )
    raise CalibrationError(
        f"{name} must be either text or JSON lines, got both: line {lines[known][0]} is a record, "
        f"and line {lines[wrong][0]} is not a JSON object: {problem}"
    )


def _array(name: str, body: str) -> list[Document] | None:
    """Return the documents of one JSON array; None if the text isn't one JSON value."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        return _same_kind(_record(f"{name}[{k}]", entry) for k, entry in enumerate(value))
    # One object in one line is JSON lines.
    if "\n" not in body.rstrip():
        return None
    raise CalibrationError(
        f"{name} must be JSON lines, one object per line, or an array of objects, got one object "
        f"that spans several lines, with the keys {join_some([*value], 8)}"
    )


def _object(line: str) -> dict[str, Any] | None:
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _problem(line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"{line.strip()[:40]!r} ({error})"
    return f"{line.strip()[:40]!r} is a JSON {type(value).__name__}"


def _is_record(value: Mapping[str, Any]) -> bool:
    return any(column in value for column in _COLUMNS)


def _column(place: str, found: list[str]) -> str:
    """Return the column that the table has of the two; both or none is an error."""
    held = [column for column in _COLUMNS if column in found]
    if len(held) == 1:
        return held[0]
    raise CalibrationError(
        f"{place} must have either 'text' or 'messages', got "
        f"{'both' if held else join_some(found, 8)}"
    )


def _record(place: str, value: Any) -> Document:
    if not isinstance(value, dict):
        raise CalibrationError(
            f"{place} must be an object with 'text' or 'messages', got {type(value).__name__}"
        )
    if _column(place, list(value)) == "text":
        text = value["text"]
        if not isinstance(text, str):
            raise CalibrationError(f"text of {place} must be a string, got {_shown(text)}")
        _check_encodable(place, text)
        return Document(text, place=place)
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise CalibrationError(f"tools of {place} must be a list, got {_shown(tools)}")
    messages = _messages(place, value["messages"])
    return Document(messages=messages, tools=tuple(tools) if tools else None, place=place)


def _messages(place: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise CalibrationError(f"messages of {place} must be a non-empty list, got {_shown(value)}")
    found = []
    for k, message in enumerate(value):
        where = f"messages[{k}] of {place}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CalibrationError(
                f"{where} must have a role and content, such as "
                f'{{"role": "user", "content": "..."}}, got {_shown(message)}'
            )
        # Parquet has every key in every message, with null where there was none.
        held = {key: entry for key, entry in message.items() if entry is not None}
        if not isinstance(held.get("content", ""), str):
            raise CalibrationError(
                f"content of {where} must be a string, got {_shown(held['content'])}"
            )
        if "content" not in held and "tool_calls" not in held:
            raise CalibrationError(f"{where} must have content, got {_shown(message)}")
        _check_encodable(where, json.dumps(held, ensure_ascii=False, default=str))
        found.append(held)
    return tuple(found)


def _check_encodable(place: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{place} must be valid Unicode, got an unpaired surrogate "
            f"({text[error.start : error.start + 1]!a})"
        ) from None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _same_kind(documents: Iterator[Document]) -> list[Document]:
    """Return documents that are all texts or all conversations."""
    found = list(documents)
    for document in found:
        if (document.messages is None) != (found[0].messages is None):
            kind = "text" if document.messages is None else "messages"
            first = "messages" if document.messages is None else "text"
            raise CalibrationError(
                f"{document.place} must have {first!r} as {found[0].place} does, got {kind!r}"
            )
    return found


def _rows(name: str, data: bytes) -> Iterator[Document]:
    if not data.endswith(_PARQUET):
        raise CalibrationError(f"{name} must be a complete Parquet file, got a truncated one")
    need_packages(f"reading the Parquet file {name}", "data", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = list(file.schema_arrow.names)
        column = _column(name, names)
        wanted = [column, "tools"] if column == "messages" and "tools" in names else [column]
        row = 0
        for batch in file.iter_batches(columns=wanted):
            for value in batch.to_pylist():
                row += 1
                yield _record(f"{name}:{row}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{name} must be readable Parquet, got {error}") from error
