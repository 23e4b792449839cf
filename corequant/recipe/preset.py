"""Presets: recipes under a name, one TOML file each, with what was measured with them.

A file has a ``description``, the ``reader`` that its result is for unless another is asked for, the
``recipe`` (fields of ``Recipe``), a table for each of ``readers`` that can run it with the fields
that differ there, and what was ``measured``.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from corequant.errors import RecipeError
from corequant.formats import suggestion

__all__ = ["DEFAULT_PRESET", "PRESETS", "READERS", "Preset", "check_reader", "find_preset"]

DEFAULT_PRESET = "w4a16"
"""Preset of ``corequant quantize`` where no other is named."""

PRESETS = (
    *("w4a16", "w8a8", "w4a8", "w4a4", "mxfp4", "nvfp4", "w3a16", "w2a16"),
    *("gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gguf-mxfp4"),
)
"""Names of all presets."""

READERS = MappingProxyType(
    {
        "corequant": "corequant",
        "transformers": "compressed-tensors",
        "vllm": "compressed-tensors",
        "llama.cpp": "gguf",
    }
)
"""Programs that a result can be written for, and the layout of files of each (read-only)."""

_WITHOUT = ("heads", "offline")
"""Rotations that leave none for run time."""

_OF_METHODS = {"damping", "correction", "refit", "reference", "steps"}
"""Fields that not every method of rounding takes."""

_OF_WEIGHTS = {"layers", "refit"}
"""Fields that are chosen for the preset's own weights."""

_ADDED = {"layers", "keep"}
"""Fields of which more are added to the preset's."""


@dataclass(frozen=True)
class Preset:
    """A recipe under a name.

    Attributes
    ----------
    name : str
    description : str
    reader : str
        Program that the result is for by default, one of ``READERS``.
    readers : mapping of str to mapping
        Programs that can run the result, with the recipe's fields that differ there.
    recipe : mapping
        Fields of ``Recipe``; ``Recipe.preset`` builds it.
    measured : mapping
        What was measured on SmolLM2-135M-Instruct, and the command that measures it.
    """

    name: str
    description: str
    reader: str
    readers: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any]
    measured: Mapping[str, Any]

    def fields(self, reader: str | None = None, **changes: Any) -> dict[str, Any]:
        """Return the recipe's fields for a reader, with some changed.

        A change that goes with another rotation brings it: ``block_size`` and ``factors`` make a
        rotation without any at run time ``merged``, and such a rotation removes both. Another
        ``rounding`` leaves out what only the preset's method takes, other ``weights`` leave out the
        rules and the ``refit`` of the preset's, ``bits`` and ``size`` its rules. Rules of
        ``layers`` and patterns of ``keep`` are added to those that remain.

        Raises
        ------
        RecipeError
            If the preset isn't for that reader.
        """
        values = {**self.recipe, **self._differences(reader)}
        online = {"block_size": None, "factors": "none"}
        asked = any(changes.get(name, without) != without for name, without in online.items())
        if values.get("rotation") in _WITHOUT and asked:
            values["rotation"] = "merged"
        left = set(online) if changes.get("rotation") in _WITHOUT else set()
        if changes.get("rounding", values.get("rounding")) != values.get("rounding"):
            left |= _OF_METHODS
        if "weights" in changes:
            left |= _OF_WEIGHTS
        if {"bits", "size"} & set(changes):
            # Which layers get more bits is what they ask for.
            left |= {"layers"}
        values = {name: value for name, value in values.items() if name not in left}
        for name in _ADDED & set(changes):
            changes[name] = [*values.get(name, ()), *changes[name]]
        return {**values, **changes}

    def _differences(self, reader: str | None) -> Mapping[str, Any]:
        reader = self.reader if reader is None else check_reader(reader)
        if reader == "corequant":
            return {}
        if reader not in self.readers:
            able = [name for name in PRESETS if reader in find_preset(name).readers]
            raise RecipeError(
                f"preset {self.name!r} can't be run by {reader}; presets for {reader}: "
                f"{', '.join(able)}"
            )
        return self.readers[reader]


def check_reader(name: str) -> str:
    """Return a program's name, one of ``READERS``; any other is a RecipeError."""
    if name not in READERS:
        raise RecipeError(
            f"the program that a result is for must be one of {', '.join(READERS)}, got {name!r}"
            f"{suggestion(str(name), READERS)}"
        )
    return name


@functools.cache
def find_preset(name: str) -> Preset:
    """Return a preset.

    Parameters
    ----------
    name : str
        One of ``PRESETS``; the case doesn't matter.

    Raises
    ------
    RecipeError
        If no preset has that name; the message suggests similar names.

    Examples
    --------
    >>> from corequant.recipe import find_preset
    >>> find_preset("gguf-q4_0").reader
    'llama.cpp'
    """
    wanted = name.lower() if isinstance(name, str) else name
    if wanted not in PRESETS:
        raise RecipeError(
            f"preset must be one of {', '.join(PRESETS)}, got {name!r}"
            f"{suggestion(str(wanted), PRESETS)}"
        )
    file = Path(__file__).parent / "presets" / f"{wanted}.toml"
    values = tomllib.loads(file.read_text("utf-8"))
    return Preset(
        name=wanted,
        description=values["description"],
        reader=values["reader"],
        readers=values["readers"],
        recipe=values["recipe"],
        measured=values["measured"],
    )
