"""The options of a recipe: one for each field of ``Recipe``, with its default and documentation."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from corequant import recipe as recipes
from corequant.errors import CalibrationError, RecipeError
from corequant.recipe import Recipe
from corequant.specs import QuantSpec
from corequant.storage.files import read_text

__all__ = ["read_option", "takes_recipe"]

_FIELDS = {field.name: field.default for field in fields(Recipe)}
_HINTS = get_type_hints(Recipe)
_METAVARS = {"block_size": "<int>|auto", "accumulator": "[<int>x]<int>"}


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--recipe`` and every field's option in place of its argument ``recipe``."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def parsed(context: typer.Context, recipe_file: Path | None, **arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in _FIELDS}
        command(recipe=_recipe(context, recipe_file, values), **arguments)

    parameters = []
    for parameter in signature.parameters.values():
        other = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
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
    file = typer.Option("--recipe", help="TOML file of a whole recipe, in place of its options.")
    found = [_parameter("recipe_file", None, Annotated[Path | None, file])]
    texts = _texts()
    for name, default in _FIELDS.items():
        kinds = [kind for kind in get_args(_HINTS[name]) or [_HINTS[name]] if kind is not NoneType]
        kind = kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else str
        metavar = "<spec>" if QuantSpec in kinds else _METAVARS.get(name)
        option = typer.Option(help=texts.get(name), metavar=metavar)
        value = str(default) if isinstance(default, QuantSpec) else default
        found.append(_parameter(name, value, Annotated[kind | None, option]))
    return found


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _texts() -> dict[str, str]:
    """Return the first sentence about each field in ``Recipe``'s docstring."""
    entries = re.findall(r"^(\w+) : .+\n((?: {4}.+\n)+)", inspect.getdoc(Recipe) or "", re.M)
    return {name: re.sub(r"``(\w+)``", _plain, _first(text)) for name, text in entries}


def _first(text: str) -> str:
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0]


def _plain(quoted: re.Match[str]) -> str:
    """Name a field as its option, and spell out a constant of choices."""
    word = quoted[1]
    if word in _FIELDS:
        return f"--{word.replace('_', '-')}"
    return ", ".join(getattr(recipes, word)) if word.isupper() else word


def _recipe(context: typer.Context, file: Path | None, values: dict[str, Any]) -> Recipe:
    sources = {name: context.get_parameter_source(name) for name in values}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if file is not None:
        if given:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RecipeError(f"--recipe cannot be combined with {listed}")
        return Recipe.from_toml(read_option("recipe", file))
    size = values["block_size"]
    if size is not None and size.lstrip("-").isdigit():
        values["block_size"] = int(size)
    return Recipe(**values)
