"""SHA-256 of what was written, so that damage is noticed before a number is computed with it.

``corequant.sha256`` lists the files of a directory as ``sha256sum`` does, and ``sha256sum -c``
checks it. Two directories of one model, made in another run, have the same list: what is about the
run itself, ``report.json``, ``log.jsonl`` and the model card, isn't in it. The report carries the
digests of these and its own, for which zeros stand while it is computed. A GGUF file carries its
own in the same way.

This is about accidents: a disk or a transfer that lost bits, a file that was edited, exchanged,
removed or added. Anyone who can change files on purpose can change the list as well, unless it is
kept elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corequant._cpu.processors import processor_count
from corequant.errors import CheckpointError
from corequant.storage.files import json_text, open_regular, read_text
from corequant_transformers.files.atomic import read_json
from corequant_transformers.files.companions import TEMPLATES, is_tokenizers
from corequant_transformers.files.marks import CARD

__all__ = [
    "DIGESTS",
    "GGUF_DIGEST",
    "GGUF_VERSION",
    "REPORT",
    "check_digests",
    "checking",
    "is_read",
    "pieces",
    "report_digests",
    "seal_gguf",
    "sealed_report",
    "write_digests",
]

DIGESTS = "corequant.sha256"
REPORT, LOG = "report.json", "log.jsonl"
GGUF_DIGEST, GGUF_VERSION = "corequant.sha256", "corequant.version"

_UNREAD = (".md", ".html", ".gguf")
"""Suffixes of files that may lie next to a model: its documentation and exports."""

_FIELD = "digests"
_BLANK = "0" * 64
_LINE = re.compile(rf"([0-9a-f]{{64}})  ((?:{TEMPLATES}/)?[^\n\r/\0]+)")
_READERS = 4
_GGUF_HEAD = 4096
_GGUF_LEAST = 24
"""Bytes of the smallest GGUF file: the word, its version, and two counts of nothing."""

_GGUF_FIELD = b"%s%s\x08\0\0\0%s" % (
    len(GGUF_DIGEST).to_bytes(8, "little"),
    GGUF_DIGEST.encode(),
    len(_BLANK).to_bytes(8, "little"),
)
"""Key, the type string, and length, which precede the digest."""


def pieces(folder: Path) -> list[str]:
    """Return the names of all files in a directory, and in its folder of chat templates."""
    names = [f.name for f in folder.iterdir() if not (f.name == TEMPLATES and f.is_dir())]
    if (folder / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{f.name}" for f in (folder / TEMPLATES).iterdir()]
    return sorted(names)


def write_digests(folder: Path) -> None:
    """Write the list for all files in a directory but those about the run."""
    # An export has no report.
    apart = {DIGESTS, *((REPORT, LOG, CARD) if (folder / REPORT).exists() else ())}
    names = [name for name in pieces(folder) if name not in apart]
    text = "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)
    (folder / DIGESTS).write_bytes(text.encode())


def sealed_report(
    report: Mapping[str, Any], folder: Path, digests: Mapping[str, str] | None = None
) -> str:
    """Return the text of a directory's report, with the digests of log and card and its own.

    Parameters
    ----------
    report : mapping
        Plain values.
    folder : Path
        Directory of log and card, if there are any.
    digests : mapping, optional
        Digests of log and card, if they are known.
    """
    if digests is None:
        digests = {name: _sha256(folder / name) for name in (LOG, CARD) if (folder / name).exists()}
    values = {name: value for name, value in report.items() if name != _FIELD}
    text = json_text({**values, _FIELD: {**digests, REPORT: _BLANK}})
    own = hashlib.sha256(text.encode()).hexdigest()
    before, _, after = text.rpartition(_BLANK)
    return f"{before}{own}{after}"


def report_digests(folder: Path) -> dict[str, str]:
    """Return the digests of log and card that a report has, once it has been found unharmed.

    Raises
    ------
    CheckpointError
        If the report isn't as it was written, or the directory has no digests.
    """
    if _read_list(folder) is None:
        raise CheckpointError(f"{folder} was written before corequant kept digests")
    return {name: own for name, own in _report_digests(folder).items() if name != REPORT}


def check_digests(path: str | Path, wanted: Callable[[str], bool] | None = None) -> int | None:
    """Compare files with the digests that were written with them.

    Parameters
    ----------
    path : str or Path
        A directory that ``quantize`` or ``export`` wrote, or a GGUF file of ``export``.
    wanted : callable, optional
        Tells by their names which files of a directory are compared; all by default. In any case
        none may have been added that a reader would read.

    Returns
    -------
    int or None
        Number of files that were compared; None where there are no digests.

    Raises
    ------
    CheckpointError
        If a file isn't as it was written, is missing, or was added; names it.

    Examples
    --------
    >>> import tempfile, numpy as np, corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> tokens = np.arange(64).reshape(2, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model, recipe = cqhf.tiny_model("llama"), Recipe(block_size=16)
    ...     _ = cqhf.quantize(model, recipe, tokens, f"{folder}/out")
    ...     cqhf.check_digests(f"{folder}/out")
    6
    """
    path = Path(path)
    if not path.is_dir():
        return _check_gguf(path)
    listed = _read_list(path)
    if listed is None:
        return None
    # Without report and log a list is that of an export.
    digests = dict(listed)
    if "recipe.toml" in listed:
        digests |= _report_digests(path)
    _check_names(path, set(digests))
    names = [name for name in digests if name != REPORT and (wanted is None or wanted(name))]
    with ThreadPoolExecutor(min(_READERS, processor_count())) as pool:
        for name, found in zip(names, pool.map(_sha256, (path / n for n in names)), strict=True):
            if found != digests[name]:
                raise _changed(path / name)
    return len(names) + (REPORT in digests)


@contextmanager
def checking(path: Path, *, verify: bool = True) -> Iterator[None]:
    """Compare a directory with its digests while it is read, and raise at the end what was found.

    What can't be read at all has its own errors, which say more.

    Raises
    ------
    CheckpointError
        As ``check_digests``.

    Warns
    -----
    UserWarning
        If the directory is one that ``quantize`` wrote before there were digests.
    """
    if not verify:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(check_digests, path, is_read)
        yield
        count = found.result()
    if count is None and path.is_dir():
        warn_of_none(path)


def warn_of_none(folder: Path) -> None:
    """Warn that a directory that ``quantize`` wrote has no digests."""
    # At the line that called us, however many of our functions are in between.
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{folder} was written before corequant kept digests, so that damage to its files may go "
        "unnoticed; quantize or save the model again to add them",
        stacklevel=level,
    )


def _is_ours(module: Any) -> bool:
    # Decorators that are context managers have a frame of their own.
    root = str(module).partition(".")[0]
    return root in ("corequant", "corequant_torch", "corequant_transformers", "contextlib")


def _sha256(file: Path) -> str:
    try:
        with open_regular(file) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, which {DIGESTS} lists") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is not as it was written: its SHA-256 differs; restore it, or, if it was changed "
        f"on purpose, read it with verify=False (--no-verify), or remove {DIGESTS} from an export"
    )


def _read_list(folder: Path) -> dict[str, str] | None:
    file = folder / DIGESTS
    if not os.path.lexists(file):
        settings = read_json(folder / "config.json").get("quantization_config")
        if isinstance(settings, dict) and settings.get(_FIELD) == DIGESTS:
            raise CheckpointError(f"{file} is missing, which lists the digests of the others")
        return None
    try:
        text = read_text(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    *lines, end = text.split("\n")
    found = [_LINE.fullmatch(line) for line in lines]
    names = [match[2] for match in found if match is not None]
    if end or not names or len(names) < len(lines) or len(set(names)) < len(names):
        raise _changed(file)
    return {match[2]: match[1] for match in found if match is not None}


def _report_digests(folder: Path) -> dict[str, str]:
    """Return the digests that the report has: its own, the log's and the card's."""
    file = folder / REPORT
    digests = read_json(file).get(_FIELD)
    if not isinstance(digests, dict) or not {REPORT} <= set(digests) <= {REPORT, LOG, CARD}:
        raise _changed(file)
    own = digests[REPORT]
    with open_regular(file) as opened:
        data = opened.read()
    if not isinstance(own, str) or len(own) != len(_BLANK) or not own.isascii():
        raise _changed(file)
    before, _, after = data.rpartition(own.encode())
    if hashlib.sha256(before + _BLANK.encode() + after).hexdigest() != own:
        raise _changed(file)
    return digests


def _check_names(folder: Path, known: set[str]) -> None:
    # A model without a tokenizer may be given one later.
    has_tokenizer = any(is_tokenizers(name) for name in known)
    for name in pieces(folder):
        file = folder / name
        if name in known or name == DIGESTS or _is_unread(file):
            continue
        if not has_tokenizer and is_tokenizers(name):
            continue
        raise CheckpointError(
            f"{file} is not among the files that {DIGESTS} lists, and may change what the others "
            "say; remove it, or read the directory with verify=False (--no-verify)"
        )


def is_read(name: str) -> bool:
    """Return whether a file that is listed has a part in what is loaded; a model card has none."""
    return not name.endswith(_UNREAD)


def _is_unread(file: Path) -> bool:
    """Return whether a file that was added is never read when the model is loaded."""
    if file.is_dir():
        return True
    if file.parent.name == TEMPLATES:
        return file.suffix != ".jinja"
    return file.name.startswith(".") or file.suffix in _UNREAD


# ---- GGUF


def seal_gguf(file: Path) -> None:
    """Put a GGUF file's digest where zeros stand for it, within its first few fields."""
    place = _place_in(file)
    if place is None:
        raise ValueError(f"{file} has no room for a digest")
    digest = _gguf_sha256(file, place)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(digest.encode())


def _check_gguf(file: Path) -> int | None:
    try:
        place = _place_in(file)
        if place is None:
            return None
        with open_regular(file) as opened:
            opened.seek(place)
            own = opened.read(len(_BLANK))
        found = _gguf_sha256(file, place)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} can't be read: {error}") from error
    if found.encode() != own:
        raise CheckpointError(
            f"{file} is not as it was written: its SHA-256 differs from its field {GGUF_DIGEST}; "
            "export it again"
        )
    return 1


def _place_in(file: Path) -> int | None:
    with open_regular(file) as opened:
        head = opened.read(_GGUF_HEAD)
    if len(head) < _GGUF_LEAST or not head.startswith(b"GGUF"):
        raise CheckpointError(
            f"{file} must be a directory or a GGUF file, whose first word is GGUF and which has "
            f"{_GGUF_LEAST} bytes at least, got a file that begins with {head[:4]!r}, of "
            f"{file.stat().st_size} bytes"
        )
    start = head.find(_GGUF_FIELD)
    if start < 0:
        if GGUF_VERSION.encode() in head:
            raise CheckpointError(f"{file} is not as it was written: it lacks its {GGUF_DIGEST}")
        return None
    return start + len(_GGUF_FIELD)


def _gguf_sha256(file: Path, place: int) -> str:
    found = hashlib.sha256()
    with open_regular(file) as opened:
        found.update(opened.read(place) + _BLANK.encode())
        opened.seek(place + len(_BLANK))
        while piece := opened.read(2**20):
            found.update(piece)
    return found.hexdigest()
