"""Arguments that several commands share, and what they begin and end with."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant.errors import OutputError
from corequant.storage.files import json_text
from corequant_cli.commands.panels import QUALITY, WHAT, WHERE

__all__ = [
    "AnyModel",
    "CalibrationFiles",
    "Device",
    "Json",
    "Length",
    "Model",
    "TextFiles",
    "Verify",
    "load_adapter",
    "output_path",
    "print_json",
    "read_data",
]

_CACHED = "or the id of a model in the local Hugging Face cache"
_DATA = (
    "Text, JSON lines or Parquet to {}, a folder of these, or the id of a data set in the local "
    "Hugging Face cache; may be repeated."
)

Model = Annotated[Path, typer.Argument(help=f"Transformers directory, GGUF file, {_CACHED}.")]
AnyModel = Annotated[Path, typer.Argument(help=f"Quantized or float model, {_CACHED}.")]
CalibrationFiles = Annotated[
    list[Path] | None,
    typer.Option(
        help=f"{_DATA.format('calibrate on')} Defaults to a public-domain text that comes with "
        "the package.",
        metavar="<path>",
        rich_help_panel=QUALITY,
    ),
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option(help=_DATA.format("measure on"), metavar="<path>", rich_help_panel=WHAT),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Length = Annotated[
    int,
    typer.Option(help="Tokens per window.", min=2, metavar="<int>", rich_help_panel=WHAT),
]
Device = Annotated[
    str,
    typer.Option(help="Device to run the model on, such as cpu or cuda.", rich_help_panel=WHERE),
]
Verify = Annotated[
    bool, typer.Option(help="Verify a quantized directory's files against their digests.")
]


def output_path(text: str) -> Path:
    """Return the path that --output names."""
    # An empty Path would be the working directory.
    if not text:
        raise OutputError("--output must be a path, got ''; use '.' for the working directory")
    return Path(text)


def read_data(paths: list[Path] | None) -> Any:
    """Return the documents in files, or those that the package carries if none are named."""
    from corequant_transformers.calibration.data.documents import carried_documents, read_documents

    return read_documents(paths) if paths else carried_documents()


def load_adapter() -> None:
    """Import the adapter, torch and Transformers; torch's threads are no more than processors."""
    import torch

    import corequant_transformers.pipeline  # noqa: F401  (what most commands need)
    from corequant._cpu.processors import processor_count

    torch.set_num_threads(min(torch.get_num_threads(), processor_count()))
    # ``main`` turned the collector off; it need not go through modules ever again.
    gc.freeze()
    gc.enable()


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json_text(value))
