"""The origin of a model by its files: its id on a hub, and its licence."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corequant_transformers.model.sources import Source

__all__ = ["origin_of"]

_HEAD = 1 << 16
"""Bytes of a file that are read."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.DOTALL | re.MULTILINE)
_LINE = re.compile(r"^license:[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*$", re.MULTILINE)
_HUB = "https://huggingface.co/"

_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Sizes of GGUF's types of numbers, in bytes."""

_STRING, _ARRAY = 8, 9


def origin_of(source: Source) -> dict[str, str]:
    """Return what is known of a model on disk: ``base_model`` and ``license``, or neither.

    Parameters
    ----------
    source : Source
        A directory, whose place in the Hugging Face cache has its id and whose model card has its
        licence, or a GGUF file, whose first fields may have both.
    """
    if source.is_gguf:
        fields = dict(_general(source.path))
        address = fields.get("general.base_model.0.repo_url", fields.get("general.repo_url", ""))
        name = address.removeprefix(_HUB).strip("/") if address.startswith(_HUB) else ""
        licence = fields.get("general.license", "")
    else:
        name, licence = _cached_id(source.path), _card_licence(source.path)
    found = {}
    if _ID.fullmatch(name):
        found["base_model"] = name
    if _LICENCE.fullmatch(licence):
        found["license"] = licence
    return found


def _cached_id(folder: Path) -> str:
    snapshot = folder.resolve()
    repository = snapshot.parent.parent.name
    if snapshot.parent.name != "snapshots" or not repository.startswith("models--"):
        return ""
    return repository.removeprefix("models--").replace("--", "/")


def _card_licence(folder: Path) -> str:
    file = folder / "README.md"
    if not file.is_file():
        return ""
    front = _FRONT.search(_head(file).decode("utf-8", "replace"))
    found = None if front is None else _LINE.search(front[1])
    return "" if found is None else found[1]


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_HEAD)
    except OSError:
        return b""


def _general(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts among the first fields of a GGUF file."""
    reader = _Fields(_head(file))
    try:
        reader.take(8 + 8)
        for _ in range(reader.number("<Q")):
            key, kind = reader.text(), reader.number("<I")
            value = reader.value(kind)
            if key.startswith("general.") and isinstance(value, str):
                yield key, value
    except (IndexError, KeyError, UnicodeDecodeError):
        # Truncated or malformed: reading the model reports it.
        return


class _Fields:
    """The fields of a GGUF file's beginning, one after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def take(self, size: int) -> bytes:
        found = self._data[self._place : self._place + size]
        if len(found) < size:
            raise IndexError
        self._place += size
        return found

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_NUMBERS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _NUMBERS:
            return self.take(_NUMBERS[inner] * count)
        # Each takes bytes of what was read, so that a wrong count ends.
        return [self.value(inner) for _ in range(count)]
