"""Files and folders that calibration data is read from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from corequant._validation import join_some
from corequant.errors import CalibrationError
from corequant_transformers.calibration.data.formats import JSON_SUFFIXES
from corequant_transformers.files.hub import download_command, locate

__all__ = ["find_files"]

_SUFFIXES = (".txt", ".parquet", *JSON_SUFFIXES)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")
"""Files that the data set library writes next to them."""

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
}


def find_files(paths: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the files that paths name, with names for reports, and the other files of folders.

    Parameters
    ----------
    paths : sequence of str or Path
        Files, folders, which are searched with all folders in them, or ids of data sets in the
        local Hugging Face cache, each followed by a path within it or not.

    Returns
    -------
    files : list of (str, Path)
        In the order of ``paths``, those of a folder by name.
    skipped : list of str
        Files of folders whose names don't end in ``.txt``, ``.json``, ``.jsonl``, ``.ndjson`` or
        ``.parquet``, also with ``.gz`` after it.

    Raises
    ------
    CalibrationError
        If nothing is there, a file is given twice, a folder has no file to read, or has files of
        several splits (train, test, validation), of which one has to be named.
    """
    if not paths:
        raise CalibrationError("calibration data must be at least one file or folder, got none")
    files: list[tuple[str, Path]] = []
    skipped: list[str] = []
    for path in paths:
        found = locate(path, "dataset")
        if _is_folder(Path(path), found):
            inside, others = _inside(Path(path), found)
            files += inside
            skipped += others
        else:
            files.append((found.name, found))
    seen: dict[Path, str] = {}
    for name, file in files:
        real = file.resolve()
        if real in seen:
            raise CalibrationError(
                f"{file} must be given only once, got it as {seen[real]} and as {name}"
            )
        seen[real] = name
    return files, skipped


def _is_folder(given: Path, found: Path) -> bool:
    """Return whether a path is a folder, not a file; a missing one is an error."""
    try:
        if found.exists():
            return found.is_dir()
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{given} must be a readable UTF-8 file or a folder: {error}"
        ) from None
    command = None if given.suffix in _SUFFIXES else download_command(given, "dataset")
    hint = f"; if it is the id of a data set, get it with: {command}" if command else ""
    raise CalibrationError(
        f"{given} must be a readable UTF-8 or Parquet file, a folder of such files, or the id of a "
        f"data set in the local Hugging Face cache; found none of these{hint}"
    )


def _inside(given: Path, folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    try:
        every = sorted(_walk(folder), key=lambda f: f.relative_to(folder).parts)
    except OSError as error:
        raise CalibrationError(f"{given} must be a readable folder: {error}") from error
    names = [file.relative_to(folder).as_posix() for file in every]
    files = [(name, file) for name, file in zip(names, every, strict=True) if _is_data(file.name)]
    skipped = [name for name, file in zip(names, every, strict=True) if not _is_data(file.name)]
    if not files:
        raise CalibrationError(
            f"{given} must hold files whose names end in {', '.join(_SUFFIXES)} (or these and "
            f".gz), got {join_some(names, 6)}"
        )
    splits = {split: name for name, _ in reversed(files) for split in _splits(name)}
    if len(splits) > 1:
        examples = ", ".join(f"{given.as_posix()}/{splits[split]}" for split in sorted(splits))
        raise CalibrationError(
            f"{given} must hold files of one split, got {' and '.join(sorted(splits))}; pass "
            f"the files of one of them, such as {examples}"
        )
    return files, skipped


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        # A link to a folder could lead to one above it.
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif not path.is_dir():
            yield path


def _is_data(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(_SUFFIXES) and name not in _ABOUT


def _splits(name: str) -> set[str]:
    """Return the splits in a name: train in ``data/train-00000-of-00001.parquet``."""
    return {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}
