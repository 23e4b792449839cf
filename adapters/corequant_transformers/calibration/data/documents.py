"""Documents read from files, and those that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from corequant._validation import join_some
from corequant.errors import CalibrationError
from corequant.storage.files import open_regular
from corequant_transformers.calibration.data.formats import Document, parse
from corequant_transformers.calibration.data.sources import find_files

__all__ = ["CARRIED", "DataFile", "Documents", "carried_documents", "read_documents"]

CARRIED = "the public-domain text that corequant carries"
"""Name of the default calibration data."""


@dataclass(frozen=True)
class DataFile:
    """Record of a file that was read.

    Attributes
    ----------
    name : str
        The file's own name, or its path within the folder that was given.
    format : str
        ``text``, ``JSON lines``, ``JSON array`` or ``Parquet``.
    documents, empty : int
        Documents with text, and those without, which are left out.
    """

    name: str
    format: str
    documents: int
    empty: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents in the order of their files.

    Attributes
    ----------
    entries : tuple of Document
        Those that aren't empty.
    files : tuple of DataFile
    skipped : tuple of str
        Files of folders that aren't data by their names.
    """

    entries: tuple[Document, ...]
    files: tuple[DataFile, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values about the files."""
        return {
            "files": [asdict(file) for file in self.files],
            "skipped": list(self.skipped),
            "documents": len(self.entries),
            "empty": sum(file.empty for file in self.files),
        }


def read_documents(paths: str | Path | Sequence[str | Path]) -> Documents:
    """Read documents from files and folders, each file's format decided by its content.

    Parameters
    ----------
    paths : str, Path or sequence of these
        Files, folders, or ids of data sets in the local Hugging Face cache. A file is one document
        of text (UTF-8); JSON lines or a JSON array of objects with ``text`` or with ``messages``;
        Parquet with a column of one of these names; or, but for Parquet, one of them in gzip. Of a
        folder those files are read whose names end in ``.txt``, ``.json``, ``.jsonl``, ``.ndjson``
        or ``.parquet``.

    Returns
    -------
    Documents

    Raises
    ------
    CalibrationError
        If a file is missing, not UTF-8, of another format or could be of two; names the file and
        line.
    MissingPackageError
        If a file is Parquet, and pyarrow is not installed.

    Examples
    --------
    >>> import tempfile, pathlib, corequant_transformers as cqhf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "chats.jsonl"
    ...     _ = file.write_text('{"messages": [{"role": "user", "content": "Hello"}]}')
    ...     documents = cqhf.read_documents(folder)
    >>> len(documents), documents.files[0].format
    (1, 'JSON lines')
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    found, skipped = find_files(given)
    entries: list[Document] = []
    files: list[DataFile] = []
    for name, path in found:
        kind, documents = parse(name, _read(path))
        held = [d for d in documents if d.messages is not None or d.text.strip()]
        entries += held
        files.append(DataFile(name, kind, len(held), len(documents) - len(held)))
    if not entries:
        names = join_some([file.name for file in files], 6)
        raise CalibrationError(f"the text must not be empty, got only white space in {names}")
    return Documents(tuple(entries), tuple(files), tuple(skipped))


def carried_documents() -> Documents:
    """Return the public-domain text that the package carries: about 45,000 tokens of English prose.

    Excerpts of The World Factbook (of the United States government, 2026), of The Adventures of
    Sherlock Holmes (1892) and of Alice's Adventures in Wonderland (1865), in turn.
    """
    file = resources("corequant_transformers.calibration.data").joinpath("carried.jsonl")
    _, documents = parse("carried.jsonl", file.read_bytes())
    return Documents(tuple(documents), (DataFile(CARRIED, "JSON lines", len(documents), 0),))


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise CalibrationError(
            f"{path} must be a readable UTF-8 or Parquet file: {error}"
        ) from error
