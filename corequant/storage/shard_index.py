"""The index of a sharded model, validated together with the files that it names.

Source: ``model.safetensors.index.json``, as Transformers writes it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from corequant.errors import CheckpointError
from corequant.storage.files import read_text
from corequant.storage.tensor_file import TensorFile

__all__ = ["check_homes", "is_plain", "read_index"]

LONGEST_INDEX = 100_000_000
"""Bytes; a tensor's name and file take about a hundred."""

_TOTAL_FACTOR = 4
"""How far ``total_size`` may be off: writers count tied tensors twice, or in another dtype."""


def read_index(path: str | Path) -> dict[str, Path]:
    """Read an index and the headers of all its files, and return each tensor's file.

    Parameters
    ----------
    path : str or Path
        The index file; the files that it names lie in its folder.

    Returns
    -------
    dict of str to Path

    Raises
    ------
    CheckpointError
        If the index is malformed or too long, or names a tensor twice or a file outside its folder;
        if a file is missing or malformed, or holds another set of tensors than the index says; or
        if ``total_size`` is nowhere near the size of the tensors.

    Examples
    --------
    >>> import json, tempfile, numpy as np
    >>> from pathlib import Path
    >>> from corequant.storage.shard_index import read_index
    >>> from corequant.storage.tensor_file import RawTensor, write_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/one.safetensors", {"x": RawTensor.of(np.arange(3))})
    ...     index = Path(folder) / "index.json"
    ...     text = '{"metadata": {"total_size": 24}, "weight_map": {"x": "one.safetensors"}}'
    ...     _ = index.write_text(text)
    ...     read_index(index)["x"].name
    'one.safetensors'
    """
    path = Path(path)
    values = _read(path)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} must map tensor names to files, got no weight_map")
    files: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        files.setdefault(_checked(path, name, file_name), set()).add(name)
    total = 0
    for file_name, expected in sorted(files.items()):
        file = TensorFile(path.parent / file_name)
        found = set(file.names)
        for name in sorted(expected - found):
            raise CheckpointError(f"{path} says that {file_name} holds {name!r}, which it doesn't")
        for name in sorted(found - expected):
            where = weight_map.get(name)
            says = "doesn't name it" if where is None else f"says that it is in {where}"
            raise CheckpointError(f"{file.path} holds {name!r}, but {path.name} {says}")
        total += sum(last - first for _, _, first, last in file.entries.values())
    _check_total(path, values.get("metadata"), total)
    return {name: path.parent / file_name for name, file_name in weight_map.items()}


def check_homes(path: str | Path) -> None:
    """Raise CheckpointError if an unused index names files outside its folder.

    Its files may be missing, or it may be malformed: it is left over from another model.

    Parameters
    ----------
    path : str or Path
        The index file.
    """
    try:
        weight_map = _read(Path(path)).get("weight_map")
    except CheckpointError:
        return
    if isinstance(weight_map, dict):
        for name, file_name in weight_map.items():
            _checked(Path(path), name, file_name)


def _checked(path: Path, name: str, file_name: Any) -> str:
    if not isinstance(file_name, str) or not is_plain(file_name):
        raise CheckpointError(
            f"{path} must name files of its own folder, got {str(file_name)[:80]!r} for {name!r}"
        )
    return file_name


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_INDEX:
            raise CheckpointError(f"{path} must be at most {LONGEST_INDEX} bytes long")
        values = json.loads(read_text(path), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name[:80]!r} occurs twice")
        values[name] = value
    return values


def is_plain(name: str) -> bool:
    """Return whether a name is that of a file in the same folder, on any system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0") and len(name) < 256


def _check_total(path: Path, metadata: Any, total: int) -> None:
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is None and (metadata is None or isinstance(metadata, dict)):
        return
    if not isinstance(said, int | float) or isinstance(said, bool) or not 0 <= said < math.inf:
        raise CheckpointError(f"total_size of {path} must be a number of bytes, got {said!r}")
    if total > _TOTAL_FACTOR * said or said > _TOTAL_FACTOR * total:
        raise CheckpointError(
            f"total_size of {path} must be near the {total} bytes of its tensors, got {said}"
        )
