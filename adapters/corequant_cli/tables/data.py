"""The calibration and evaluation data that was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corequant_cli.tables.console import console, counted, marked

__all__ = ["CARRIED", "taken"]

_MOST_FILES = 3


CARRIED = (
    "no --calibration: calibrating on the public-domain text that corequant carries (English "
    "prose); text like that of your use gives better results"
)


def taken(verb: str, data: Mapping[str, Any]) -> None:
    """Print what windows were taken from, after a verb such as ``calibrated on``."""
    what = f"{counted(data['windows'], 'window')} of {data['sequence_length']} tokens"
    files = data.get("files") or []
    if not files:
        console().print(f"{verb} {what}")
        return
    names = ", ".join(_file(file) for file in files[:_MOST_FILES])
    more = len(files) - _MOST_FILES
    parts = [f"{verb} {what} from {names}{f' and {more} more files' if more > 0 else ''}"]
    documents = data.get("documents", 1)
    if documents > 1:
        used = f"{data['documents_used']:,} of {documents:,} documents"
        between = f", separated by {marked(repr(data['separator']))}" if data["separators"] else ""
        parts.append(f"{used}{between}")
    if data.get("empty"):
        parts.append(f"{data['empty']:,} empty ones left out")
    if data.get("sampling") == "random":
        parts.append(f"drawn with seed {data['seed']}")
    if data.get("skipped"):
        parts.append(f"other files left out: {len(data['skipped'])}")
    console().print("; ".join(parts))


def _file(file: Mapping[str, Any]) -> str:
    from corequant_transformers.calibration.data.documents import CARRIED as OWN

    name = marked(file["name"])
    return name if name == OWN else f"{name} ({marked(file['format'])})"
