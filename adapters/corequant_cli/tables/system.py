"""Backends and folders of compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from corequant.compiled import CacheFolder
from corequant_cli.tables.console import console, marked, table

__all__ = ["backends", "cache"]


def cache(folders: Sequence[CacheFolder]) -> None:
    """Print folders of compiled code."""
    for folder in folders:
        console().print(marked(folder), soft_wrap=True)


def backends(rows: dict[str, dict[str, str]]) -> None:
    """Print one line for each backend."""
    grid = table("backend", "what it has")
    for name, found in rows.items():
        grid.add_row(marked(name), marked(", ".join(f"{k} {v}" for k, v in found.items())))
    console().print(grid)
