"""``corequant backends`` and ``corequant cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corequant._dispatch import available_backends, get_backend
from corequant.errors import BackendError
from corequant_cli.commands.arguments import Json, print_json
from corequant_cli.tables import system

__all__ = ["backends", "cache"]


def backends(as_json: Json = False) -> None:
    """List the installed backends with their versions and devices."""
    rows: dict[str, dict[str, str]] = {}
    for name in available_backends():
        try:
            rows[name] = get_backend(name).describe()
        except BackendError as error:
            rows[name] = {"error": str(error)}
    if as_json:
        print_json(rows)
    else:
        system.backends(rows)


def cache(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder to use instead of the default ones.")
    ] = None,
    warm: Annotated[
        bool,
        typer.Option("--warm", help="Compile the kernels of common calls that are not cached yet."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where compiled code is cached; fill the cache, as for a read-only image.

    Set NUMBA_CACHE_DIR to use another folder than the default ones.
    """
    from corequant.compiled import cache_contents, use_folder, warm_cache

    if folder is not None:
        use_folder(folder)
    calls = warm_cache() if warm else 0
    found = cache_contents()
    if as_json:
        rows = [{**vars(entry), "path": str(entry.path)} for entry in found]
        print_json({"calls": calls, "folders": rows})
    else:
        system.cache(found)
