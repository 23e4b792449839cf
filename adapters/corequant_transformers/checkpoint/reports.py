"""Reports of directories, checked before anything shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corequant.errors import CheckpointError
from corequant_transformers.files.atomic import read_json

__all__ = ["read_report"]

_NUMBER, _MAYBE, _WORDS = "a number", "a number or null", "a string"
_TAKEN = {"windows": _NUMBER, "sequence_length": _NUMBER}
_READ = {
    "documents": _NUMBER,
    "documents_used": _NUMBER,
    "empty": _NUMBER,
    "separators": _NUMBER,
    "separator": _WORDS,
    "sampling": _WORDS,
    "seed": _NUMBER,
}
_REGION = {
    "mean_block_mass": _NUMBER,
    "largest_block_mass": _NUMBER,
    "largest_block_mass_permuted": _NUMBER,
}
_ROUNDED = {
    "method": _WORDS,
    "loss_nearest": _MAYBE,
    "loss": _MAYBE,
    "relative_damping": _MAYBE,
    "damping_tries": _MAYBE,
    "dead_columns": _MAYBE,
    "seconds": _NUMBER,
    "peak_rss_mib": _NUMBER,
}


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a directory that ``quantize`` wrote.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    dict

    Raises
    ------
    CheckpointError
        If it is missing or malformed, or a value isn't what is written there; names it.
    """
    file = folder / "report.json"
    report = read_json(file)
    found = report.get("verification", {})
    _check_fields(file, "verification", found, {"logits_error": _NUMBER})
    if "calibration" in report:
        _check_data(file, report["calibration"])
    for kind, fields, alone in (
        ("regions", _REGION, _is_idle),
        ("matrices", _ROUNDED, _is_plain),
    ):
        rows = report.get(kind, [])
        if not isinstance(rows, list):
            raise CheckpointError(f"{kind} of {file} must be a list, got {str(rows)[:40]!r}")
        for index, row in enumerate(rows):
            where = f"{kind}[{index}]"
            _check_fields(file, where, row, {"name": _WORDS})
            if not alone(row):
                _check_fields(file, where, row, fields)
    return report


def _check_data(file: Path, data: Any) -> None:
    _check_fields(file, "calibration", data, _TAKEN)
    for name in ("files", "skipped"):
        if not isinstance(data.get(name, []), list):
            raise CheckpointError(
                f"calibration.{name} of {file} must be a list, got {str(data[name])[:40]!r}"
            )
    files = data.get("files", [])
    if files:
        _check_fields(file, "calibration", data, _READ)
    for index, row in enumerate(files):
        where = f"calibration.files[{index}]"
        _check_fields(file, where, row, {"name": _WORDS, "format": _WORDS})


def _is_idle(row: dict[str, Any]) -> bool:
    return row.get("rare") == "nearest" or (bool(row.get("unrouted")) and "rare" not in row)


def _is_plain(row: dict[str, Any]) -> bool:
    return row.get("loss") is None


def _check_fields(file: Path, where: str, row: Any, fields: Mapping[str, str]) -> None:
    if not isinstance(row, dict):
        raise CheckpointError(f"{where} of {file} must be an object, got {str(row)[:40]!r}")
    for name, kind in fields.items():
        value = row.get(name)
        if kind == _WORDS:
            right = isinstance(value, str)
        else:
            right = _is_number(value) or (value is None and kind == _MAYBE)
        if not right:
            raise CheckpointError(
                f"{where}.{name} of {file} must be {kind}, got {str(value)[:40]!r}"
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
