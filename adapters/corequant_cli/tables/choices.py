"""Presets and number formats to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corequant.recipe import DEFAULT_PRESET, READERS, Preset
from corequant_cli.tables.console import column, console, marked, table

__all__ = ["formats", "preset", "presets"]

_FIGURES = (
    ("perplexity", "ppl", "{:.2f}", "perplexity {}"),
    ("kl", "KL", "{:.3f}", "KL {} nats per token"),
    ("bits_per_weight", "bits", "{:.2f}", "{} bits per weight"),
    ("size_mb", "MB", "{:.0f}", "{} MB"),
    ("minutes", "min", "{:.1f}", "{} minutes"),
    ("memory_mib", "MiB", "{:.0f}", "{} MiB of memory"),
)
"""Keys of a preset's ``measured``, their columns, and how they are written there and in a line."""


_LISTING: dict[str, Any] = {"box": None, "show_header": False, "padding": (0, 2, 0, 0)}


def presets(rows: Mapping[str, Preset]) -> None:
    """Print what each preset is for, and what was measured."""
    listed = table(column("", no_wrap=True, style="bold"), column(""), **_LISTING)
    for name, found in rows.items():
        default = " (the default)" if name == DEFAULT_PRESET else ""
        listed.add_row(name, f"{found.description}{default}; for {_readers(found)}")
    console().print(listed)
    heads = [column(title, justify="right") for _, title, _, _ in _FIGURES]
    grid = table(column("preset", no_wrap=True), *heads, box=None, padding=(0, 2, 0, 0))
    measured = {name: found.measured for name, found in rows.items() if found.measured}
    for name, figures in measured.items():
        grid.add_row(name, *(_figure(figures.get(key), form) for key, _, form, _ in _FIGURES))
    if measured:
        console().print()
        console().print(grid)
        console().print(
            "\nSmolLM2-135M-Instruct on WikiText-2: ppl = perplexity; KL = mean Kullback-Leibler "
            "divergence from the float model, in nats; bits = bits per quantized weight with its "
            "scales; MB on disk; minutes and MiB of memory to quantize."
        )
    console().print(
        "\n'corequant presets NAME' shows a recipe, and 'corequant quantize MODEL -o OUT --preset "
        "NAME' carries it out.",
        highlight=False,
    )


def preset(found: Preset, recipe: str) -> None:
    """Print a preset's recipe."""
    console().print(f"[bold]{found.name}[/bold]: {found.description}")
    console().print(f"for {_readers(found)}\n")
    console().print(recipe.rstrip(), highlight=False, markup=False)
    for reader, fields in found.readers.items():
        if fields:
            changed = "; ".join(f"{key} {_said(value)}" for key, value in fields.items())
            console().print(f"\nwith --for {reader}: {marked(changed)}", highlight=False)
    figures = [
        words.format(form.format(found.measured[key]))
        for key, _, form, words in _FIGURES
        if key in found.measured
    ]
    if figures:
        console().print(f"\nmeasured: {', '.join(figures)}")
        console().print(f"by: {marked(found.measured['command'])}", highlight=False)


def _said(value: Any) -> str:
    """Return a field's value as an option on the command line has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def formats(values: Mapping[str, Any]) -> None:
    """Print number formats, the parts of a quantizer, and who takes which weights."""
    kinds: dict[str, list[str]] = {}
    for name, form in values["formats"].items():
        kinds.setdefault(form["kind"], []).append(name)
    console().print("[bold]Number formats[/bold]")
    console().print(_words(kinds))
    console().print("\n[bold]A quantizer[/bold] is a format and parts, as in int4:group32:mse")
    console().print(_words(values["parts"]))
    console().print()
    others = [reader for reader in READERS if reader != "corequant"]
    heads = [column(reader, justify="center") for reader in others]
    grid = table(column("weights", no_wrap=True), *heads, box=None, padding=(0, 1, 0, 0))
    for text, readers in values["weights"].items():
        grid.add_row(marked(text), *("yes" if reader in readers else "-" for reader in others))
    console().print(grid)
    console().print(
        "\ncorequant takes all of them. Activations: none, or int2 to int8 by token, in files for "
        "transformers and vllm; always 8 bits in groups of 32 in llama.cpp. 'corequant presets' "
        "lists whole recipes."
    )


def _words(rows: Mapping[str, Sequence[str]]) -> Any:
    """Return lists of words, one for each of several names, side by side."""
    grid = table(column(""), column(""), **_LISTING)
    for name, words in rows.items():
        grid.add_row(name, marked(", ".join(words)))
    return grid


def _readers(found: Preset) -> str:
    return ", ".join(["corequant", *found.readers])


def _figure(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
