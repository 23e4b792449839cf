"""``corequant presets``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from corequant.recipe import Preset, Recipe, find_preset
from corequant_cli.commands.arguments import Json, print_json
from corequant_cli.tables import choices

__all__ = ["presets"]


def presets(
    name: Annotated[
        str | None, typer.Argument(help="Preset to show; all are listed by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the presets, or show one's recipe and what was measured with it."""
    if name is not None:
        found = find_preset(name)
        if as_json:
            print_json(_plain(found))
        else:
            choices.preset(found, Recipe.preset(found.name).to_toml())
        return
    rows = Recipe.presets()
    if as_json:
        print_json({key: _plain(preset) for key, preset in rows.items()})
    else:
        choices.presets(rows)


def _plain(preset: Preset) -> dict[str, Any]:
    return {
        "description": preset.description,
        "for": preset.reader,
        "readers": {
            reader: Recipe.preset(preset.name, reader=reader).to_dict() for reader in preset.readers
        },
        "recipe": Recipe.preset(preset.name, reader="corequant").to_dict(),
        "measured": dict(preset.measured),
    }
