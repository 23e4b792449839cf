"""The options of a recipe: one for each field of ``Recipe``, with its documentation.

None has a default of its own: what isn't given is the preset's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from corequant.errors import CalibrationError, RecipeError
from corequant.recipe import DEFAULT_PRESET, PRESETS, READERS, Recipe, check_reader, find_preset
from corequant.recipe import fields as fixed
from corequant.specs import QuantSpec
from corequant.storage.files import read_text
from corequant_cli.commands.panels import EXPERT, QUALITY, WHAT

__all__ = ["read_option", "takes_recipe"]

_FIELDS = tuple(field.name for field in fields(Recipe))
_HINTS = get_type_hints(Recipe)
_METAVARS = {
    "block_size": "<int>|auto|none",
    "head_block_size": "<int>|none",
    "damping": "<float>|none",
    "accumulator": "[<int>x]<int>|none",
    "bits": "<float>|none",
    "size": "<int>[MB|GB]|none",
}
_REPEATED = {
    "layers": ("--layer", "<pattern>=<spec>[,...]"),
    "keep": ("--keep", "<pattern>"),
    "candidates": ("--candidates", "<spec>"),
}
"""Option that may be given several times, and its value, by field."""
_NUMBERS: dict[str, type[int] | type[float]] = {
    "block_size": int,
    "head_block_size": int,
    "damping": float,
    "bits": float,
    "size": int,
}
"""Fields that take a number, or something else."""

_PANELS = {
    **dict.fromkeys(("weights", "activations", "embeddings", "head", "layers", "keep"), WHAT),
    **dict.fromkeys(("bits", "size", "candidates"), WHAT),
    **dict.fromkeys(("dtype", "rotation", "block_size"), WHAT),
    **dict.fromkeys(("rounding", "permutation", "factors", "sensitivity"), QUALITY),
    **dict.fromkeys(("samples", "sequence_length", "sampling"), QUALITY),
}
"""Panel of each field's option; those that aren't here are for experts."""


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of a recipe in place of its arguments ``recipe`` and ``reader``.

    They are ``--preset``, ``--for``, ``--recipe`` and one for every field of ``Recipe``; ``reader``
    gets the program that the result is for.
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def parsed(
        context: typer.Context,
        preset: str | None,
        reader: str | None,
        recipe_file: Path | None,
        **arguments: Any,
    ) -> None:
        given = _given(context, {name: arguments.pop(name) for name in _FIELDS})
        recipe, reader = _resolve(preset, reader, recipe_file, given)
        command(recipe=recipe, reader=reader, **arguments)

    parameters = []
    for parameter in signature.parameters.values():
        other = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        if parameter.name != "reader":
            parameters += _parameters() if parameter.name == "recipe" else [other]
    parameters.append(_parameter("context", inspect.Parameter.empty, typer.Context))
    parsed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    return parsed


def read_option(name: str, path: Path) -> str:
    """Return the text of a file that an option names."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--{name} must be a readable UTF-8 file: {error}") from error


def _parameters() -> list[inspect.Parameter]:
    named = typer.Option(
        help=f"Recipe to start from ({DEFAULT_PRESET} by default): {', '.join(PRESETS)}. "
        "Other options change it; see 'corequant presets'.",
        metavar="<name>",
        rich_help_panel=WHAT,
    )
    reader = typer.Option(
        "--for",
        help=f"Program to write the result for: {', '.join(READERS)}; for llama.cpp the output is "
        "a .gguf file. Defaults to corequant, and to llama.cpp for presets gguf-*.",
        metavar="<program>",
        rich_help_panel=WHAT,
    )
    file = typer.Option(
        "--recipe",
        help="TOML file with a complete recipe, instead of a preset and options; --layer and "
        "--keep add to it.",
        rich_help_panel=WHAT,
    )
    found = [
        _parameter("preset", None, Annotated[str | None, named]),
        _parameter("reader", None, Annotated[str | None, reader]),
        _parameter("recipe_file", None, Annotated[Path | None, file]),
    ]
    texts = _texts()
    shown_first = [name for name in _PANELS if name in _FIELDS]
    for name in dict.fromkeys([*shown_first, *_FIELDS]):
        kinds = [kind for kind in get_args(_HINTS[name]) or [_HINTS[name]] if kind is not NoneType]
        plain = len(kinds) == 1 and kinds[0] in (bool, int, float) and name not in _NUMBERS
        kind = kinds[0] if plain else str
        metavar = "<spec>" if QuantSpec in kinds else _METAVARS.get(name)
        if metavar is None and kind is str:
            metavar = "<name>"
        style: dict[str, Any] = {
            "help": texts.get(name),
            "rich_help_panel": _PANELS.get(name, EXPERT),
        }
        if name in _REPEATED:
            several = typer.Option(_flag(name), metavar=_REPEATED[name][1], **style)
            found.append(_parameter(name, None, Annotated[list[str] | None, several]))
            continue
        option = typer.Option(metavar=metavar, **style)
        found.append(_parameter(name, None, Annotated[kind | None, option]))
    return found


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _texts() -> dict[str, str]:
    """Return the first sentence about each field in ``Recipe``'s docstring."""
    entries = re.findall(r"^(\w+) : .+\n((?: {4}.+\n)+)", inspect.getdoc(Recipe) or "", re.M)
    texts = {name: re.sub(r"``(\w+)``", _plain, _first(text)) for name, text in entries}
    # A command line has no None.
    return {name: re.sub(r"\bNone\b", "none", text) for name, text in texts.items()}


def _first(text: str) -> str:
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0]


def _flag(field: str) -> str:
    return _REPEATED[field][0] if field in _REPEATED else f"--{field.replace('_', '-')}"


def _plain(quoted: re.Match[str]) -> str:
    """Name a field as its option, and spell out a constant of choices."""
    word = quoted[1]
    if word in _FIELDS:
        return _flag(word)
    return ", ".join(getattr(fixed, word)) if word.isupper() else word


def _given(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields whose options are on the command line, numbers and ``none`` read."""
    sources = {name: context.get_parameter_source(name) for name in values}
    given = {}
    for name, source in sources.items():
        if source is None or source.name != "COMMANDLINE":
            continue
        value = values[name]
        if name in _METAVARS and value.strip().lower() == "none":
            value = None
        elif name in _NUMBERS:
            with contextlib.suppress(ValueError):
                value = _NUMBERS[name](value)
        given[name] = value
    return given


def _resolve(
    preset: str | None, reader: str | None, file: Path | None, given: dict[str, Any]
) -> tuple[Recipe, str]:
    """Return the recipe and the program that its result is for."""
    if file is None:
        found = find_preset(DEFAULT_PRESET if preset is None else preset)
        reader = found.reader if reader is None else reader
        return Recipe.preset(found.name, reader=reader, **given), reader
    added = {name: given.pop(name) for name in ("layers", "keep") if name in given}
    if preset is not None or given:
        names = [*([] if preset is None else ["preset"]), *given]
        listed = ", ".join(map(_flag, names))
        raise RecipeError(f"--recipe cannot be combined with {listed}")
    reader = "corequant" if reader is None else reader
    recipe = Recipe.from_toml(read_option("recipe", file))
    more: dict[str, Any] = {name: (*getattr(recipe, name), *rules) for name, rules in added.items()}
    return replace(recipe, **more), check_reader(reader)
